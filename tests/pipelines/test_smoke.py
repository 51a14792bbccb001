"""The whole chain, small and real: conf/smoke.yaml through `forja run` in a clone, and then through every claim.

One test, because each step stands on the one before; a clone of its own, because it writes.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloned import SMOKE, call, clone_to, forja, last_run


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return clone_to(tmp_path)


def states(clone: Path) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in last_run(clone)["stages"]}


STAGES = ["validate", "tokenize", "pretrain", "sft", "reward", "referee", "ppo", "quantize", "evaluate"]
CACHED = dict.fromkeys(["ingest", *STAGES], "cached")


def test_the_chain(clone: Path) -> None:
    # A clean clone: every stage runs, the gates hold, the model is champion.
    forja(clone, "run", *SMOKE)
    first = last_run(clone)
    assert states(clone) == dict.fromkeys(["ingest", *STAGES], "ran")
    assert first["verdict"] == "promote" and first["model_version"] == "1"
    assert all(gate["passed"] for gate in first["gates"])
    lock = (clone / "dvc.lock").read_bytes()
    check_prefect(clone, first)
    check_mlflow(clone, first)

    # Nothing changed: DVC's own door runs no stage but `code`, and a comment is no change.
    helper = clone / "components" / "train" / "loop.py"
    helper.write_text(helper.read_text() + "\n# A comment.\n")
    out = call(clone, "dvc", "repro")
    assert [line for line in out.split("\n") if line.startswith("Running stage")] == ["Running stage 'code':"]
    assert all(f"Stage '{name}' didn't change, skipping" in out for name in STAGES)

    # A parameter redoes its stage and what follows, and a gate that does not hold promotes nothing.
    held = ("--set", "evaluate.gates=[{name: never, metric: rouge, at_least: 1}]", "--set", "quantize.int4_group=16")
    assert "quantize.int4_group: 32 -> 16" in forja(clone, "plan", *SMOKE, *held)
    out = forja(clone, "run", *SMOKE, *held, status=3)
    assert "not promoted: never: no metric rouge" in out
    assert states(clone) == {**CACHED, "quantize": "ran", "evaluate": "ran"}
    assert last_run(clone)["verdict"] == "hold"
    forja(clone, "promote", status=3)

    # Back again: DVC restores what it had, and the champion is the same version.
    forja(clone, "run", *SMOKE)
    assert states(clone) == CACHED
    assert (clone / "dvc.lock").read_bytes() == lock
    assert last_run(clone)["model"] == {**first["model"], "new": False}
    found = json.loads(forja(clone, "status", "--json"))
    assert {stage["state"] for stage in found["stages"]} == {"fresh"}
    assert all(stage["mlflow_run_id"] and stage["prefect_task_run_id"] for stage in found["stages"])

    # The champion speaks, and the report is written.
    assert forja(clone, "generate", "What does json.dumps do?", "--max-tokens", "8") is not None
    forja(clone, "report")
    assert (clone / "report.html").stat().st_size > 10_000


def check_prefect(clone: Path, run: dict[str, Any]) -> None:
    """The flow run and its tasks, as Prefect's database keeps them."""
    with sqlite3.connect(f"file:{clone}/.forja/prefect/prefect.db?mode=ro", uri=True) as db:
        flows = db.execute("select id, state_name from flow_run").fetchall()
        tasks = db.execute("select name, state_name, task_version from task_run").fetchall()
        (markdown,) = db.execute("select data from artifact where key = 'forja-gates'").fetchone()
        (logged,) = db.execute("select count(*) from log").fetchone()
    assert flows == [(run["prefect_flow_run_id"], "Completed")]
    assert {name: state for name, state, _ in tasks} == dict.fromkeys(
        ["ingest", "code", *STAGES, "promote"], "Completed"
    )
    code = yaml.safe_load((clone / "code.yaml").read_text())
    assert {name: version for name, _, version in tasks if name in STAGES} == {k: code[k][:16] for k in STAGES}
    assert run["mlflow_run_id"] in markdown and logged > len(STAGES)


def check_mlflow(clone: Path, run: dict[str, Any]) -> None:
    """A parent run, a child a stage with its curve, and the registered model with its alias."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone}/.forja/mlflow.db")
    parent = client.get_run(run["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["forja.prefect_flow_run_id"] == run["prefect_flow_run_id"]
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.\"mlflow.parentRunId\" = '{parent.info.run_id}'", max_results=100
    )
    assert sorted(c.info.run_name for c in children) == sorted(["ingest", *STAGES, "promote"])
    assert {c.info.status for c in children} == {"FINISHED"}
    lock = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    for child in children:
        stage = child.info.run_name
        if stage in STAGES:
            assert child.data.tags["forja.dvc_out"] == lock[stage]["outs"][0]["md5"]
            assert child.inputs.dataset_inputs[0].dataset.digest == run["data_version"]
        if stage in ("pretrain", "sft", "reward", "referee", "ppo"):
            text = (clone / "artifacts" / stage / "curves.jsonl").read_text()
            rows = [json.loads(line) for line in text.split("\n") if line]
            key = "kl" if stage == "ppo" else "loss"
            kept = [(row["step"], row[key]) for row in rows if key in row]
            assert [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, key)] == kept
    champion = client.get_model_version_by_alias("forja", "champion")
    assert champion.version == 1 or champion.version == "1"
    assert champion.tags["forja.data"] == run["data_version"]
    assert champion.tags["forja.dvc_lock"] == run["dvc_lock"]
