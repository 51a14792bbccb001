"""The runner: one stage, from verified inputs to a sealed folder. `forja stage NAME`, as dvc.yaml calls it.

What a stage learns goes into its artifact; when and how fast it went goes to .forja/stages/<stage>-<fingerprint>/:
spool.jsonl, one row a call of `log`, and run.json. The tracker reads both, in another process or another day.
"""

import importlib
import json
import math
import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from pydantic import ValidationError

from components.artifact import RECORD, ForjaError, building, read_record, to_json, write_atomic, write_record
from components.data.spread import Executor
from components.log import Log, Metrics, lasting
from pipelines import dvc, ranks
from pipelines.checkout import home
from pipelines.child import die_with_parent
from pipelines.console import stage_progress
from pipelines.identity import MODULES, code_hashes, write_code_yaml
from pipelines.recipe import complaints

Row = dict[str, float]


def run_stage(root: Path, name: str) -> None:
    """Run one stage, or `code`. Raises ForjaError for what the user can mend; other errors keep their traceback."""
    die_with_parent(0 if "DVC_STAGE" in os.environ and os.getppid() == 1 else os.getppid())
    if name == "code":
        write_code_yaml(root, dvc.sources(root, dvc.read_yaml(root / "params.yaml")))
        return
    if name == "ingest":
        from pipelines.snapshot import fetch_or_ingest  # it logs as a stage does, by this module

        fetch_or_ingest(root, dvc.section(root, name))
        return
    job = _prepared(root, name)
    if ranks.is_helper():
        with ranks.failure_noted(job.diary):
            ranks.help_along(job.module.run, job.cfg, job.arguments)
        return
    job.scratch.mkdir(parents=True, exist_ok=True)
    if ranks.is_launched():
        with ranks.failure_noted(job.diary):
            _build(job)
        return
    if takes_scratch(job.module):
        ranks.say_what_is_not_cut(name)
    open_diary(job.diary, name, job.mark, dvc.data_version(root), resumed=any(job.scratch.iterdir()))
    try:
        if takes_scratch(job.module) and ranks.wanted() > 1:
            ranks.launch(root, name, job.diary)
        else:
            _build(job)
    except BaseException as e:
        reason = str(e) if isinstance(e, ForjaError) else f"{type(e).__name__}: {e}"
        close_diary(job.diary, "failed", reason=reason, exit_code=getattr(e, "exit_code", 1))
        raise
    write_atomic(job.diary / "record.json", (job.out / "record.json").read_text(encoding="utf-8"))
    close_diary(job.diary, "finished")
    shutil.rmtree(job.scratch)


class Job(NamedTuple):
    """A stage that is ready to run: its recipe holds, and every input is whole."""

    name: str
    module: Any
    cfg: Any
    identity: dict[str, Any]  # what its record says of it: config, code, inputs
    mark: str
    arguments: dict[str, Any]
    scratch: Path
    diary: Path
    out: Path


def _prepared(root: Path, name: str) -> Job:
    folders = dvc.inputs_of(root, name)
    module = importlib.import_module(MODULES[name])
    try:
        cfg = module.Config.model_validate(dvc.section(root, name))
    except ValidationError as e:
        raise ForjaError("\n".join(f"params.yaml: {c}" for c in complaints(e, name, module.Config))) from None
    for folder in folders.values():
        read_record(folder)
    sources = dvc.source_of(root, name, dvc.section(root, name))
    for source in sources.values():
        if (source / RECORD).is_file():
            read_record(source)
    executor = {}
    if "executor" in module.run.__annotations__:
        executor["executor"] = Executor.model_validate(dvc.section(root, "executor"))  # checked by the recipe
    config = cfg.model_dump(mode="json")
    code = code_hashes(root)[name]
    mark, inputs = dvc.identify(root, name, config, code)
    scratch = root / "scratch" / f"{name}-{mark}"
    return Job(
        name,
        module,
        cfg,
        {"config": config, "code": code, "inputs": inputs},
        mark,
        {**folders, **sources, **({"scratch": scratch} if takes_scratch(module) else {}), **executor},
        scratch,
        diary_of(root, name, mark),
        root / "artifacts" / name,
    )


def _build(job: Job) -> None:
    """The artifact, from the stage's own function, sealed."""
    with building(job.out) as temporary, logging_to(job.diary, job.name) as log:
        metrics = job.module.run(job.cfg, **job.arguments, out=temporary, log=log)
        if rows := curves(job.diary):
            text = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
            (temporary / "curves.jsonl").write_text(text, encoding="utf-8")
        (temporary / "metrics.json").write_text(to_json(metrics), encoding="utf-8")
        write_record(temporary, job.name, **job.identity, metrics=metrics)


def takes_scratch(module: Any) -> bool:
    return "scratch" in module.run.__annotations__


def diary_of(root: Path, stage: str, mark: str) -> Path:
    """Where the times, rates and tracker ids of the result with fingerprint `mark` are kept."""
    return home(root) / "stages" / f"{stage}-{mark}"


def read_run(diary: Path) -> dict[str, Any]:
    """run.json, or an empty mapping where there is none."""
    with suppress(FileNotFoundError):
        run: dict[str, Any] = json.loads((diary / "run.json").read_bytes())
        return run
    return {}


def update_run(diary: Path, **changes: Any) -> None:
    """Change fields of run.json, whole or not at all."""
    write_atomic(diary / "run.json", to_json({**read_run(diary), **changes}))


def open_diary(diary: Path, stage: str, mark: str, data_version: str | None, resumed: bool) -> None:
    """Begin run.json. A run that starts afresh starts an empty spool; a resumed one goes on with it."""
    diary.mkdir(parents=True, exist_ok=True)
    if not resumed:
        (diary / "spool.jsonl").unlink(missing_ok=True)
    run = {
        "stage": stage,
        "fingerprint": mark,
        "data_version": data_version,
        "started": psutil.Process().create_time(),  # imports count: they are part of what a person waits for
        "ended": None,
        "seconds": None,
        "peak_memory_mb": None,
        "status": "running",
        "pid": os.getpid(),
        "attempt": os.environ.get("FORJA_ATTEMPT"),
        "prefect_flow_run_id": os.environ.get("FORJA_FLOW_RUN"),
        "prefect_task_run_id": os.environ.get("FORJA_TASK_RUN"),
        "mlflow_run_id": None,
        "reported": False,
    }
    write_atomic(diary / "run.json", to_json(run))


def close_diary(diary: Path, status: str, **more: Any) -> None:
    """End run.json: how long it took, and the most memory that this process or a child of it held."""
    run = read_run(diary)
    kilobytes = max(_own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    ended = time.time()
    seconds = ended - run["started"]
    update_run(diary, status=status, ended=ended, seconds=seconds, peak_memory_mb=kilobytes / 1024, **more)


def _own_peak() -> int:
    """Kilobytes. Not getrusage's on Linux: that starts with what the parent held when it started this process."""
    with suppress(FileNotFoundError):
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def logging_to(diary: Path, stage: str) -> Iterator[Log]:
    """A log that appends to the spool and shows progress."""
    with (diary / "spool.jsonl").open("a", encoding="utf-8", buffering=1) as spool, stage_progress(stage) as show:
        if spool.tell():
            spool.write("\n")  # a row cut by a crash must not swallow the next one

        def log(metrics: Metrics, step: int) -> None:
            row = {"t": time.time(), "step": step, **{k: float(v) for k, v in metrics.items()}}
            spool.write(json.dumps(row, sort_keys=True) + "\n")
            show(metrics, step)

        yield log


def read_spool(diary: Path, offset: int = 0) -> tuple[list[Row], int]:
    """The whole rows after byte `offset`, and the offset after them. A row cut by a crash is passed over."""
    with suppress(FileNotFoundError), (diary / "spool.jsonl").open("rb") as f:
        f.seek(offset)
        whole, _, _ = f.read().rpartition(b"\n")
        rows = []
        for line in whole.split(b"\n") if whole else []:
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows, offset + len(whole) + bool(whole)
    return [], offset


def curves(diary: Path) -> list[Row]:
    """The spool's lasting metrics, one row a step in the order of steps; what a resumed run said last holds."""
    merged: dict[float, Row] = {}
    for row in read_spool(diary)[0]:
        step = row.pop("step")
        del row["t"]
        if kept := {k: v for k, v in lasting(row).items() if math.isfinite(v)}:
            merged.setdefault(step, {"step": step}).update(kept)
    return [merged[step] for step in sorted(merged)]
