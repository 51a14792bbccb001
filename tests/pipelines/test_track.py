"""Tracking against a real MLflow on SQLite, without servers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy import seal, section

from components.artifact import digest, read_record
from pipelines import track
from pipelines.checkout import home, set_environment
from pipelines.stages import close_diary, diary_of, open_diary, read_run


@pytest.fixture
def client(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    set_environment()
    yield track.connect(checkout)


def finished_stage(root: Path, rows: list[dict[str, float]]) -> Path:
    """A stage that ran by `dvc repro`: its diary says that no tracker has seen it."""
    out = seal(root, "pretrain", {"model.txt": "x"}, config=section(), metrics={"loss": 0.25, "parameters": 3.0})
    mark = read_record(out).fingerprint
    diary = diary_of(root, "pretrain", mark)
    open_diary(diary, "pretrain", mark, "data.dir", resumed=False)
    (diary / "spool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (diary / "record.json").write_bytes((out / "record.json").read_bytes())
    close_diary(diary, "finished")
    return diary


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_what_was_never_reported_is_sent_once(checkout: Path, client: Any) -> None:
    rows = [{"t": 1.0 + i, "step": i, "loss": 1 / (i + 1), "progress": i / 3, "perf/rate": 5.0} for i in range(3)]
    resumed = [{"t": 9.0, "step": 2, "loss": 1 / 3, "perf/rate": 7.0}, {"t": 9.5, "step": 3, "loss": 0.25}]
    diary = finished_stage(checkout, rows + resumed)
    experiment = track.experiment_id(client)
    parent = client.create_run(experiment).info.run_id

    track.link(client, checkout, parent, "pretrain", diary)
    run_id = read_run(diary)["mlflow_run_id"]
    assert read_run(diary)["reported"] is True
    assert history(client, run_id, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    run = client.get_run(run_id)
    assert "progress" not in run.data.metrics
    assert run.data.metrics["final.loss"] == 0.25 and run.data.metrics["parameters"] == 3.0
    assert run.data.params == {"lr": "0.1", "steps": "3"}
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["forja.digest"] == digest(checkout / "artifacts" / "pretrain")
    assert run.inputs.dataset_inputs[0].dataset.digest == "data.dir"
    assert run.info.status == "FINISHED"

    # Linked again: the same run. Its note lost: found again by what it is. Never a second one.
    track.link(client, checkout, parent, "pretrain", diary)
    track.update_run(diary, reported=False, mlflow_run_id=None)
    track.link(client, checkout, parent, "pretrain", diary)
    assert read_run(diary)["mlflow_run_id"] == run_id
    assert len(client.search_runs([experiment], "tags.\"forja.stage\" = 'pretrain'")) == 1
    assert client.get_run(parent).data.tags["forja.cached.pretrain"] == run_id

    # A result that came from a remote cache has no diary: its record and curves make the run.
    out = seal(checkout, "sft", {"curves.jsonl": '{"loss": 2.0, "step": 4}\n'}, metrics={"val_loss": 1.5})
    other = diary_of(checkout, "sft", read_record(out).fingerprint)
    track.link(client, checkout, parent, "sft", other)
    assert history(client, read_run(other)["mlflow_run_id"], "loss") == [(4, 2.0)]

    # What a kill left running is closed, and only here.
    elsewhere = client.create_run(experiment, tags={"forja.checkout": "another:/place"}).info.run_id
    mine = client.create_run(experiment, tags={"forja.checkout": track.checkout_id(checkout)}).info.run_id
    track.close_dead_runs(checkout, client)
    assert client.get_run(mine).info.status == "KILLED"
    assert client.get_run(elsewhere).info.status == "RUNNING"


def test_a_server_that_is_down_is_said_at_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(track.Unreachable, match="no answer"):
        track.connect(checkout)
    tracker = track.Tracker(checkout)
    tracker.begin("toy", {})
    tracker.wait()
    assert tracker.trouble is not None and "127.0.0.1:9" in tracker.trouble
    assert not (home(checkout) / "mlflow.db").exists()
