"""Tasks as lm-eval defines them, on public data in a folder: the same rows, prompts and scores as its `hf` model's."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from lm_eval.evaluator import evaluate as lm_eval_s
from lm_eval.models.huggingface import HFLM
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from components.artifact import ForjaError, read_record
from components.model.checkpoint import load, save
from components.model.gpt import GPT
from components.model.interop import export_model, import_model
from components.release import harness_tasks, suite
from components.release.harness import Adapter
from components.release.suite import Options, scored
from components.stats import wilson
from pipelines.benchmarks import table

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
TASKS = ("arc_easy", "hellaswag", "mmlu_anatomy", "lambada_openai", "truthfulqa_mc2", "gsm8k")
ROWS = 6


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    found, missing = harness_tasks.load(TASKS, DATA)
    assert not missing
    for name, task in found["tasks"].items():
        task.set_config(key="num_fewshot", value={"mmlu_anatomy": 2, "arc_easy": 1}.get(name, 0))
    return found


class Plain(PreTrainedModel):
    """Our model as transformers' are called, for what no family of theirs has: `hf` reads one padded row a request."""

    config_class = PretrainedConfig

    def __init__(self, model: GPT) -> None:
        super().__init__(PretrainedConfig(max_position_embeddings=model.config.context))
        self.model = model

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(ids))


def exported(folder: Path, out: Path) -> HFLM:
    export_model(folder, out)
    return HFLM(pretrained=str(out), device="cpu", batch_size=4, dtype="float32")


def wrapped(folder: Path) -> HFLM:
    model, tokenizer, _ = load(folder, "cpu")
    end = "<|endoftext|>"
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
    return HFLM(pretrained=Plain(model), tokenizer=theirs, max_length=model.config.context, batch_size=4)


def run(lm: Any, loaded: dict[str, Any], tasks: set[str]) -> dict[str, Any]:
    kept = {"tasks": {name: task for name, task in loaded["tasks"].items() if name in tasks}}
    for task in kept["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    return lm_eval_s(lm, kept, limit=ROWS, bootstrap_iters=0)


def figures(said: dict[str, Any]) -> dict[str, float]:
    kept = said["results"].items()
    return {f"{t} {k}": v for t, row in kept for k, v in row.items() if "," in k and "_stderr" not in k}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine, want = figures(ours), figures(theirs)
    assert mine.keys() == want.keys() and len(mine) > 4
    for name, value in want.items():
        near = {"rel": 1e-3} if "perplexity" in name else {"abs": 1e-6}
        assert mine[name] == pytest.approx(value, **near), name
    for task, rows in theirs["samples"].items():
        for a, b in zip(ours["samples"][task], rows, strict=True):
            assert a["arguments"] == b["arguments"] and a["doc_hash"] == b["doc_hash"]
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                assert x == y if isinstance(x, str) else (x[0] == pytest.approx(y[0], abs=1e-3) and x[1] == y[1])


@needs_data
@pytest.mark.parametrize("kind", ["gpt", "demo", "aidreams260K"])
def test_figures_and_rows_are_hf_s(kind: str, loaded: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    folder, tasks = tmp_path / "model", {*TASKS} - {"gsm8k"}
    if kind == "aidreams260K":
        import_model(DATA / kind / f"{kind}.bin", folder, DATA / kind / "tok512.bin")
        tasks -= {"truthfulqa_mc2"}  # with answers that are longer than this model's context
    else:
        model = make_model(tokenizer, seed=2, context=1024)
        if kind == "demo":  # with what the demo's preset has, and Hugging Face's families do not
            demo = {"smear": True, "positions": "rotary", "qk_norm": True, "activation": "relu2"}
            model = GPT(model.config.model_copy(update=demo)).eval()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        save(model, folder, tmp_path / "tokenizer.json")
    theirs = wrapped(folder) if kind == "demo" else exported(folder, tmp_path / "hf")
    agree(run(Adapter(load(folder, "cpu"), folder), loaded, tasks), run(theirs, loaded, tasks))


@needs_data
def test_published_rows_are_asked_as_the_task_words_them(loaded: dict[str, Any]) -> None:
    """By hand, from the files' first rows."""
    first = {name: next(iter(task.eval_docs)) for name, task in loaded["tasks"].items()}
    ask = lambda name: loaded["tasks"][name].doc_to_text(first[name])  # noqa: E731
    question = "Which statement best explains why photosynthesis is the foundation of most food webs?"
    assert ask("arc_easy") == f"Question: {question}\nAnswer:"
    assert loaded["tasks"]["arc_easy"].doc_to_target(first["arc_easy"]) == 0
    assert ask("hellaswag").startswith("Removing ice from car: Then, the man writes over the snow")
    assert loaded["tasks"]["hellaswag"].doc_to_target(first["hellaswag"]) == 3
    assert ask("mmlu_anatomy").endswith("\nAnswer:") and "\nA. " in ask("mmlu_anatomy")
    assert ask("lambada_openai").endswith("he was still in the")
    assert loaded["tasks"]["lambada_openai"].doc_to_target(first["lambada_openai"]) == " glen"
    assert first["truthfulqa_mc2"]["mc2_targets"]["labels"][:2] == [1, 1]
    assert len(first["truthfulqa_mc2"]["mc2_targets"]["choices"]) == 12  # 5 right and 7 wrong answers
    assert first["gsm8k"]["answer"].endswith("#### 18")


@needs_data
def test_examples_never_hold_the_question_asked(loaded: dict[str, Any]) -> None:
    """ARC-Easy comes without training rows, so its examples are of the rows asked."""
    task = loaded["tasks"]["arc_easy"]
    task.set_fewshot_seed(seed=1)
    for doc in list(task.eval_docs)[:40]:
        drawn = task.sampler.sample(n=30, eval_doc=doc)
        assert len(drawn) == 30 and doc["question"] not in {d["question"] for d in drawn}
    assert task.fewshot_cfg.split == task.config.test_split


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data folder: two of MMLU's subjects, and ARC-Easy."""
    data = tmp_path / "data"
    for split in ("dev", "test"):
        (data / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "virology"):
            lines = ["question,choice0,choice1,choice2,choice3,answer"]
            lines += [f"the answer of {subject} {i}?,the,answer,la,es,{i % 4}" for i in range(5)]
            (data / "mmlu" / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    (data / "eval").mkdir()
    rows = [{"query": f"Question: the {i}?", "choices": ["the", "la es"], "gold": i % 2} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "eval" / "world_knowledge_arc_easy.jsonl").write_text(text)
    return data


def test_a_suite_is_scored_once(save_checkpoint: Any, small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = save_checkpoint("model", seed=1, context=512)
    options = Options(tasks=("arc_easy", "mmlu_anatomy"), few_shot=1, limit=3, lang=None, seed=1)
    times: list[int] = []
    whole = suite.evaluate
    monkeypatch.setattr(suite, "evaluate", lambda *a: (times.append(1), whole(*a))[1])
    ask = lambda o=options, fresh=False: scored(folder, o, small, tmp_path / "cache", lambda *_: None, fresh)  # noqa: E731
    place, known = ask()
    assert not known and len(times) == 1 and read_record(place).stage == "eval"
    found = json.loads((place / "results.json").read_bytes())
    assert found["tasks"]["arc_easy"]["few_shot"] == 1 and found["missing"] == []
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    right = sum(row["metrics"]["acc"] for row in rows if row["task"] == "arc_easy")
    accuracy = found["tasks"]["arc_easy"]["metrics"]["acc"]
    value, low, high, n = wilson(right, 3)
    assert accuracy == {"value": pytest.approx(value), "low": low, "high": high, "n": n}
    assert "arc_easy" in [str(cell) for cell in table(found).columns[0].cells]

    assert ask() == (place, True) and len(times) == 1
    (place / "results.json").write_text("{}")  # half of it changed: it does not count
    assert ask() == (place, False) and len(times) == 2
    assert ask(fresh=True) == (place, False) and len(times) == 3
    assert ask(options.model_copy(update={"limit": 2}))[0] != place
    with (small / "eval" / "world_knowledge_arc_easy.jsonl").open("a") as f:
        f.write(json.dumps({"query": "Question: es?", "choices": ["the", "la"], "gold": 0}) + "\n")
    assert ask()[1] is False and len(times) == 5
    save(load(save_checkpoint("other", seed=2, context=512), "cpu").model, folder, folder.parent / "tokenizer.json")
    assert ask()[1] is False and len(times) == 6


def test_a_group_says_what_it_lacks(save_checkpoint: Any, small: Path) -> None:
    folder = save_checkpoint("model", seed=1, context=512)
    options = Options(tasks=("mmlu",), few_shot=0, limit=None, lang=None, seed=1)
    found, rows = suite.evaluate(folder, options, small, lambda *_: None)
    assert set(found["tasks"]) == {"mmlu_anatomy", "mmlu_virology"}
    assert len(found["missing"]) == 55 and "mmlu_astronomy" in found["missing"]
    whole = found["groups"]["mmlu"]["metrics"]["acc"]
    assert whole["n"] == 10 and whole["value"] == pytest.approx(sum(r["metrics"]["acc"] for r in rows) / 10)
    assert (whole["low"], whole["high"]) == pytest.approx(wilson(whole["value"] * 10, 10)[1:3])


def test_mistakes_are_one_line(save_checkpoint: Any, small: Path, tmp_path: Path) -> None:
    folder = save_checkpoint("model", seed=1, context=512)

    def ask(*tasks: str, lang: str | None = None) -> None:
        suite.evaluate(folder, Options(tasks=tasks, few_shot=0, limit=1, lang=lang, seed=1), small, lambda *_: None)

    with pytest.raises(ForjaError, match=r"--tasks hellaswagg: lm-eval has no such task"):
        ask("hellaswagg")
    with pytest.raises(ForjaError, match=r"nothing there for hellaswag; put the hub's repository Rowan/hellaswag"):
        ask("hellaswag")
    with pytest.raises(ForjaError, match="--tasks humaneval: would run code that the model writes"):
        ask("humaneval")
    with pytest.raises(ForjaError, match=r"--lang fr: .* has templates for en, es"):
        ask("arc_easy", lang="fr")
    with pytest.raises(ForjaError, match="no such folder"):
        scored(tmp_path / "none", Options(tasks=("a",), few_shot=0, limit=1, lang=None, seed=1), small, tmp_path, print)


def test_intervals_of_other_figures() -> None:
    """A mean of scores, and a figure that is no mean: both from rows drawn with replacement."""
    values = [0.0, 0.25, 0.5, 1.0] * 25
    low, high = suite._interval(values, None, 1)
    spread = 1.96 * np.std(values) / math.sqrt(100)
    assert (low, high) == pytest.approx((0.4375 - spread, 0.4375 + spread), abs=0.02)
    perplexity = lambda lps: math.exp(-sum(lps) / len(lps))  # noqa: E731
    low, high = suite._interval([-1.0, -3.0] * 200, perplexity, 1)
    assert (low, high) == pytest.approx((math.exp(1.9), math.exp(2.1)), rel=0.03)


def test_a_repository_of_the_hub_s_in_the_folder(tmp_path: Path) -> None:
    place = tmp_path / "openai" / "gsm8k" / "main"
    place.mkdir(parents=True)
    (place.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
        "  - {split: test, path: main/test.jsonl}\n---\n"
    )
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "#### 1"}) + "\n")
    found = harness_tasks.rows_of(tmp_path, "openai/gsm8k", "main")
    assert found is not None and found["test"][0]["question"] == "test"
    shutil.rmtree(place.parent)
    assert harness_tasks.rows_of(tmp_path, "openai/gsm8k", "main") is None
