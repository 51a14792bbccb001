"""`forja run`: the lock, the recipe, Prefect's server, MLflow's thread, the flow, and what is said at the end."""

import json
import os
import shlex
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from components.artifact import to_json, write_atomic
from pipelines import dvc
from pipelines.checkout import home, only_writer
from pipelines.console import fail, say, summary
from pipelines.recipe import use
from pipelines.server import prefect_api
from pipelines.stages import diary_of, read_run


def run(root: Path, recipe: Path, sets: list[str], verbose: bool) -> int:
    """Compose the recipe and run the chain. Returns the exit code: 0 promoted, 1 a stage failed, 2 a user's mistake,
    3 a gate does not hold. Raises Locked when another run holds the checkout."""
    with only_writer(root):
        params = use(root, recipe, sets)
        dvc.allow_without_git(root)
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO" if verbose else "CRITICAL"
        signal.signal(signal.SIGTERM, _terminated)
        begun = time.time()
        say("starting Prefect and MLflow")
        with prefect_api(root) as wait_for_prefect:
            from pipelines.track import Tracker

            tracker = Tracker(root)
            from pipelines import flow

            wait_for_prefect()
            outcome = flow.Run(root, params, tracker)
            status = "KILLED"
            try:
                flow.run_flow(outcome)
                status = "FAILED" if outcome.exit_code else "FINISHED"
            finally:
                _finish(outcome, status, begun)
    return outcome.exit_code


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _finish(outcome: Any, status: str, begun: float) -> None:
    """Close the parent run, keep the summary in .forja/runs/ and show it."""
    root, tracker = outcome.root, outcome.tracker
    evaluated = next((s.get("metrics") or {} for s in outcome.stages if s["name"] == "evaluate"), {})
    tags = {"forja.dvc_lock": dvc.lock_hash(root) or "", "forja.data": dvc.data_version(root) or ""}
    tags |= {"forja.reason": outcome.reason} if outcome.reason else {}
    tags |= {"forja.model_version": outcome.model.version} if outcome.model else {}
    tracker.finish(status, evaluated, tags)
    for stage in outcome.stages:
        stage["mlflow_run_id"] = read_run(diary_of(root, stage["name"], stage["fingerprint"])).get("mlflow_run_id")
    kept = {
        "recipe": outcome.params["recipe"],
        "seed": outcome.params["seed"],
        "started": begun,
        "ended": time.time(),
        "status": status.lower(),
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "stages": outcome.stages,
        "gates": outcome.gates,
        "verdict": "promote" if outcome.model else "hold",
        "model": outcome.model._asdict() if outcome.model else None,
        "model_version": outcome.model.version if outcome.model else None,
        "prefect_flow_run_id": outcome.flow_run_id,
        "mlflow_run_id": tracker.parent,
        "data_version": dvc.data_version(root),
        "dvc_lock": dvc.lock_hash(root),
    }
    if outcome.flow_run_id:
        (home(root) / "runs").mkdir(exist_ok=True)
        write_atomic(home(root) / "runs" / f"{outcome.flow_run_id}.json", to_json(kept))
    summary(outcome.stages, outcome.gates)
    if tracker.trouble:
        fail(f"MLflow: {tracker.trouble}; what it missed is kept in .forja/stages and sent by the next `forja run`")
    if status == "KILLED":
        fail("interrupted; the same command goes on where this one stopped")
    if outcome.reason:
        fail(outcome.reason)
    if outcome.model:
        model = outcome.model
        say(f"{model.name} version {model.version} is {model.alias}{'' if model.new else ', as before'}.")
    if not outcome.reason and outcome.model:
        say(f"Next: forja generate {_question(root, outcome.params)}   forja report --open   forja ui")


def _question(root: Path, params: dict[str, Any]) -> str:
    """One to ask the model, as the command line takes it: of the demo its own, of other data one that PPO was shown."""
    if any(source["source"] == "python-docs" for source in params["ingest"]["sources"]):
        return '"What does json.dumps do?"'
    rows = (root / "artifacts/ppo/samples.jsonl").read_bytes().splitlines()
    asked = shlex.quote(min((json.loads(row)["prompt"] for row in rows), key=len))
    langs = params["sft"]["prompts"]
    return asked if "en" in langs else f"{asked} --lang {min(langs)}"


def last_run(root: Path) -> dict[str, Any]:
    """The summary of the newest run, or an empty mapping."""
    found = [json.loads(p.read_bytes()) for p in (root / ".forja" / "runs").glob("*.json")]
    return max(found, key=lambda r: float(r["started"]), default={})
