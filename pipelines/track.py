"""MLflow: a parent run for a pipeline run, a child run for every stage that ran, written beside the training.

A thread of the flow's process reads the spools that the stages write and sends them in batches; a stage never waits for
it. When tracking is down the spools stay, and the next `forja run` sends what was never reported. One MLflow run holds
each (key, step) once, however often a stage was resumed.
"""

import fcntl
import json
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.artifact import RECORD, ForjaError, Record, digest, read_record
from pipelines import dvc
from pipelines.checkout import home
from pipelines.server import answers
from pipelines.stages import Row, read_run, read_spool, update_run

EXPERIMENT = "forja"
SEND_EVERY = 3.0  # seconds
WEIGHTS = "model.safetensors"  # of a checkpoint; the components' name for it lives beside torch
# What a stage's run keeps of its result, so that runs can be compared after artifacts/ holds another's.
EVIDENCE = {
    "ppo": ("samples.jsonl", "evaluations.jsonl", "alarms.json"),
    "evaluate": ("gates.json", "rows.jsonl"),
}
Job = Callable[[], None]


class Unreachable(ForjaError):
    """MLflow does not answer."""

    exit_code = 1


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the checkout's own SQLite database by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home(root)}/mlflow.db"


def connect(root: Path) -> Any:
    """An MlflowClient on a database that exists. Raises Unreachable where a server does not answer."""
    uri = tracking_uri(root)
    if uri.startswith("http") and not answers(uri):
        raise Unreachable(f"MLFLOW_TRACKING_URI={uri}: no answer; start that server, or unset the variable")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    with (home(root) / "mlflow.lock").open("w") as lock:  # two processes that create one database break each other
        fcntl.flock(lock, fcntl.LOCK_EX)
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        if client.get_experiment_by_name(EXPERIMENT) is None:
            place = None if uri.startswith("http") else (home(root) / "mlartifacts").as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages show curves first
            client.create_experiment(EXPERIMENT, artifact_location=place, tags=kind)
    return client


def experiment_id(client: Any) -> str:
    found: str = client.get_experiment_by_name(EXPERIMENT).experiment_id
    return found


def checkout_id(root: Path) -> str:
    """Where runs were made; a run of this checkout that still seems to run while we hold its lock is dead."""
    return f"{socket.gethostname()}:{root}"


def close_dead_runs(root: Path, client: Any) -> None:
    """End the runs of this checkout that a kill left running. The caller holds the checkout's lock."""
    mine = f"attributes.status = 'RUNNING' and tags.\"forja.checkout\" = '{checkout_id(root)}'"
    for run in client.search_runs([experiment_id(client)], mine):
        client.set_terminated(run.info.run_id, "KILLED")


class Tracker:
    """Keeps MLflow up with one pipeline run, from a thread of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.client: Any = None
        self.experiment: str | None = None
        self.parent: str | None = None
        self.trouble: str | None = None
        self._live: Live | None = None
        self._jobs: queue.Queue[tuple[Job, threading.Event]] = queue.Queue()
        self._do(self._connect)
        threading.Thread(target=self._work, daemon=True, name="mlflow").start()

    def begin(self, recipe: str, tags: dict[str, str]) -> None:
        """Open the parent run, and send what earlier runs could not."""

        def job() -> None:
            self.parent = _create(self.client, self.root, recipe, {**tags, "forja.recipe": recipe})
            if (self.root / "params.yaml").is_file():
                self.client.log_artifact(self.parent, str(self.root / "params.yaml"))
            for run_json in sorted((home(self.root) / "stages").glob("*/run.json")):
                run = read_run(run_json.parent)
                if run["status"] == "finished" and not run["reported"]:
                    replay(self.client, self.root, self.parent, run_json.parent)

        self._do(job)

    def open(self, diary: Path, attempt: str, tags: dict[str, str]) -> None:
        """Follow the spool of a stage that may be about to run."""

        def job() -> None:
            self._live = Live(self.client, self.root, str(self.parent), diary, attempt, tags)

        self._do(job)

    def close(self, stage: str, diary: Path, ok: bool) -> None:
        """The stage ended: send the rest, or link the run that made a result which DVC had kept."""

        def job() -> None:
            live, self._live = self._live, None
            if live and live.started():
                live.close(ok)
            elif ok and (read_run(diary) or (self.root / "artifacts" / stage / RECORD).is_file()):
                link(self.client, self.root, str(self.parent), stage, diary)

        self._do(job)

    def finish(self, status: str, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """End the parent run and wait for the thread, but not for ever."""

        def job() -> None:
            if self._live and self._live.run_id:  # interrupted in the middle of a stage
                self.client.set_terminated(self._live.run_id, "KILLED")
            _send(self.client, str(self.parent), [{"step": 0, "t": time.time(), **metrics}], set())
            for key, value in tags.items():
                self.client.set_tag(self.parent, key, value)
            self.client.set_terminated(self.parent, status)

        self._do(job)
        self.wait()

    def wait(self, seconds: float = 60) -> None:
        """Until everything asked for so far is sent."""
        if not self._do(lambda: None).wait(seconds):
            self.trouble = self.trouble or f"MLflow did not answer within {seconds:.0f} s"

    def _do(self, job: Job) -> threading.Event:
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def _connect(self) -> None:
        self.client = connect(self.root)
        self.experiment = experiment_id(self.client)
        close_dead_runs(self.root, self.client)

    def _work(self) -> None:
        while True:
            try:
                job, done = self._jobs.get(timeout=SEND_EVERY)
            except queue.Empty:
                job, done = self._send_new, threading.Event()
            if self.trouble is None:
                try:
                    job()
                except Exception as e:  # noqa: BLE001 - tracking never stops a run; the reason is told, the spool stays
                    self.trouble = str(e).splitlines()[0] if str(e) else type(e).__name__
            done.set()

    def _send_new(self) -> None:
        if self._live and self._live.started():
            self._live.send()


class Live:
    """The child run of a stage while it runs. It is created when the stage has really started."""

    def __init__(self, client: Any, root: Path, parent: str, diary: Path, attempt: str, tags: dict[str, str]) -> None:
        self.client, self.root, self.parent, self.diary = client, root, parent, diary
        self.attempt, self.tags = attempt, tags
        self.run_id: str | None = None
        self.offset, self.seen = 0, set[tuple[str, float]]()

    def started(self) -> bool:
        return bool(read_run(self.diary).get("attempt") == self.attempt)

    def send(self) -> None:
        if self.run_id is None:
            self.run_id = create_child(self.client, self.root, self.parent, self.diary, self.tags)
        rows, self.offset = read_spool(self.diary, self.offset)
        _send(self.client, self.run_id, rows, self.seen)

    def close(self, ok: bool) -> None:
        self.send()
        finish_child(self.client, self.root, str(self.run_id), self.diary, self.seen, ok)


def create_child(client: Any, root: Path, parent: str, diary: Path, tags: dict[str, str]) -> str:
    """A stage's run under `parent`, with its recipe section, its identity and the data it stands on."""
    from mlflow.entities import Dataset, DatasetInput, Param

    run = read_run(diary)
    stage = run["stage"]
    sealed = diary / RECORD
    config = json.loads(sealed.read_bytes())["config"] if sealed.is_file() else dvc.section(root, stage)
    identity = {
        "mlflow.parentRunId": parent,
        "forja.stage": stage,
        "forja.fingerprint": run["fingerprint"],
        "forja.started": str(run["started"]),
        "forja.prefect_flow_run_id": run["prefect_flow_run_id"] or "",
        "forja.prefect_task_run_id": run["prefect_task_run_id"] or "",
    }
    run_id = _create(client, root, stage, {**identity, **tags}, started=run["started"])
    params = [Param(key[:250], str(value)[:6000]) for key, value in flat(config).items()]
    for i in range(0, len(params), 100):
        client.log_batch(run_id, params=params[i : i + 100])
    if version := run["data_version"] or dvc.data_version(root):
        source = json.dumps({"file": "data.dvc", "md5": version})
        dataset = Dataset(name="data", digest=version, source_type="dvc", source=source)
        client.log_inputs(run_id, [DatasetInput(dataset, [])])
    return run_id


def finish_child(client: Any, root: Path, run_id: str, diary: Path, seen: set[tuple[str, float]], ok: bool) -> None:
    """Final metrics, the result's identity and evidence; then run.json names the MLflow run and counts as reported.

    A final metric whose name is also a curve goes by `final.<name>`.
    """
    run = read_run(diary)
    perf = {f"perf/{k}": run[k] for k in ("seconds", "peak_memory_mb") if run[k] is not None}
    if ok:
        record = read_record(diary, verify=False)
        drawn = {key for key, _ in seen}
        final = {f"final.{k}" if k in drawn else k: v for k, v in record.metrics.items()}
        _send(client, run_id, [{"step": 0, "t": time.time(), **final, **perf}], seen)
        tags = {"forja.code": record.code, "forja.digest": digest(diary)}
        tags |= {"forja.weights": record.files[WEIGHTS]} if WEIGHTS in record.files else {}
        out = root / "artifacts" / run["stage"]
        if (out / RECORD).is_file() and digest(out) == tags["forja.digest"]:
            tags["forja.dvc_out"] = dvc.out_hash(root, run["stage"]) or ""
            for name in EVIDENCE.get(run["stage"], ()):
                if (out / name).is_file():
                    client.log_artifact(run_id, str(out / name))
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
    else:
        client.set_tag(run_id, "forja.reason", str(run.get("reason") or "the stage ended without a word"))
    client.set_terminated(run_id, "FINISHED" if ok else "FAILED", int((run["ended"] or time.time()) * 1000))
    if ok:
        update_run(diary, mlflow_run_id=run_id, reported=True)


def link(client: Any, root: Path, parent: str, stage: str, diary: Path) -> None:
    """Note on the parent which run made a cached result; make that run from what is kept if there is none."""
    if not read_run(diary):
        _diary_from_artifact(root, stage, diary)
    if not read_run(diary)["reported"]:
        replay(client, root, parent, diary)
    client.set_tag(parent, f"forja.cached.{stage}", read_run(diary)["mlflow_run_id"])


def replay(client: Any, root: Path, parent: str, diary: Path) -> None:
    """A whole child run from a diary, unless one was finished and only the note of it was lost."""
    run = read_run(diary)
    same = f"attributes.status = 'FINISHED' and tags.\"forja.started\" = '{run['started']}'"
    if done := client.search_runs([experiment_id(client)], same, max_results=1):
        update_run(diary, mlflow_run_id=done[0].info.run_id, reported=True)
        return
    run_id = create_child(client, root, parent, diary, {"forja.replayed": "true"})
    seen: set[tuple[str, float]] = set()
    _send(client, run_id, read_spool(diary)[0], seen)
    finish_child(client, root, run_id, diary, seen, ok=True)


def _diary_from_artifact(root: Path, stage: str, diary: Path) -> None:
    """For a result that came from a remote cache: its record and curves are all that is known."""
    out = root / "artifacts" / stage
    diary.mkdir(parents=True, exist_ok=True)
    (diary / RECORD).write_bytes((out / RECORD).read_bytes())
    sealed = Record.model_validate_json((out / RECORD).read_bytes())
    if (out / "curves.jsonl").is_file():
        lines = (out / "curves.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        rows = [json.dumps({"t": 0.0, **json.loads(line)}) for line in lines]
        (diary / "spool.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    nothing = (
        "data_version",
        "ended",
        "seconds",
        "peak_memory_mb",
        "mlflow_run_id",
        "prefect_flow_run_id",
        "prefect_task_run_id",
    )
    known = {"stage": stage, "fingerprint": sealed.fingerprint, "started": time.time(), "status": "finished"}
    update_run(diary, **known, **dict.fromkeys(nothing), reported=False)


def _create(client: Any, root: Path, name: str, tags: dict[str, str], started: float | None = None) -> str:
    begun = int((started or time.time()) * 1000)
    about = {"mlflow.source.name": "forja run", "mlflow.source.type": "LOCAL", "forja.checkout": checkout_id(root)}
    run = client.create_run(experiment_id(client), begun, {**about, **tags}, name)
    run_id: str = run.info.run_id
    return run_id


def _send(client: Any, run_id: str, rows: list[Row], seen: set[tuple[str, float]]) -> None:
    """Log the rows' metrics that this run does not hold yet; `progress` is no metric."""
    from mlflow.entities import Metric

    batch = []
    for row in rows:
        for key, value in row.items():
            mark = (key, row["step"])
            if key not in ("t", "step", "progress") and mark not in seen and math.isfinite(value):
                seen.add(mark)
                batch.append(Metric(key, value, int(row["t"] * 1000), int(row["step"])))
    for i in range(0, len(batch), 1000):
        client.log_batch(run_id, metrics=batch[i : i + 1000])


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key; lists are leaves."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for name, value in config.items() for k, v in flat(value, f"{prefix}.{name}" if prefix else name).items()
    }
