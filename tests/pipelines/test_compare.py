"""`forja compare`: names against a real MLflow on SQLite, differences against numbers worked by hand."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from toy import ROOT, seal

from components.artifact import ForjaError, read_record
from pipelines import compare, recorded, track
from pipelines.checkout import set_environment
from pipelines.compare_page import page, print_tables
from pipelines.recorded import Recorded, Registry, Stage
from pipelines.stages import close_diary, diary_of, open_diary

GATE = {"name": "small", "metric": "int8.bytes_ratio", "value": 0.3, "comparison": "at_most", "limit": 0.35}
HOLDS = {**GATE, "margin": 0.05, "passed": True, "reason": "small: int8.bytes_ratio = 0.3, is at most 0.35"}
FAILS = {
    **GATE,
    "value": 0.4,
    "margin": -0.05,
    "passed": False,
    "reason": "small: int8.bytes_ratio = 0.4, not at most 0.35",
}


def gain(i: int, reward: float, text: str = "yes", **more: Any) -> dict[str, Any]:
    row = {"part": "gain", "id": f"p{i}", "prompt": f"Question {i}?", "ppo": text, "sft": "no", "kl": 1.0 + i}
    return {**row, "ppo.reward": reward, "sft.reward": 0.0, **more}


def choice(i: int, right: bool) -> dict[str, Any]:
    return {"part": "choice", "id": f"c{i}", "answer": 1, "choice": [-2.0, -1.0 if right else -3.0, -2.5, -2.5]}


ROWS = [gain(i, float(10 * i % 70)) for i in range(40)]


def made(name: str, rows: list[dict[str, Any]], params: dict[str, Any] | None = None, **more: Any) -> Recorded:
    """A run that evaluated `rows`, with the SFT, reward model and data of the others."""
    metrics = {"ppo.gain": 1.0, "ppo.gain.low": 0.5, "ppo.gain.high": 1.5, "ppo.gain.n": 40.0, "ppo.kl": 2.0}
    metrics |= {"choice.accuracy": 0.5, "ppo.bleu": 3.0, "contamination.rows": 0.0}

    def stage(stage: str, made_by: str, metrics: dict[str, float] | None = None) -> Stage:
        return Stage(f"{stage}-{made_by}", "FINISHED", False, made_by, made_by, "code", "", metrics or {}, {})

    stages = {s: stage(s, "all") for s in ("validate", "sft", "reward")}
    stages |= {"ppo": stage("ppo", name, {"kl": 2.0}), "evaluate": stage("evaluate", name, metrics)}
    facts = {
        "asked": name,
        "run_id": name * 8,
        "recipe": "toy",
        "state": "promoted",
        "reason": "",
        "version": "",
        "data": "data.dir",
        "started": 1e9,
        "where": "here:/a",
        "params": {"ppo.lr": 0.1, "evaluate.temperature": 1.0, **(params or {})},
        "whole": True,
        "stages": stages,
        "curves": {"kl": [(1.0, 0.1), (2.0, 0.5)], "val_reward": [(2.0, 0.7)]},
        "gates": [HOLDS],
        "rows": rows,
        "gaps": [],
    }
    return Recorded(**{**facts, **more})


def difference(first: Recorded, run: Recorded, key: str) -> dict[str, Any]:
    found = {m["key"]: m for m in compare.compare([first, run])["measures"]}
    assert found[key]["differences"][0] is None
    return found[key]["differences"][1]


def test_a_difference_is_paired_by_row() -> None:
    """Every reward is half a point higher; the rewards themselves lie between 0 and 60, so only pairs can tell."""
    better = [{**row, "ppo.reward": row["ppo.reward"] + 0.5} for row in reversed(ROWS)]
    found = difference(made("a", ROWS), made("b", better), "ppo.gain")
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 40, "verdict": "better"}
    assert difference(made("b", better), made("a", ROWS), "ppo.gain")["verdict"] == "worse"
    assert difference(made("a", ROWS), made("b", better), "ppo.kl")["verdict"] == "no difference"
    nearer = [{**row, "kl": row["kl"] - 0.25} for row in ROWS]
    assert difference(made("a", ROWS), made("b", nearer), "ppo.kl")["verdict"] == "better"


def test_an_interval_is_as_wide_as_the_rows_scatter() -> None:
    """Differences of +1 and -1 in halves: mean 0, and by the normal law 1.96 / sqrt(40) = 0.31 to each side."""
    scattered = [{**row, "ppo.reward": row["ppo.reward"] + (1 if i % 2 else -1)} for i, row in enumerate(ROWS)]
    found = difference(made("a", ROWS), made("b", scattered), "ppo.gain")
    assert found["value"] == 0 and found["verdict"] == "no clear difference"
    assert found["low"] == pytest.approx(-0.31, abs=0.06) and found["high"] == pytest.approx(0.31, abs=0.06)


def test_a_right_choice_is_counted_as_evaluate_counts_it() -> None:
    first = [choice(i, right=i < 10) for i in range(20)]
    second = [choice(i, right=i < 15) for i in range(20)]
    assert difference(made("a", first), made("b", second), "choice.accuracy")["value"] == pytest.approx(0.25)
    tied = [{**row, "choice": [-1.0, -1.0, -2.0, -2.0]} for row in second]  # a tie is not right
    assert difference(made("a", first), made("b", tied), "choice.accuracy")["value"] == pytest.approx(-0.5)


def test_what_can_not_be_compared_says_why() -> None:
    a = made("a", ROWS)

    def why(run: Recorded, key: str = "ppo.gain") -> str:
        return str(difference(a, run, key)["why"])

    other = [{**row, "prompt": row["prompt"] + "!"} for row in ROWS]  # the same ids, another text
    assert why(made("b", other)) == "not comparable: other rows (0 of 40 and 40 in both)"
    judged = made("b", ROWS)
    judged.stages["reward"] = judged.stages["reward"]._replace(run_id="x", digest="x", weights="x")
    assert why(judged) == "not comparable: another reward model"
    assert difference(a, judged, "ppo.kl")["value"] == 0  # which no reward model measures
    assert compare.compare([a, judged])["notes"] == ["B: another reward model; then rewards have no one scale"]
    unnoted = made("b", ROWS)
    unnoted.stages["reward"] = judged.stages["reward"]._replace(weights="")
    assert why(unnoted) == "not comparable: perhaps another reward model: no weights are noted"
    del unnoted.stages["reward"]
    assert why(unnoted) == "not comparable: no reward model is recorded"
    counted = compare.compare([a, made("b", ROWS, {"ppo.judge": "calculator"})])["notes"]
    assert counted == ["B: its judge is calculator, A's is model: the curves of reward are not on one scale"]
    hotter = made("b", ROWS, {"evaluate.temperature": 0.7})
    assert why(hotter) == "not comparable: evaluate.temperature is 1.0 and 0.7"
    assert why(made("b", [])) == "not comparable: no rows recorded"
    assert why(made("b", ROWS), "ppo.bleu") == "no rows to tell by"
    chosen = [choice(i, right=True) for i in range(20)]
    moved = made("b", chosen, data="other.dir")
    moved.stages["validate"] = moved.stages["validate"]._replace(run_id="x", digest="x", weights="")
    found = difference(made("a", chosen), moved, "choice.accuracy")
    assert found["why"] == "not comparable: other data, and these rows keep no text to tell by"


def test_the_referee_is_asked_too() -> None:
    """The first reward model sees half a point more, the referee a quarter less."""
    first = [{**row, "ppo.referee_reward": 1.0 + i, "sft.referee_reward": float(i)} for i, row in enumerate(ROWS)]
    second = [
        {**r, "ppo.reward": r["ppo.reward"] + 0.5, "ppo.referee_reward": r["ppo.referee_reward"] - 0.25} for r in first
    ]
    a, b = made("a", first), made("b", second)
    for run in (a, b):
        run.stages["evaluate"].metrics["ppo.referee_gain"] = 1.0
        run.stages["referee"] = run.stages["reward"]
    assert difference(a, b, "ppo.gain")["verdict"] == "better"
    assert difference(a, b, "ppo.referee_gain")["value"] == -0.25
    assert difference(a, b, "ppo.referee_gain")["verdict"] == "worse"


def test_rows_that_only_one_run_has_are_told() -> None:
    found = difference(made("a", ROWS), made("b", ROWS[:30]), "ppo.gain")
    assert found["n"] == 30 and found["note"] == "other rows: on the 30 in both, of 40 and 30"
    assert difference(made("a", ROWS), made("b", ROWS[:5]), "ppo.gain")["verdict"] == "too few rows to tell"


def test_the_same_weights_are_the_same_judge() -> None:
    """A record changes with the code that made it; the weights may not."""
    other = made("b", ROWS)
    other.stages["reward"] = other.stages["reward"]._replace(run_id="x", digest="x")
    assert "value" in difference(made("a", ROWS), other, "ppo.gain")


def test_only_what_differs_of_the_recipes() -> None:
    runs = [made("a", [], {"ppo.kl_coef": 0.01, "ppo.clip_ratio": 0.2}), made("b", [], {"ppo.kl_coef": 0.05})]
    found = compare.differing(runs)
    assert found == [
        {"key": "ppo.kl_coef", "values": ["0.01", "0.05"]},
        {"key": "ppo.clip_ratio", "values": ["0.2", None]},
    ]
    # A run that kept only its stages' sections says nothing of the stages that it did not reach.
    short = runs[1]._replace(whole=False, stages={"sft": runs[1].stages["sft"]._replace(params={"lr": "0.3"})})
    whole = runs[0]._replace(
        stages={s: runs[0].stages[s]._replace(params={"lr": "0.1"}) for s in ("sft", "ppo")},
    )
    assert compare.differing([whole, short]) == [{"key": "sft.lr", "values": ["0.1", "0.3"]}]


def three() -> dict[str, Any]:
    """PPO, DPO without a KL curve, and a run that failed before it was evaluated."""
    ppo = made("p", [gain(i, 1.0, "<script>alert(1)</script>\u202e") for i in range(12)])
    dpo = made("d", [gain(i, 2.0) for i in range(12)], {"ppo.algorithm": "dpo"}, curves={"val_reward": [(5.0, 1.0)]})
    dpo.stages["ppo"].metrics.update({"margin": 0.7})  # which PPO does not know
    dpo = dpo._replace(gates=[FAILS], state="held", reason="not promoted: small")
    stages = {"sft": dpo.stages["sft"]}
    failed = made("f", [], state="failed", reason="ppo: [no] memory", stages=stages, gates=[], curves={})
    return compare.compare([ppo, dpo, failed])


def test_algorithms_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    found = three()
    assert [run["algorithm"] for run in found["runs"]] == ["PPO", "DPO", "PPO"]
    training = {row["key"]: row["values"] for row in found["training"]}
    assert training == {"kl": [2.0, 2.0, None], "margin": [None, 0.7, None]}
    gained = next(m for m in found["measures"] if m["key"] == "ppo.gain")
    assert gained["differences"][1]["value"] == 1.0 and gained["differences"][2] == {"why": "not measured in both"}
    assert found["samples"] == []  # of all three, none was asked the same
    print_tables(found)
    said = capsys.readouterr().out
    assert "DPO" in said and "failed" in said and "[no] memory" in said
    assert "B is held: small: int8.bytes_ratio = 0.4, not at most 0.35" in said


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.depth: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "path", "rect", "circle", "br"):
            self.depth.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    ppo, dpo = (
        made(n, [gain(i, r, t) for i in range(12)])
        for n, r, t in (("p", 1.0, "<script>x</script>\u202e"), ("d", 2.0, "b"))
    )
    for found in (three(), compare.compare([ppo, dpo])):
        text = page(found)
        parser = Tags()
        parser.feed(text)
        assert parser.depth == []
        assert "script" not in parser.tags and all(link.startswith("#") for link in parser.links)
        assert "url(" not in text.replace("url(#arrow)", "") and "\u202e" not in text
    assert "&lt;script&gt;x&lt;/script&gt;⟨U+202E⟩" in text
    assert re.search(r"Held-out reward by KL.*B PPO from", text, re.S)
    assert "+1 <span" in text and "1 to 1, n = 12" in text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with four runs: one promoted, one held, one that failed at once and one that still runs."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "dvc.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        set_environment()
        for lr, judged, status in (
            (0.1, HOLDS, "FINISHED"),
            (0.2, FAILS, "FAILED"),
            (0.3, None, "FAILED"),
            (0.4, None, ""),
        ):
            write_run(folder, lr, judged, status)
    return folder


def write_run(root: Path, lr: float, judged: dict[str, Any] | None, status: str) -> None:
    evaluate = {"gates": [{"name": "small", "metric": "int8.bytes_ratio", "at_most": lr}]}
    params = {"recipe": "toy", "ppo": {"lr": lr, "algorithm": "grpo"}, "evaluate": evaluate}
    (root / "params.yaml").write_text(yaml.safe_dump({**params, "promote": {"name": "forja", "alias": "champion"}}))
    tracker = track.Tracker(root)
    tracker.begin("toy", {"forja.data": "data.dir"})
    if judged:
        rows = "".join(json.dumps(gain(i, i + lr)) + "\n" for i in range(12))
        gates = json.dumps({"verdict": "promote" if judged["passed"] else "hold", "gates": [judged]})
        metrics = {"ppo.gain": lr, "ppo.gain.low": 0.0, "ppo.gain.high": 1.0}
        seal(root, "ppo", {"samples.jsonl": "", "curves.jsonl": ""}, config=params["ppo"], metrics={"kl": 2.0})
        seal(root, "evaluate", {"gates.json": gates, "rows.jsonl": rows}, config=evaluate, metrics=metrics)
        seal(root, "reward", {"model.safetensors": "the same in both"}, config={"lr": 1})
        for stage, spool in (
            ("reward", []),
            ("ppo", [{"t": 1.0, "step": i, "kl": i * lr} for i in (2, 1)]),
            ("evaluate", []),
        ):
            out = root / "artifacts" / stage
            mark = read_record(out).fingerprint
            diary = diary_of(root, stage, mark)
            open_diary(diary, stage, mark, "data.dir", resumed=False)
            (diary / "spool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spool))
            (diary / "record.json").write_bytes((out / "record.json").read_bytes())
            close_diary(diary, "finished")
            track.update_run(diary, started=1e9 + 100 * lr + len(stage))  # all of this test is one process
            tracker.close(stage, diary, ok=True)
    lock = f"stages: {{}}  # {lr}\n"
    (root / "dvc.lock").write_text(lock)
    tags = {
        "forja.dvc_lock": hashlib.sha256(lock.encode()).hexdigest(),
        "forja.reason": "" if status == "FINISHED" else "why",
    }
    if status == "FINISHED":
        tags["forja.model_version"] = "1"
    if status:
        tracker.finish(status, {"ppo.gain": lr} if judged else {}, tags)
    else:
        tracker.wait()
    assert tracker.trouble is None
    if status == "FINISHED":
        tracker.client.create_registered_model("forja")
        for more in ({"forja.mlflow_run_id": str(tracker.parent)}, {"forja.dvc_lock": "promoted by hand"}):
            tracker.client.create_model_version("forja", "file:///nowhere", tags=more)
        tracker.client.set_registered_model_alias("forja", "champion", "1")


@pytest.fixture
def registry(root: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(root)


def test_a_run_goes_by_many_names(root: Path, registry: Registry) -> None:
    promoted = recorded.read(registry, "champion")
    assert (promoted.state, promoted.version, promoted.algorithm) == ("promoted", "1 (champion)", "GRPO")
    ids = [promoted.run_id, promoted.run_id[:10], "1", promoted.stages["ppo"].run_id]
    assert {recorded.read(registry, name).run_id for name in ids} == {promoted.run_id}
    # Of a recipe the newest run that was judged: neither the one that failed after it, nor the one that runs.
    held = recorded.read(registry, "toy")
    assert (held.state, held.reason, held.gates) == ("held", "why", [FAILS])
    assert recorded.read(registry, "conf/toy.yaml").run_id == held.run_id
    # A git revision is the run with its dvc.lock.
    (root / "dvc.lock").write_text("stages: {}  # 0.2\n")
    for command in (
        ["init", "-q"],
        ["add", "dvc.lock"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    assert recorded.read(registry, "HEAD").run_id == held.run_id


def test_what_a_run_recorded(root: Path, registry: Registry) -> None:
    first, second = (recorded.read(registry, name) for name in ("champion", "toy"))
    measured = {k: v for k, v in first.metrics.items() if not k.startswith("perf/")}
    assert measured == {"ppo.gain": 0.1, "ppo.gain.low": 0.0, "ppo.gain.high": 1.0}
    assert first.curves == {"kl": [(1.0, 0.1), (2.0, 0.2)]}
    assert [row["ppo.reward"] for row in first.rows] == [i + 0.1 for i in range(12)]
    assert first.params["evaluate.gates.small.at_most"] == 0.1
    found = compare.compare([first, second])
    assert found["recipe"] == [
        {"key": "evaluate.gates.small.at_most", "values": ["0.1", "0.2"]},
        {"key": "ppo.lr", "values": ["0.1", "0.2"]},
    ]
    assert difference(first, second, "ppo.gain")["value"] == pytest.approx(0.1)
    assert [a["text"] for a in found["samples"][0]["answers"]] == ["yes", "yes"]


def test_runs_that_did_not_end_well_are_marked(root: Path, registry: Registry) -> None:
    names = [
        run.info.run_id for run in registry.client.search_runs([registry.experiment], "attributes.run_name = 'toy'")
    ]
    states = {run.state for run in (recorded.read(registry, name) for name in names)}
    assert states == {"promoted", "held", "failed", "running"}


def test_what_was_replayed_under_a_run_is_not_its_own(root: Path, registry: Registry) -> None:
    """Results that an earlier run could not report are sent under the next one, whatever its recipe."""
    client, tags = registry.client, {"forja.recipe": "mixed"}
    parent = client.create_run(registry.experiment, run_name="mixed", tags=tags)
    made = {}
    for said in ("failed", "own", "replayed"):
        more = {"mlflow.parentRunId": parent.info.run_id, "forja.stage": "sft"}
        more |= {"forja.replayed": "true"} if said == "replayed" else {}
        made[said] = client.create_run(registry.experiment, tags=more).info.run_id
        client.set_terminated(made[said], "FAILED" if said == "failed" else "FINISHED")
    assert recorded.read(registry, "mixed").stages["sft"].run_id == made["own"]
    client.set_tag(parent.info.run_id, "forja.cached.sft", made["replayed"])
    stage = recorded.read(registry, "mixed").stages["sft"]
    assert (stage.run_id, stage.cached) == (made["replayed"], True)


def test_a_wrong_name_is_told_with_those_that_are_right(root: Path, registry: Registry) -> None:
    with pytest.raises(ForjaError, match=r"nothing: no alias.*aliases champion; versions .*recipes .*toy"):
        registry.find("nothing")
    with pytest.raises(ForjaError, match="forja version 2: promoted by hand"):
        registry.find("2")
    with pytest.raises(ForjaError, match="name 2 to 6 runs, not 1; known: aliases champion"):
        compare.collect(root, ["champion"])
    with pytest.raises(ForjaError, match="champion and 1 are one run"):
        compare.collect(root, ["champion", "1"])
    found = [SimpleNamespace(info=SimpleNamespace(run_id=f"abcd{i}"), data=SimpleNamespace(tags={})) for i in (1, 2)]
    registry.client = SimpleNamespace(search_runs=lambda *args, **kwargs: found)
    with pytest.raises(ForjaError, match=r"abcd: several runs begin so .abcd1, abcd2"):
        registry._id("abcd")


def test_rows_come_from_dvc_where_mlflow_has_none(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = root / "cache"
    files = {"gates.json": b'{"gates": []}', "rows.jsonl": b'{"part": "gain"}\n'}
    for name, content in [
        *files.items(),
        ("dir", json.dumps([{"relpath": n, "md5": f"aa{n}"} for n in files]).encode()),
    ]:
        (cache / "aa").mkdir(parents=True, exist_ok=True)
        (cache / "aa" / name).write_bytes(content)
    monkeypatch.setattr(recorded, "cache_of", lambda root: cache)
    made_here = recorded.read(registry, "champion").stages["evaluate"]
    stage = made_here._replace(run_id=registry.find("champion").info.run_id, dvc_out="aadir")  # which kept no rows
    gaps: list[str] = []
    assert recorded._evidence(registry, "evaluate", stage, gaps) == files and gaps == []
    assert recorded._evidence(registry, "evaluate", stage._replace(dvc_out=""), gaps) == {}
    assert gaps[0] == "evaluate: its gates.json is neither in MLflow nor in DVC's cache"


def test_files_are_written(root: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.show(root, ["champion", "toy"], tmp_path / "a/c.json", tmp_path / "c.html")
    found = json.loads((tmp_path / "a/c.json").read_text())
    assert [run["state"] for run in found["runs"]] == ["promoted", "held"]
    assert "not at most 0.35" in (tmp_path / "c.html").read_text()
    assert "c.html" in capsys.readouterr().out
