"""Competitors side by side: one process each, taking turns, so that what else runs on the machine hits all alike.

A contender is a child process that calls `turns()`; the parent starts them with `begin` and lets each take its turn
with `take`. Compared is the mean of each one's fastest tenth: on busy cores a step is slowed tenfold now and then, and
never made faster.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

Contender = subprocess.Popen[str]


def turns() -> Iterator[None]:
    """In a child: yields once a step, when it is this one's turn. Standard output is kept for the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    print("ready", file=answers)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            yield
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), file=answers)


def begin(script: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Contender:
    """Start a contender and wait until it is ready: start-up is not compared."""
    child = subprocess.Popen(  # noqa: S603
        [sys.executable, script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    answer = child.stdout.readline() if child.stdout else ""
    if answer != "ready\n":
        child.wait()
        raise SystemExit(f"{script} {' '.join(arguments)}: ended with {child.returncode} before its first turn")
    return child


def take(child: Contender, steps: int) -> list[float]:
    """The seconds of each of the next `steps` steps."""
    assert child.stdin and child.stdout  # noqa: S101
    print(steps, file=child.stdin, flush=True)
    answer = child.stdout.readline()
    if not answer:
        raise SystemExit(f"{child.args}: ended with {child.wait()}")
    seconds: list[float] = json.loads(answer)
    return seconds


def end(children: Sequence[Contender]) -> None:
    for child in children:
        if child.stdin:
            child.stdin.close()  # the turns are over, and with them the child
    for child in children:
        child.wait()


def fastest(seconds: Sequence[float]) -> float:
    """The mean of the fastest tenth (at least one)."""
    best = sorted(seconds)[: max(1, len(seconds) // 10)]
    return sum(best) / len(best)


def forja_environment() -> None:
    """What the command `forja` sets before torch is loaded."""
    from pipelines.checkout import set_environment

    set_environment()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
