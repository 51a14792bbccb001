"""The tasks that lm-eval defines, on data that lie in a folder: the hub's repositories, or the sets as published.

A task's prompts, choices and metrics stay lm-eval's; its rows are brought into the form that the hub has them in. Where
a folder has no training rows, examples come from the rows that are asked, never the asked one itself.
"""

import csv
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_EVALUATE_OFFLINE"] = "1"  # some metrics are programs on the hub, which would be fetched and run

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from components.artifact import ForjaError

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load(names: Sequence[str], data: Path | None) -> tuple[dict[str, Any], list[str]]:
    """What lm-eval's `evaluate` takes for these tasks, groups or tags, and the tasks of groups that have no data here.

    Raises ForjaError for a name that lm-eval does not know, and for a task without data.
    """
    manager = _manager()
    if unknown := [name for name in names if name not in manager.task_index]:
        near = [known for known in manager.all_tasks if known.startswith(unknown[0].split("_")[0])][:5]
        raise ForjaError(f"--tasks {unknown[0]}: lm-eval has no such task; near are {', '.join(near) or 'none'}")
    factory = _Local(data)
    manager._factory = factory
    try:
        found: dict[str, Any] = dict(manager.load(list(names)))
    except (OSError, datasets.exceptions.DatasetsError) as e:
        why = str(e).splitlines()[0]
        raise ForjaError(f"--tasks {','.join(names)}: no data ({why}); give --data FOLDER, or go online") from None
    if not found["tasks"]:
        raise ForjaError(f"--data {data}: nothing there for {', '.join(names)}")
    return found, factory.missing


@functools.cache
def _manager() -> TaskManager:
    """It reads 14,000 files to know the tasks' names: once a process."""
    return TaskManager()


class _Local(TaskFactory):
    """lm-eval's own, with each task's rows from a folder where one is given."""

    def __init__(self, data: Path | None) -> None:
        super().__init__()
        self.data = data
        self.missing: list[str] = []

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        said = {**_said(entry), **(overrides or {})}
        if said.get("unsafe_code"):
            raise ForjaError(
                f"--tasks {entry.name}: would run code that the model writes, which forja does not; leave it out"
            )
        if self.data is None or "dataset_path" not in said:
            return super()._build_task(entry, overrides)
        found = rows_of(self.data, said["dataset_path"], said.get("dataset_name"))
        if found is None:
            raise ForjaError(_nothing(self.data, entry.name, said))
        return super()._build_task(entry, {**(overrides or {}), **_replaced(said, found)})

    def _build_group_members(
        self, members: list[Any], group: str, overrides: dict[str, Any] | None, registry: dict[str, Entry]
    ) -> list[Task | Group]:
        """A group keeps the tasks that have data; the others are told of, never left out in silence."""
        kept = []
        for member in members:
            entry = registry.get(member) if isinstance(member, str) else None
            names = sorted(entry.tags) if entry is not None and entry.kind == Kind.TAG else [member]
            kept += [name for name in names if self._has_data(name, registry)]
        return super()._build_group_members(kept, group, overrides, registry)

    def _has_data(self, name: Any, registry: dict[str, Entry]) -> bool:
        entry = registry.get(name) if isinstance(name, str) else None
        if self.data is None or entry is None or entry.kind != Kind.TASK:
            return True
        said = _said(entry)
        there = "dataset_path" not in said or rows_of(self.data, said["dataset_path"], said.get("dataset_name"))
        if not there:
            self.missing.append(name)
        return bool(there)


def _said(entry: Entry) -> dict[str, Any]:
    """A task's own words, with nothing of its code loaded."""
    if entry.yaml_path is None:
        return dict(entry.cfg or {})
    return load_yaml(entry.yaml_path, resolve_func=False, recursive=True)


def _nothing(data: Path, task: str, said: dict[str, Any]) -> str:
    path = said["dataset_path"]
    return (
        f"--data {data}: nothing there for {task}; put the hub's repository {path} at {data / path}, or the set as "
        "published (docs/evaluation.md has the places)"
    )


def _replaced(said: dict[str, Any], found: Splits | datasets.DatasetDict) -> dict[str, Any]:
    """What a task says otherwise where its rows come from here."""
    splits = {key: said.get(key) for key in SPLITS}
    asked = splits["test_split"] or splits["validation_split"]
    there = set(found)
    if asked not in there:
        asked = "test" if "test" in there else min(there)
        splits["test_split"] = asked
    kept = {key: name if name in there else None for key, name in splits.items()}
    if not any(kept[key] for key in ("training_split", "validation_split", "fewshot_split") if kept[key] != asked):
        kept["fewshot_split"] = kept["test_split"] = asked
    config = said.get("fewshot_config")
    if isinstance(config, dict) and config.get("split") not in (None, *there):
        kept["fewshot_config"] = {**config, "split": asked}
    whole = {
        name: rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
        for name, rows in found.items()
    }
    return {**kept, "custom_dataset": lambda **_: datasets.DatasetDict(whole)}


def rows_of(data: Path, path: str, name: str | None) -> Splits | datasets.DatasetDict | None:
    """A data set of the hub's by its name there and its configuration's, from `data`; None where it is not there."""
    for place in (data / path, data / path.rpartition("/")[2]):
        if place.is_dir() and any((place / kind).exists() for kind in ("README.md", "dataset_infos.json", "data")):
            return datasets.load_dataset(str(place), name)
    published = PUBLISHED.get(path)
    return (published(data, name) or None) if published else None


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise ForjaError(f"{path}: line {number} is no JSON; fetch the file again") from None


def _csv(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as f:
            yield from csv.DictReader(f)


def _splits(**splits: Rows) -> Splits:
    return {name: rows for name, rows in splits.items() if rows}


def mmlu(data: Path, subject: str | None) -> Splits:
    """mmlu/{dev,val,test}/SUBJECT_{dev,val,test}.csv with a row of names. No test, no task."""

    def rows(split: str) -> Rows:
        return [
            {"question": r["question"], "choices": [r[f"choice{i}"] for i in range(4)], "answer": int(r["answer"])}
            for r in _csv(data / "mmlu" / split / f"{subject}_{split}.csv")
        ]

    return _splits(test=rows("test"), validation=rows("val"), dev=rows("dev")) if rows("test") else {}


def arc(data: Path, name: str | None) -> Splits:
    file = f"world_knowledge_{(name or 'ARC-Easy').lower().replace('-', '_')}.jsonl"
    rows = [
        {
            "question": r["query"].removeprefix("Question: ").rstrip(),
            "choices": {"text": r["choices"], "label": list("ABCDEFGH"[: len(r["choices"])])},
            "answerKey": "ABCDEFGH"[r["gold"]],
        }
        for r in _jsonl(data / "eval" / file)
    ]
    return _splits(test=rows)


def hellaswag(data: Path, name: str | None) -> Splits:
    rows = []
    for file in ("hellaswag.jsonl", "hellaswag_small.jsonl"):
        for r in _jsonl(data / "eval" / file):
            activity, _, context = r["query"].partition(": ")
            row = {"activity_label": activity, "ctx_a": context, "ctx_b": "", "label": str(r["gold"])}
            rows.append(row | {"endings": r["choices"]})
        if rows:
            break
    return _splits(validation=rows)


def piqa(data: Path, name: str | None) -> Splits:
    rows = [
        {
            "goal": r["query"].removeprefix("Question: ").rstrip("\n"),
            "sol1": r["choices"][0],
            "sol2": r["choices"][1],
            "label": r["gold"],
        }
        for r in _jsonl(data / "eval" / "commonsense_reasoning_piqa.jsonl")
    ]
    return _splits(validation=rows)


def winogrande(data: Path, name: str | None) -> Splits:
    rows = []
    for r in _jsonl(data / "eval" / "language_understanding_winogrande.jsonl"):
        first, second = r["context_options"]
        alike = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        before = first[: first.rfind(" ", 0, alike) + 1]  # whole words
        options = {"option1": first[len(before) :], "option2": second[len(before) :]}
        rows.append({"sentence": f"{before}_ {r['continuation']}", **options, "answer": str(r["gold"] + 1)})
    return _splits(validation=rows)


def lambada(data: Path, name: str | None) -> Splits:
    rows = []
    for file in ("lambada.jsonl", "lambada_small.jsonl"):
        for r in _jsonl(data / "eval" / file):
            rows.append({"text": f"{r['context']} {r['continuation'].strip()}"})
        if rows:
            break
    return _splits(test=rows)


def truthfulqa(data: Path, name: str | None) -> Splits:
    """truthfulqa/TruthfulQA.csv. mc1: the best answer and all wrong ones; mc2: all right and all wrong ones."""
    cut = lambda text: [part.strip() for part in text.split(";") if part.strip()]  # noqa: E731
    target = lambda right, wrong: {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}  # noqa: E731
    rows: Rows = []
    for r in _csv(data / "truthfulqa" / "TruthfulQA.csv"):
        right, wrong = cut(r["Correct Answers"]), cut(r["Incorrect Answers"])
        row = {"question": r["Question"], "best_answer": r["Best Answer"]}
        if name == "generation":
            rows.append(row | {"correct_answers": right, "incorrect_answers": wrong})
        else:
            rows.append(
                row | {"mc1_targets": target([r["Best Answer"].strip()], wrong), "mc2_targets": target(right, wrong)}
            )
    return _splits(validation=rows)


def gsm8k(data: Path, name: str | None) -> Splits:
    return _splits(**{split: list(_jsonl(data / "gsm8k" / f"{split}.jsonl")) for split in ("train", "test")})


PUBLISHED: dict[str, Callable[[Path, str | None], Splits]] = {
    "cais/mmlu": mmlu,
    "allenai/ai2_arc": arc,
    "Rowan/hellaswag": hellaswag,
    "baber/piqa": piqa,
    "allenai/winogrande": winogrande,
    "EleutherAI/lambada_openai": lambada,
    "truthfulqa/truthful_qa": truthfulqa,
    "openai/gsm8k": gsm8k,
}
