"""Benchmarks of lm-evaluation-harness on a checkpoint: each number with its interval, its count, and its rows.

What was scored is kept under a hash of the model's files, the data's files, the tasks and the options: the same
question is answered from there, whole or not at all.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from components.artifact import Damaged, ForjaError, building, fingerprint, read_record, sha256, to_json, write_record
from components.stats import bootstrap_mean, wilson

RESULTS, ROWS = "results.json", "rows.jsonl"
RESAMPLES = 1000
Row = dict[str, Any]
Told = Callable[[str, int, int], None]


class Options(BaseModel, frozen=True, extra="forbid"):
    tasks: tuple[str, ...] = Field(min_length=1)
    few_shot: int | None = Field(ge=0)  # examples before each question; None: as the task says
    limit: int | None = Field(ge=1)  # rows of each task, the first ones; None: all
    lang: str | None  # ask through the model's prompt template of this language; None: as plain text
    seed: int  # of the examples drawn, and of the intervals


def scored(
    folder: Path, options: Options, data: Path | None, cache: Path, told: Told, fresh: bool = False
) -> tuple[Path, bool]:
    """The folder with results.json and rows.jsonl of this model on these tasks, and whether it was there already."""
    if not folder.is_dir():
        raise ForjaError(f"--model {folder}: no such folder; name a checkpoint such as artifacts/ppo")
    if data is not None and not data.is_dir():
        raise ForjaError(f"--data {data}: no such folder")
    inputs = {"model": _digest(folder), "data": "hub" if data is None else _digest(data)}
    versions = {name: version(name) for name in ("lm_eval", "torch", "datasets")}
    config = {"options": options.model_dump(mode="json"), "versions": versions}
    place = cache / fingerprint("eval", config, _code(), inputs)
    if not fresh and place.is_dir():
        with contextlib.suppress(Damaged):  # what a crash or a hand left there is scored again
            read_record(place)
            return place, True
    found, rows = evaluate(folder, options, data, told)
    with building(place) as new:
        (new / RESULTS).write_text(to_json(found), encoding="utf-8")
        with (new / ROWS).open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
        write_record(new, "eval", config=config, code=_code(), inputs=inputs)
    return place, False


def _digest(folder: Path) -> str:
    """sha256 over the names and the sha256 of all files."""
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    text = "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _code() -> str:
    """sha256 of what scores: another way to ask is another result."""
    release = Path(__file__).parent
    files = [release / f"{name}.py" for name in ("continuations", "harness", "harness_tasks", "suite")]
    files += [
        release.parent / "model" / f"{name}.py" for name in ("gpt", "attention", "generate", "decode", "sampling")
    ]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def evaluate(folder: Path, options: Options, data: Path | None, told: Told) -> tuple[dict[str, Any], list[Row]]:
    """lm-eval's metrics of each task and group, and what each row of each task came to."""
    from lm_eval.evaluator import evaluate as ask

    from components.release import harness_tasks
    from components.release.harness import Adapter
    from components.release.quantize import load

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = Adapter(load(folder), folder, options.lang, told)
    told("tasks", 0, 1)
    loaded, missing = harness_tasks.load(options.tasks, data)
    for task in loaded["tasks"].values():
        # lm-eval's own rule: a task that fixes no examples at all keeps to that.
        if options.few_shot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    try:
        said: Any = ask(
            lm,
            loaded,
            limit=options.limit,
            bootstrap_iters=0,  # the intervals are ours
            apply_chat_template=options.lang is not None,
            fewshot_as_multiturn=options.lang is not None,
        )
    except ValueError as e:
        raise ForjaError(f"--tasks {','.join(options.tasks)}: {str(e).splitlines()[0]}") from e
    tasks = {}
    for name, task in loaded["tasks"].items():
        metrics = _metrics(said["results"][name], said["samples"][name], task.aggregation(), options.seed)
        shots = task.get_config("num_fewshot")
        tasks[name] = {"metrics": metrics, "few_shot": shots, "version": str(task.VERSION)}
    groups = {}
    for name, group in loaded.get("groups", {}).items():
        inside = [task.task_name for task in group.get_all_tasks()]
        equal = {a.metric for a in group.aggregate_metric_list or () if not a.weight_by_size}
        metrics = _group(said["results"][name], {n: said["samples"][n] for n in inside}, equal, options.seed)
        groups[name] = {"metrics": metrics, "tasks": inside}
    found = {"tasks": tasks, "groups": groups, "missing": sorted(missing)}
    return found, list(_rows(said["samples"]))


def _rows(samples: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    for task, kept in samples.items():
        for s in kept:
            answers = (
                [r[0] for r in s["filtered_resps"]]
                if isinstance(s["filtered_resps"][0], tuple)
                else s["filtered_resps"]
            )
            row = {"task": task, "doc": s["doc_id"], "sha256": s["doc_hash"], "filter": s["filter"]}
            yield row | {"answers": answers, "metrics": {m: _plain(s[m]) for m in s["metrics"]}}


def _plain(value: Any) -> Any:
    return (
        value.item()
        if isinstance(value, np.generic)
        else list(map(_plain, value))
        if isinstance(value, tuple | list)
        else value
    )


def _named(key: str) -> str:
    """`acc,none` as acc; `exact_match,strict-match` as it is."""
    return key.removesuffix(",none")


def _metrics(said: Row, samples: Sequence[Row], aggregate: Mapping[str, Any], seed: int) -> dict[str, Row]:
    found = {}
    for key, value in said.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr"):
            continue
        values = [s[metric] for s in samples if s["filter"] == name and metric in s]
        found[_named(key)] = _row(float(value), _interval(values, aggregate.get(metric), seed), len(values))
    return found


def _row(value: float, interval: tuple[float, float], n: int) -> Row:
    """JSON has no NaN: what is none is null."""
    low, high = interval
    return {k: v if math.isfinite(v) else None for k, v in (("value", value), ("low", low), ("high", high))} | {"n": n}


def _interval(values: Sequence[Any], aggregate: Callable[[Any], float] | None, seed: int) -> tuple[float, float]:
    """95 %: Wilson's of a share, the percentile bootstrap over rows of any other mean or figure."""
    from lm_eval.api.metrics import mean

    if aggregate in (mean, None) and all(isinstance(v, int | float | np.number) for v in values):
        if all(v in (0, 1) for v in values):
            return wilson(float(sum(values)), len(values))[1:3]
        return bootstrap_mean([float(v) for v in values], RESAMPLES, seed)[1:3]
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES // 5, len(values)))
    assert aggregate is not None  # noqa: S101
    found = [float(aggregate([values[i] for i in draw])) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _group(said: Row, samples: Mapping[str, Sequence[Row]], equal: set[str], seed: int) -> dict[str, Row]:
    """A group's figures over all rows of its tasks; where each task counts alike, rows are drawn within each."""
    found = {}
    for key, value in said.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr"):
            continue
        tasks = [[float(s[metric]) for s in rows if s["filter"] == name] for rows in samples.values()]
        if metric in equal:
            rng = np.random.default_rng(seed)
            means = [np.asarray(t)[rng.integers(0, len(t), (RESAMPLES, len(t)))].mean(1) for t in tasks]
            low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
            interval = (float(low), float(high))
        else:
            interval = _interval([v for t in tasks for v in t], None, seed)
        found[_named(key)] = _row(float(value), interval, sum(map(len, tasks)))
    return found
