import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import Config, params, seal, section

from components.artifact import Damaged, ForjaError, digest, read_record
from components.log import Log
from pipelines.stages import curves, diary_of, read_run, read_spool, run_stage


@pytest.fixture
def ready(checkout: Path) -> Path:
    seal(checkout, "ppo", {"model.txt": "weights"})
    return checkout


def training(dies_at: int | None) -> Any:
    """A stage that notes each step in scratch and runs out of memory before it has noted `dies_at`."""

    def train(cfg: Config, ppo: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
        state = scratch / "state"
        begin = int(state.read_text()) + 1 if state.exists() else 0
        for step in range(begin, cfg.steps):
            log({"progress": step / cfg.steps, "loss": 1.0 / (step + 1), "perf/seconds": 9.0}, step)
            if step == dies_at:
                raise MemoryError("the machine is full")
            state.write_text(str(step))
        (out / "model.txt").write_text((ppo / "model.txt").read_text() * cfg.steps)
        return {"loss": 1.0 / cfg.steps}

    return train


def only_diary(root: Path) -> Path:
    (found,) = (root / ".forja" / "stages").iterdir()
    return found


def test_a_stage_dies_and_resumes(ready: Path, fake: Any) -> None:
    fake.run = training(dies_at=1)
    with pytest.raises(MemoryError):
        run_stage(ready, "quantize")
    assert not (ready / "artifacts" / "quantize").exists()
    failed = read_run(only_diary(ready))
    assert (failed["status"], failed["exit_code"]) == ("failed", 1)
    assert failed["reason"] == "MemoryError: the machine is full"

    fake.run = training(dies_at=None)
    run_stage(ready, "quantize")
    assert [row["step"] for row in read_spool(only_diary(ready))[0]] == [0, 1, 1, 2]
    out = ready / "artifacts" / "quantize"
    record = read_record(out)
    assert record.config == section()
    assert record.inputs == {"ppo": digest(ready / "artifacts" / "ppo")}
    assert record.metrics == json.loads((out / "metrics.json").read_text()) == {"loss": 1 / 3}
    rows = [json.loads(line) for line in (out / "curves.jsonl").read_text().split("\n") if line]
    assert rows == [{"loss": 1.0, "step": 0}, {"loss": 0.5, "step": 1}, {"loss": 1 / 3, "step": 2}]
    assert not list((ready / "scratch").iterdir())
    run = read_run(diary_of(ready, "quantize", record.fingerprint))
    assert run["status"] == "finished" and run["peak_memory_mb"] > 1 and run["reported"] is False


def test_a_training_that_is_not_cut_by_depth_says_so(
    ready: Path, fake: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.run = training(dies_at=None)
    run_stage(ready, "quantize")
    assert "FORJA_PIPELINE" not in capfd.readouterr().out
    monkeypatch.setenv("FORJA_PIPELINE", "2")
    run_stage(ready, "quantize")
    said = [line for line in capfd.readouterr().out.split("\n") if "FORJA_PIPELINE" in line]
    assert said == [
        "quantize: FORJA_PIPELINE=2 cuts pretraining alone; here each rank has the whole model and takes rows"
    ]


def test_the_bytes_do_not_depend_on_an_interruption(ready: Path, fake: Any) -> None:
    fake.run = training(dies_at=None)
    run_stage(ready, "quantize")
    undisturbed = digest(ready / "artifacts" / "quantize")
    fake.run = training(dies_at=2)
    with pytest.raises(MemoryError):
        run_stage(ready, "quantize")
    fake.run = training(dies_at=None)
    run_stage(ready, "quantize")
    assert digest(ready / "artifacts" / "quantize") == undisturbed


def test_a_damaged_input_is_refused(ready: Path, fake: Any) -> None:
    fake.run = training(dies_at=None)
    (ready / "artifacts" / "ppo" / "model.txt").write_text("other")
    with pytest.raises(Damaged, match=r"artifacts/ppo/model\.txt"):
        run_stage(ready, "quantize")


def test_wrong_params_are_named(ready: Path, fake: Any) -> None:
    (ready / "params.yaml").write_text(yaml.safe_dump(params(quantize=section(lr="fast", step=1))))
    with pytest.raises(ForjaError) as e:
        run_stage(ready, "quantize")
    assert "quantize.lr" in str(e.value)
    assert "quantize.step: unknown key; did you mean quantize.steps?" in str(e.value)


def test_an_unknown_stage_is_named(ready: Path) -> None:
    with pytest.raises(ForjaError, match="stage quantise: there is no such stage"):
        run_stage(ready, "quantise")


def test_a_metric_that_is_not_finite_is_not_sealed(ready: Path, fake: Any) -> None:
    fake.run = lambda cfg, ppo, out, log: {"loss": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        run_stage(ready, "quantize")
    assert not (ready / "artifacts" / "quantize").exists()


def test_a_row_cut_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    whole = '{"loss": 1.0, "step": 0, "t": 1.0}\n{"loss": 0.\n{"loss": 0.5, "step": 0, "t": 2.0}\n'
    (tmp_path / "spool.jsonl").write_text(whole + '{"loss": 0.1, "st')
    rows, offset = read_spool(tmp_path)
    assert [row["loss"] for row in rows] == [1.0, 0.5]
    assert offset == len(whole)
    assert curves(tmp_path) == [{"step": 0, "loss": 0.5}]
    assert read_spool(tmp_path, offset) == ([], offset)
