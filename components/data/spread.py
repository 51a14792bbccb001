"""One function over many pieces of work: on all cores of this machine, or by datatrove on a Ray or a Slurm cluster.

What a piece of work finds it writes to files, under names that follow from the piece, so nothing depends on who does
it, where and when.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, model_validator

from components.artifact import ForjaError

WORTH = 1 << 25  # bytes; less is mostly done faster by this process alone than by several

Job = TypeVar("Job")


class Executor(BaseModel, frozen=True, extra="forbid"):
    """Who does the pieces of work. No part of a result's identity: the bytes are the same whoever does them."""

    kind: Literal["local", "ray", "slurm"]
    workers: int | None = Field(ge=1)  # pieces at a time; null: as many as there are cores, on a cluster no limit
    partition: str | None  # of Slurm
    minutes: int = Field(ge=1)  # that Slurm gives a piece
    memory_gb: int = Field(ge=1)  # that Ray or Slurm keeps for a piece

    @model_validator(mode="after")
    def _slurm_wants_a_partition(self) -> "Executor":
        if self.kind == "slurm" and self.partition is None:
            raise ValueError("kind slurm wants a partition")
        return self


HERE = Executor(kind="local", workers=None, partition=None, minutes=60, memory_gb=2)


def each(
    work: Callable[[Job], None], jobs: Iterable[Job], executor: Executor, size: int, logs: Path, worth: int = WORTH
) -> Iterator[Job]:
    """Do `work` for all jobs; yields each in its order once it is done. `size` is how many bytes there are to read:
    fewer than `worth` this process does alone; `logs` is a folder for what a cluster has to say. Raises what the first
    piece that failed raised."""
    if executor.kind != "local":
        from components.data import cluster

        every = list(jobs)
        cluster.run(work, every, executor, logs / _named(work))
        yield from every
        return
    jobs = iter(jobs)
    first = list(islice(jobs, 2))
    jobs, workers = chain(first, jobs), executor.workers or cores()
    if workers == 1 or len(first) < 2 or (executor.workers is None and size < worth):
        for job in jobs:
            work(job)
            yield job
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=die_with_parent) as pool:
        try:
            for job, future in [(job, pool.submit(work, job)) for job in jobs]:
                future.result()
                yield job
        except BrokenProcessPool:
            raise ForjaError(
                f"{_named(work)}: a process that worked on it was killed; free memory, or set executor.workers lower"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent() -> None:
    """A worker ends when whoever started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _named(work: Callable[[Any], None]) -> str:
    return getattr(work, "__name__", "work")
