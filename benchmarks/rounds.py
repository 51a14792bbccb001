"""Competitors side by side: one process each, taking turns, so that what else runs on the machine hits all alike.

A contender is a child process that takes its `Turns`; the parent starts them with `begin` and lets each take steps with
`take`. Compared is the mean of each one's fastest tenth: on busy cores a step is slowed tenfold now and then, and never
made faster.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

Contender = subprocess.Popen[str]


class Turns:
    """In a child: `while turns.begin(): ...; turns.end()`. Standard output is kept for the answers."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to standard error
        self.left, self.started, self.seconds = 0, 0.0, list[float]()
        self.tell("ready")

    def begin(self) -> bool:
        """Wait until it is this one's turn; False when the parent has heard enough."""
        if not self.left:
            line = sys.stdin.readline()
            if not line:
                return False
            self.left, self.seconds = int(line), []
        self.started = time.perf_counter()
        return True

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.left -= 1
        if not self.left:
            self.tell(self.seconds)

    def tell(self, answer: Any) -> None:
        print(json.dumps(answer), file=self.answers)


def begin(script: str, arguments: Sequence[str], python: str = sys.executable) -> Contender:
    """Start a contender and wait until it is ready: start-up is not compared."""
    child = subprocess.Popen(  # noqa: S603
        [python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    heard(child)
    return child


def take(child: Contender, steps: int) -> list[float]:
    """The seconds of each of the next `steps` steps."""
    print(steps, file=child.stdin, flush=True)
    seconds: list[float] = heard(child)
    return seconds


def heard(child: Contender) -> Any:
    """The child's next answer."""
    answer = child.stdout.readline() if child.stdout else ""
    if not answer:
        raise SystemExit(f"{child.args}: ended with {child.wait()}")
    return json.loads(answer)


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
