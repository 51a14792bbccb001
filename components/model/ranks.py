"""Ranks that share one training: what each takes of a batch, and how they agree on what to do next."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

from components.artifact import ForjaError
from components.model.checkpoint import default_device as device
from components.world import world

Item = TypeVar("Item")


class Interrupted(ForjaError):
    """Training was asked to stop, and has saved where it is."""


def micro_batch(batch: int) -> int:
    """Rows of one forward pass on one rank. Raises ForjaError where they do not divide the recipe's batch exactly."""
    ranks = world()[1]
    size = int(os.environ.get("FORJA_MICRO_BATCH") or max(1, batch // ranks))
    if batch % (size * ranks):
        raise ForjaError(
            f"FORJA_MICRO_BATCH={size} on {ranks} rank(s): does not divide the batch of {batch}; choose a divisor"
        )
    return size


def split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """This rank's micro-batches of a global batch: rank r takes every ranks-th block, in order."""
    rank, ranks = world()
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    return blocks[rank::ranks]


def added_up(values: torch.Tensor) -> list[float]:
    """The numbers of a 1-D tensor, each summed over the ranks."""
    if world()[1] > 1:
        torch.distributed.all_reduce(values)
    numbers: list[float] = values.tolist()
    return numbers


def agreed(number: int) -> int:
    """Rank 0's `number`, on every rank."""
    if world()[1] == 1:
        return number
    told = torch.tensor([number], device=device())
    torch.distributed.broadcast(told, 0)
    return int(told)


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and the first SIGINT are noted instead of obeyed: what is given says the signal, or 0.

    All ranks are told the same, wherever the signal came, so they all have to ask at the same place. Only the main
    thread can take signals over; in another one nothing changes.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])  # the second one ends at once
        noted.append(number)

    def asked() -> int:
        mine = float(noted[0]) if noted else 0.0
        if world()[1] > 1:
            heard = torch.tensor([mine], device=device())
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            mine = float(heard)
        return int(mine)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(number: int, step: int, steps: int) -> Interrupted:
    """The error to end with once `step` is saved. Its exit code is the signal's."""
    error = Interrupted(f"interrupted and saved at step {step} of {steps}; the same command goes on there")
    error.exit_code = 128 + number
    return error
