"""Pieces of work by datatrove's executors: on a Ray cluster, or on this machine where there is none, or by Slurm.

Every machine sees the checkout, the data and the virtual environment under the same paths. datatrove notes which
pieces are done; its logs, and of Slurm the script, stay where the stage works until it ends well.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.artifact import ForjaError

ROOT = Path(__file__).parents[2]  # what the machines import
POLL = 2  # seconds between two looks at what Slurm has done


class Piece(NamedTuple):
    """The one step of datatrove's pipeline: task number `rank` does that job."""

    work: Callable[[Any], None]
    jobs: Sequence[Any]
    errors: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        try:
            self.work(self.jobs[rank])
        except ForjaError as e:
            (self.errors / f"{rank:05d}").write_text(str(e), encoding="utf-8")
            raise


def run(work: Callable[[Any], None], jobs: Sequence[Any], executor: Any, logs: Path) -> None:
    """Do `work` for all jobs. Raises the ForjaError of the first that raised one, or one that names the logs."""
    for module in ("datatrove", *(["ray"] if executor.kind == "ray" else [])):
        if importlib.util.find_spec(module) is None:
            raise ForjaError(f"executor.kind: {executor.kind} needs {module}; run `pip install forja[cluster]`")
    if not jobs:
        return
    (logs / "errors").mkdir(parents=True)
    from datatrove.utils.logging import logger

    logger.remove()  # what it says stands in its own files
    step = Piece(work, jobs, logs / "errors")
    limits = {"tasks": len(jobs), "workers": executor.workers or -1, "mem_per_cpu_gb": executor.memory_gb}
    done = _ray(step, logs, limits) if executor.kind == "ray" else _slurm(step, logs, limits, executor)
    for error in sorted((logs / "errors").iterdir()):
        raise ForjaError(error.read_text(encoding="utf-8"))
    if not done:
        raise ForjaError(f"executor.kind: {executor.kind} left pieces undone; see {logs}, and give them more memory_gb")


def _ray(step: Piece, logs: Path, limits: dict[str, Any]) -> bool:
    """RAY_ADDRESS names the cluster; without it Ray begins one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from datatrove.executor import RayPipelineExecutor

    if not ray.is_initialized():
        paths = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=paths)
    pipeline = RayPipelineExecutor([step], logging_dir=str(logs), **limits)
    pipeline.run()
    return not pipeline.get_incomplete_ranks()


def _slurm(step: Piece, logs: Path, limits: dict[str, Any], executor: Any) -> bool:
    """Submit an array of tasks, and wait for it."""
    pipeline = slurm_pipeline(step, logs, limits, executor)
    try:
        pipeline.run()
    except FileNotFoundError:
        raise ForjaError("executor.kind: slurm, but there is no sbatch; run forja where jobs are submitted") from None
    except subprocess.CalledProcessError as e:
        raise ForjaError(
            f"executor.kind: sbatch refused {logs / 'launch_script.slurm'} (exit {e.returncode})"
        ) from None
    while pipeline.get_incomplete_ranks():
        asked = subprocess.run(["squeue", "-h", "-j", str(pipeline.job_id)], check=False, capture_output=True)  # noqa: S603, S607
        if not asked.stdout.strip():
            break  # nothing waits or runs any more: what is undone stays so
        time.sleep(POLL)
    return not pipeline.get_incomplete_ranks()


def slurm_pipeline(step: Piece, logs: Path, limits: dict[str, Any], executor: Any) -> Any:
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        [step],
        time=str(executor.minutes),
        partition=executor.partition,
        job_name="forja",
        qos="",
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}:$PYTHONPATH"',
        logging_dir=str(logs),
        requeue=False,
        **limits,
    )
