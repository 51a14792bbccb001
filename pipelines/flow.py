"""The Prefect flow: one task a stage, each a child `dvc repro --single-item`, then promotion.

DVC alone decides whether a stage runs; Prefect shows it, keeps its output and retries what may pass. This module
imports Prefect, so it is imported late, when its server is already starting.
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Crashed, State

from components.artifact import ForjaError, read_record
from components.log import Log
from pipelines import dvc, promote, snapshot
from pipelines.child import stream
from pipelines.console import clock, key_metric, say, stage_progress
from pipelines.identity import STAGES, code_hashes
from pipelines.stages import diary_of, read_run, read_spool
from pipelines.track import Tracker, checkout_id

NOT_RETRIED = (2, 3)  # a user's mistake, a gate
Tick = Callable[[], None]


class StageFailed(ForjaError):
    """A stage's child failed; the message is its own last word."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass
class Run:
    """One pipeline run: what it works on, and what it has found so far."""

    root: Path
    params: dict[str, Any]
    tracker: Tracker
    flow_run_id: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    model: promote.Promoted | None = None
    reason: str = ""
    exit_code: int = 0


def run_flow(run: Run) -> None:
    """Run the chain; the outcome, good or bad, is in `run`. Interrupts pass through after the children have ended."""
    code = code_hashes(run.root)

    @flow(name="forja", persist_result=False, validate_parameters=False)
    def forja(recipe: str, checkout: str) -> None:
        run.flow_run_id = str(runtime.flow_run.id)
        identity = {"forja.prefect_flow_run_id": run.flow_run_id, "forja.data": dvc.data_version(run.root) or ""}
        run.tracker.begin(recipe, identity)
        before: list[State] = []
        for name in ["ingest", "code", *STAGES]:
            state = _task_of(name, code.get(name), recipe)(run, name, wait_for=before, return_state=True)
            if not state.is_completed():
                state.result()
            before = [state]
        _promote(run, wait_for=before)

    close_dead_flow_runs(run.root)
    state = forja(run.params["recipe"], checkout_id(run.root), return_state=True)
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        run.reason = str(error) if isinstance(error, ForjaError) else f"{type(error).__name__}: {error}"
        run.exit_code = getattr(error, "exit_code", 1)


def _worth_retrying(_: Any, __: Any, state: State) -> bool:
    return getattr(state.result(raise_on_failure=False), "exit_code", 1) not in NOT_RETRIED


def _task_of(name: str, code: str | None, recipe: str) -> Task[[Run, str], State]:
    made = task(
        name=name,
        task_run_name=name,
        version=code and code[:16],
        tags=["stage", recipe],
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=1,
        retry_delay_seconds=2,
        retry_condition_fn=_worth_retrying,
    )
    return made(_stage)


def _stage(run: Run, name: str) -> State:
    """One stage through DVC. Its state says what DVC did: Completed where it ran, Cached where nothing was to do."""
    if name == "ingest":
        wanted = snapshot.need(run.root, run.params["ingest"])
        say(f"ingest: {wanted.reason}")
        get_run_logger().info("%s: %s", wanted.action, wanted.reason)
        command = [*dvc.FORJA, "stage", "ingest"] if wanted.action != "keep" else []
        data = run.root / "data"
        kept = not command and read_record(data, verify=False).fingerprint
        mark = kept or snapshot.mark(run.root, run.params["ingest"])
    else:
        command = [*dvc.DVC, "repro", "--single-item", name]
        mark = "" if name == "code" else dvc.identify(run.root, name, run.params[name], code_hashes(run.root)[name])[0]
    attempt, diary = uuid.uuid4().hex, diary_of(run.root, name, mark)
    environment = {
        "FORJA_ATTEMPT": attempt,
        "FORJA_FLOW_RUN": run.flow_run_id,
        "FORJA_TASK_RUN": str(runtime.task_run.id),
    }
    if name != "code":
        run.tracker.open(diary, attempt, {"forja.recipe": run.params["recipe"]})
    output: list[str] = []
    status = 0
    if command:
        with stage_progress(name) as show:
            status = stream(command, run.root, environment, _keep(diary, output), _follow(diary, attempt, show))
    return _concluded(run, name, diary, attempt, status, output)


def _keep(diary: Path, output: list[str]) -> Callable[[str], None]:
    """Where a child's lines go: Prefect's log of the task, output.log in the diary, and back to us."""
    logger = get_run_logger()
    diary.mkdir(parents=True, exist_ok=True)
    kept = (diary / "output.log").open("a", encoding="utf-8", buffering=1)

    def line(text: str) -> None:
        output.append(text)
        kept.write(text + "\n")
        logger.info("%s", text)

    return line


def _follow(diary: Path, attempt: str, show: Log) -> Tick:
    """Shows the rows that the running stage adds to its spool."""
    offset = 0

    def tick() -> None:
        nonlocal offset
        run = read_run(diary)
        if run.get("attempt") == attempt:
            rows, offset = read_spool(diary, offset)
            for row in rows:
                if row["t"] >= run["started"]:
                    show(row, int(row["step"]))

    return tick


def _concluded(run: Run, name: str, diary: Path, attempt: str, status: int, output: list[str]) -> State:
    """Note what became of the stage; raises StageFailed with the true reason."""
    kept = read_run(diary)
    ran = kept.get("attempt") == attempt
    entry: dict[str, Any] = {"name": name, "state": "ran" if ran else "cached", "fingerprint": kept.get("fingerprint")}
    if status:
        run.tracker.close(name, diary, ok=False)
        reason, code = _why(kept if ran else {}, output)
        run.stages = [*(s for s in run.stages if s["name"] != name), {**entry, "state": "failed", "reason": reason}]
        raise StageFailed(f"{name}: {reason.removeprefix(f'{name}: ')}", code)
    if name == "code":
        return Completed(message="hashed the code of every stage")
    run.tracker.close(name, diary, ok=True)
    folder = run.root / ("data" if name == "ingest" else f"artifacts/{name}")
    entry["metrics"] = read_record(folder, verify=False).metrics
    entry |= {k: kept.get(k) for k in ("seconds", "peak_memory_mb")}
    run.stages = [*(s for s in run.stages if s["name"] != name), entry]
    metric = key_metric(name, entry["metrics"])
    if ran:
        say(f"{name}: {clock(entry['seconds'])}, {metric}")
        return Completed(message=f"ran {clock(entry['seconds'])}, {metric}")
    restored = any("is cached - skipping run" in text for text in output)
    said = "restored from DVC's run cache" if restored else "unchanged"
    say(f"{name}: {said}, {metric}")
    return Completed(name="Cached", message=said)


def _why(kept: dict[str, Any], output: list[str]) -> tuple[str, int]:
    """The stage's own reason and exit code; where it left none, the last error that its child printed."""
    if kept.get("status") == "failed":
        return kept["reason"], kept["exit_code"]
    text = "\n".join(output)
    codes = re.findall(r"exited with (-?\d+)", text)
    if codes and int(codes[-1]) < 0:
        return f"killed by signal {-int(codes[-1])} (9 is often a lack of memory)", 1
    said = [line for line in output if line.startswith(("forja: ", "ERROR: "))]
    own = [line for line in said if line.startswith("forja: ")] or said or output or ["it ended without a word"]
    return own[-1].removeprefix("forja: ").removeprefix("ERROR: "), int(codes[-1]) if codes else 1


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False, tags=["gate"])
def _promote(run: Run) -> State:
    run.gates = promote.read_gates(run.root)[1]
    run.tracker.wait()
    try:
        tags = {"forja.prefect_flow_run_id": run.flow_run_id, "forja.mlflow_run_id": run.tracker.parent or ""}
        run.model = promote.promote(run.root, run.params, tags, run.tracker.parent)
    finally:
        create_markdown_artifact(_markdown(run), key="forja-gates", description="Gates, and where to look further")
    done = "registered and promoted" if run.model.new else "stands already"
    return Completed(message=f"{run.model.name} version {run.model.version} {done}")


def _markdown(run: Run) -> str:
    rows = [
        f"| {g['name']} | {g['value']} | {g['comparison'].replace('_', ' ')} {g['limit']} | {g['margin']} "
        f"| {'holds' if g['passed'] else '**does not hold**'} |"
        for g in run.gates
    ]
    page = f"http://127.0.0.1:5000/#/experiments/{run.tracker.experiment}/runs/{run.tracker.parent}"
    model = f"{run.model.name} version {run.model.version}, alias {run.model.alias}" if run.model else "not promoted"
    return "\n".join(
        [
            f"## {model}",
            "| gate | value | limit | margin | verdict |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"- recipe {run.params['recipe']}, data `{dvc.data_version(run.root)}`",
            f"- results `dvc.lock` {dvc.lock_hash(run.root)}",
            f"- MLflow parent run `{run.tracker.parent}`: [open]({page}) while `forja ui` runs",
            "- the whole run as one page: `forja report --open`",
        ]
    )


def close_dead_flow_runs(root: Path) -> None:
    """End the flow runs of this checkout that a kill left running. The caller holds the checkout's lock."""
    running = filters.FlowRunFilter(
        state=filters.FlowRunFilterState(
            type=filters.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING, StateType.PENDING])
        )
    )
    with get_client(sync_client=True) as client:
        for dead in client.read_flow_runs(flow_run_filter=running):
            if dead.parameters.get("checkout") == checkout_id(root):
                state: State[Any] = Crashed(message="its process was killed")
                mine = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[dead.id]))
                for unfinished in client.read_task_runs(flow_run_filter=mine):
                    if unfinished.state is not None and not unfinished.state.is_final():
                        client.set_task_run_state(unfinished.id, state, force=True)
                client.set_flow_run_state(dead.id, state, force=True)
