import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from components.artifact import digest, to_json, write_record
from pipelines.dvc import lock_hash
from pipelines.identity import STAGES
from pipelines.report import write
from pipelines.report_sources import confirmed, duration, size, total, visible

INPUTS = {
    "validate": ["data"],
    "tokenize": ["validate"],
    "pretrain": ["tokenize"],
    "sft": ["validate", "pretrain"],
    "reward": ["validate", "sft"],
    "referee": ["validate", "sft"],
    "ppo": ["validate", "sft", "reward"],
    "quantize": ["ppo"],
    "evaluate": ["validate", "tokenize", "pretrain", "sft", "reward", "referee", "ppo", "quantize"],
}


def rows(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")


def decay(step: int, start: float, end: float, scale: float) -> float:
    return end + (start - end) * math.exp(-step / scale) + 0.05 * math.sin(step * 12.9898) * end


def supervised(steps: int, start: float, end: float) -> list[dict]:
    return [
        {"step": s, "loss": decay(s, start, end, steps / 5), "lr": 1e-3, "grad_norm": 1.0}
        | ({"val_loss": decay(s, start, end * 1.05, steps / 5)} if s % (steps // 8) == 0 else {})
        for s in range(1, steps + 1)
    ]


def fill(stage: str, folder: Path) -> None:
    """What the stage would leave: the files that the report reads."""
    if stage == "validate":
        table = {
            "read": 7012,
            "kept": 6900,
            "rejected": {"duplicate": 100, "contaminated": 12},
            "splits": {"train": 6210, "val": 345, "test": 345},
            "sources": {"pydoc_data.topics": 80, "stdlib docstrings": 6820},
            "licences": {"PSF-2.0": 6900},
        }
        names = ["corpus", "instructions", "preferences", "prompts", "eval"]
        (folder / "funnel.json").write_text(to_json({name: table for name in names}))
        away = {"read": 815, "kept": 811, "quarantined": 4, "reasons": {"not UTF-8": 4}}
        (folder / "sources.json").write_text(to_json({"a folder of mine": away}))
        (folder / "docs").mkdir()
        (folder / "docs/index.html").write_text("<!doctype html><title>docs</title>")
    if stage == "tokenize":
        per_token = {"bytes_per_token": 2.9, "bytes_per_token.en": 2.95, "bytes_per_token.es": 2.25}
        (folder / "metrics.json").write_text(to_json(per_token))
    if stage == "pretrain":
        rows(folder / "curves.jsonl", supervised(600, 6.9, 2.1))
        rows(folder / "samples.jsonl", [{"prompt": "The json module", "text": " reads and writes the data."}])
    if stage == "sft":
        rows(folder / "curves.jsonl", supervised(200, 3.1, 0.8))
    if stage in ("reward", "referee"):
        curve = [r | {"accuracy": 1 - r["loss"] / 1.5} for r in supervised(120, 0.7, 0.2)]
        rows(folder / "curves.jsonl", [r | ({"val_accuracy": 0.9} if "val_loss" in r else {}) for r in curve])
        bins = [{"confidence": c, "value": v, "low": v - 0.1, "high": v + 0.1, "n": 40} for c, v in CALIBRATION]
        (folder / "calibration.json").write_text(to_json(bins))
    if stage == "ppo":
        rows(folder / "curves.jsonl", [ppo_row(s) for s in range(1, 41)])
        alarm = {"step": 9, "alarm": "kl", "text": "KL 3 times its target <b>; lower lr"}
        (folder / "alarms.json").write_text(to_json([alarm]))
    if stage in ("sft", "ppo"):
        asked = [
            ("What does json.dumps do?", "It makes a string of an object.", "Serialize obj to a JSON formatted str."),
            ("¿Cuánto es 17 · 23?", "391", "391"),
            ("Say <b>hi</b>", "<script>alert(1)</script>\u202e\x1b[31m</dd>", "hi"),
        ]
        rows(folder / "samples.jsonl", [{"prompt": p, "text": f"{t} ({stage})", "reference": r} for p, t, r in asked])
    if stage == "quantize":
        metrics = {"full.bytes": 6_400_000.0, "int8.bytes": 1_700_000.0, "int8.bytes_ratio": 0.2656}
        metrics |= {"int4.bytes": 1_000_000.0, "int4.bytes_ratio": 0.15625, "int8.bits_per_weight": 8.5}
        (folder / "metrics.json").write_text(to_json(metrics))
    if stage == "evaluate":
        evaluated(folder)


CALIBRATION = [(0.55, 0.5), (0.74, 0.7), (0.95, 0.9)]


def ppo_row(step: int) -> dict:
    return {
        "step": step,
        "reward": decay(step, -0.2, 1.1, 12),
        "kl": 3 * (1 - math.exp(-step / 15)),
        "entropy": decay(step, 1.4, 0.9, 20),
        "length": decay(step, 24, 15, 10),
        "unfinished": decay(step, 0.2, 0.02, 10),
        "repetition": 0.1,
        "clip_fraction": 0.1 + 0.05 * math.sin(step),
        "policy_loss": 0.01 * math.sin(step),
        "value_loss": decay(step, 0.9, 0.2, 8),
        "explained_variance": decay(step, -0.4, 0.7, 9),
    } | ({"val_reward": decay(step, -0.1, 1.0, 12)} if step % 10 == 0 else {})


def evaluated(folder: Path) -> None:
    metrics = {"pretrain.bits_per_byte": 2.104, "xz.bits_per_byte": 2.311, "sft.bits_per_byte": 2.2}
    metrics |= {"ppo.bits_per_byte": 2.21, "int8.bits_per_byte": 2.212, "int8.bits_per_byte_ratio": 1.0009}
    metrics |= {"choice.accuracy": 0.412, "choice.low": 0.36, "choice.high": 0.47, "choice.n": 300.0}
    metrics |= {"reward.accuracy": 0.91, "ppo.gain": 0.42, "ppo.gain.low": 0.3, "ppo.gain.high": 0.55}
    metrics |= {"referee.accuracy": 0.87, "ppo.referee_gain": 0.2, "ppo.referee_gain.low": 0.1}
    metrics |= {"ppo.referee_gain.high": 0.3, "ppo.referee_gain.n": 40.0}
    metrics |= {"sft.rougeL": 0.31, "ppo.rougeL": 0.33, "contamination.rows": 0.0, "bias.max": 0.02}
    (folder / "metrics.json").write_text(to_json(metrics))
    quality = {"part": "quality", "prompt": "What does json.dumps do?", "reference": "Serialize obj.", "id": "a"}
    gain = {"part": "gain", "prompt": "What is math.pi?", "sft": "A number.", "ppo": "3.14", "id": "b", "kl": 0.5}
    choice = {"part": "choice", "id": "c", "choice": [-1.0, -2.0], "answer": 0}
    scored = {"sft.reward": 0.25, "ppo.reward": 0.75}
    rows(folder / "rows.jsonl", [quality | {"pretrain": "of the json", "sft": "A string."}, gain | scored, choice])
    held = {"name": "better than xz", "metric": "pretrain.bits_per_byte", "value": 2.104, "comparison": "below"}
    held |= {"limit": 2.311, "margin": 0.207, "passed": True, "reason": "2.104 is below 2.311 (xz.bits_per_byte)"}
    failed = {"name": "KL within its budget", "metric": "ppo.kl", "value": None, "comparison": "at_most", "limit": 12.0}
    failed |= {"margin": None, "passed": False, "reason": "ppo.kl is missing"}
    (folder / "gates.json").write_text(to_json({"verdict": "hold", "gates": [held, failed]}))


def diary_of(root: Path, stage: str, mark: str, i: int) -> None:
    folder = root / f".forja/stages/{stage}-{mark}"
    folder.mkdir(parents=True)
    run = {"seconds": 4.0 + 9 * i, "peak_memory_mb": 300.0 + 100 * i, "mlflow_run_id": f"{i:x}a" * 16}
    (folder / "run.json").write_text(json.dumps(run | {"prefect_flow_run_id": "0b6d9a1e-flow", "status": "finished"}))


def tree(root: Path) -> Path:
    """A small checkout after a run: sealed artifacts, DVC's files, the diaries of the stages and of the run."""
    (root / "data").mkdir(parents=True)
    (root / "data/a.jsonl").write_text("{}\n")
    taken = {"source": "mine", "from": "books/<b>", "files": 3, "read": 7020, "kept": 7012, "quarantined": 8}
    (root / "data/sources.json").write_text(to_json([taken | {"licences": {"MIT": 12, "PSF-2.0": 7000}}]))
    diary_of(root, "ingest", write_record(root / "data", "ingest").fingerprint, len(STAGES))
    lock: dict = {"schema": "2.0", "stages": {}}
    for i, stage in enumerate(STAGES):
        folder = root / "artifacts" / stage
        folder.mkdir(parents=True)
        fill(stage, folder)
        made_from = {n: digest(root / n if n == "data" else root / "artifacts" / n) for n in INPUTS[stage]}
        record = write_record(folder, stage, code="c0de", inputs=made_from)
        lock["stages"][stage] = {"outs": [{"path": f"artifacts/{stage}", "md5": f"{i + 1}" * 32 + ".dir"}]}
        diary_of(root, stage, record.fingerprint, i)
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    (root / "data.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "da7a" * 8 + ".dir", "path": "data"}]}))
    promote = {"name": "forja", "alias": "champion"}
    (root / "params.yaml").write_text(yaml.safe_dump({"recipe": "demo", "seed": 1, "promote": promote}))
    (root / ".forja/runs").mkdir()
    stages = [{"name": s, "state": "ran", "seconds": 5.0} for s in ("ingest", *STAGES)]
    run = {"recipe": "demo", "started": 1_790_000_000.0, "ended": 1_790_000_210.0, "stages": stages, "verdict": "hold"}
    run |= {"dvc_lock": lock_hash(root), "mlflow_run_id": "fa" * 16, "reason": "not promoted: ppo.kl is missing"}
    (root / ".forja/runs/0b6d9a1e-flow.json").write_text(json.dumps(run | {"model_version": None}))
    return root


class Page(HTMLParser):
    """Counts tags, keeps attributes and text, and notices a tag that is closed out of turn."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return tree(tmp_path / "checkout")


def report(root: Path) -> Page:
    return Page(write(root, root / "report.html").read_text(encoding="utf-8"))


def section(root: Path, name: str) -> str:
    """The text under one heading."""
    html = write(root, root / "report.html").read_text(encoding="utf-8")
    return Page(re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]).text  # type: ignore[index]


def test_whole_run(checkout: Path) -> None:
    page = report(checkout)
    assert page.open == []
    assert "missing or out of date" not in page.text
    assert [a["id"] for t, a in page.tags if t == "section"] == [
        *("gates", "training", "ppo", "samples", "data", "quality", "lineage", "cost", "recipe")
    ]
    assert sum(t == "figure" for t, _ in page.tags) == 15
    assert "Step 9: KL 3 times its target <b>; lower lr" in section(checkout, "ppo")
    gate = " ".join(section(checkout, "gates").split())
    assert "better than xzholds 2.104below 2.3110.207 2.104 is below 2.311" in gate
    assert "KL within its budgetfails –at most 12– ppo.kl is missing" in gate
    sources = " ".join(section(checkout, "data").split())
    assert "minebooks/<b>3 MIT 12, PSF-2.0 7,000" in sources
    assert "12 contaminated; 100 duplicate" in section(checkout, "data")
    assert "34,500" in section(checkout, "data")  # five tables of 6,900 kept rows under one licence
    assert "by language: en 2.95, es 2.25." in section(checkout, "data")
    quality = section(checkout, "quality")
    assert "0.36 to 0.47, n = 300" in quality
    assert (
        quality.index("bits per byte") < quality.index("four-choice") < quality.index("ROUGE-L") < quality.index("bias")
    )
    assert "7 min 25 s in all" in section(checkout, "cost")  # ingest and 9 stages, 4 + 9 i seconds: 40 + 9 * 45 = 445
    for i in range(10):
        assert f"{i:x}a" * 16 in section(checkout, "lineage")


def test_a_run_without_a_value_model_speaks_of_none(checkout: Path) -> None:
    """What GRPO and DPO leave: their own curves, and nothing of what only PPO has."""
    folder = checkout / "artifacts/ppo"
    kept = [{k: v for k, v in ppo_row(s).items() if k not in ("value_loss", "explained_variance")} for s in (1, 2)]
    preferring = [{"step": s, "loss": 0.7 / s, "accuracy": 0.5, "val_reward": 1.0} for s in (1, 2)]
    for name, curve in (("grpo", kept), ("dpo", preferring)):
        rows(folder / "curves.jsonl", curve)
        write_record(folder, "ppo", code="c0de", config={"algorithm": name})
        page = report(checkout)
        said = section(checkout, "ppo") + section(checkout, "training")
        assert "value" not in said and "Explained" not in said and "PPO" not in page.text
        assert f"{name.upper()} · " in section(checkout, "training") and page.open == []
        assert ("Clip fraction" in said) == (name == "grpo")


def test_opens_without_network_and_runs_nothing(checkout: Path) -> None:
    page = report(checkout)
    names = {t for t, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "image", "use"}
    values = [v or "" for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert {v for v in values if not v.startswith("#")} == {"./artifacts/validate/docs/index.html"}
    assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
    css = (checkout / "report.html").read_text(encoding="utf-8")
    assert "url(" not in css.replace("url(#arrow)", "") and "@import" not in css


def test_model_output_is_only_ever_text(checkout: Path) -> None:
    html = write(checkout, checkout / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html
    assert "\u202e" not in html and "\x1b" not in html
    assert "⟨U+202E⟩⟨U+001B⟩[31m" in html


def test_the_same_prompt_stands_side_by_side(checkout: Path) -> None:
    html = write(checkout, checkout / "report.html").read_text(encoding="utf-8")
    first = re.findall(r'<article class="sample">.*?</article>', html, re.DOTALL)[0]
    assert re.findall(r"<dt>(\w+)</dt>", first) == ["pretrain", "sft", "ppo", "reference"]
    assert "of the json" in first and "It makes a string of an object. (sft)" in first
    assert "sft, reward 0.25" in html and "ppo, reward 0.75" in html


@pytest.mark.parametrize(
    "name", ["gates", "training", "ppo", "samples", "data", "quality", "lineage", "cost", "recipe"]
)
def test_an_empty_checkout_says_what_is_missing_and_the_mend(tmp_path: Path, name: str) -> None:
    text = section(tmp_path, name)
    assert "missing or out of date" in text or name == "cost"
    assert "forja run" in text or "forja use" in text or name == "cost"


def files(root: Path) -> Iterator[Path]:
    kept = (".json", ".jsonl", ".yaml", ".lock", ".dvc")
    yield from sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in kept and "data" not in p.parts)


def test_the_report_says_whether_the_referee_confirms_the_gain(checkout: Path) -> None:
    assert "0.42 (0.3 to 0.55)" in section(checkout, "ppo") and "0.2 (0.1 to 0.3, n = 40)" in section(checkout, "ppo")
    for low, other, words in ((0.3, 0.1, "more than a weakness"), (0.3, -0.1, "reward hacking"), (-0.1, 0.1, "sure")):
        assert words in confirmed({"ppo.gain.low": low, "ppo.referee_gain.low": other})
    assert confirmed({"ppo.gain.low": 0.3}) == ""


DAMAGE = [b"", b"\xff\xfe{", b"[1, 2", b'{"a": NaN}', b"7\n7\n", b'[{"stages": 3}]', b"null", b'{"stages": {"sft": 3}}']


def test_any_damaged_file_is_named_and_never_an_exception(checkout: Path) -> None:
    for i, path in enumerate(files(checkout)):
        before = path.read_bytes()
        path.write_bytes(DAMAGE[i % len(DAMAGE)])
        write(checkout, checkout / "report.html")
        path.write_bytes(before)
    (checkout / "artifacts/evaluate/gates.json").write_bytes(b"[1, 2")
    assert "artifacts/evaluate/gates.json: not readable" in section(checkout, "gates")
    assert "delete artifacts/evaluate and run `forja run`" in section(checkout, "gates")


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_every_file_is_damaged(checkout: Path, damage: bytes) -> None:
    for path in list(files(checkout)):
        path.write_bytes(damage)
    assert report(checkout).open == []


def test_a_changed_input_is_an_edge_that_no_longer_holds(checkout: Path) -> None:
    html = write(checkout, checkout / "report.html").read_text(encoding="utf-8")
    assert html.count('class="edge"') == sum(map(len, INPUTS.values())) and 'class="edge old"' not in html
    record = checkout / "artifacts/sft/record.json"
    record.write_text(record.read_text().replace("c0de", "c0d3"))
    html = write(checkout, checkout / "report.html").read_text(encoding="utf-8")
    assert html.count('class="edge old"') == 4  # into reward, referee, ppo and evaluate


def test_results_that_are_newer_than_the_run_are_told(checkout: Path) -> None:
    assert "not promoted: ppo.kl is missing" in report(checkout).text
    with (checkout / "dvc.lock").open("a") as f:
        f.write("# another\n")
    assert "dvc.lock: changed since the last" in report(checkout).text


def test_a_promoted_version_ends_the_lineage(checkout: Path) -> None:
    path = checkout / ".forja/runs/0b6d9a1e-flow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_version": "7", "verdict": "promote"}))
    page = report(checkout)
    assert "forja, version 7" in page.text and "champion" in page.text
    assert "version 7" in section(checkout, "lineage")


def test_the_last_run_is_the_one_that_started_last(checkout: Path) -> None:
    (checkout / ".forja/runs/0000.json").write_text(json.dumps({"recipe": "later", "started": 1_800_000_000.0}))
    (checkout / ".forja/runs/ffff.json").write_text(json.dumps({"recipe": "earlier", "started": 1_700_000_000.0}))
    assert "recipelater" in report(checkout).text


def test_the_records_of_each_source_are_counted(checkout: Path) -> None:
    said = " ".join(section(checkout, "data").split())
    assert "Records read" in said and re.search(r"a folder of mine ?815 ?811.*4 not UTF-8", said)


def test_units() -> None:
    assert [size(n) for n in (None, 0, 812, 3_400_000, 999_999)] == ["–", "0 B", "812 B", "3.4 MB", "1000.0 kB"]
    assert [duration(s) for s in (0.84, 42.4, 185, 7800)] == ["0.8 s", "42 s", "3 min 05 s", "2 h 10 min"]
    assert total([{"a": 1, "b": 2}, {"a": 4}]) == {"a": 5, "b": 2}
    assert visible("a\n\tb\x00é") == "a\n\tb⟨U+0000⟩é"


def test_calibration_is_drawn_against_what_is_right(checkout: Path) -> None:
    """Three bins of 40 verdicts; the model is surer than it is right."""
    said = [a.get("aria-label", "") for t, a in report(checkout).tags if t == "svg"]
    (drawn,) = (text for text in said if text.startswith("Reward model · calibration"))
    assert drawn.endswith("by confidence % up to 95: right from 50 to 90; as sure as right from 55 to 95")
    assert "Of 120 held-out verdicts" in section(checkout, "training")
