"""What a person sees in the terminal: a bar for the stage that runs, plain lines where there is no terminal, tables."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from components.log import Log, Metrics

PLAIN_EVERY = 5.0  # seconds between two lines where there is no terminal
LEADING = ("loss", "reward", "accuracy", "kl")
KEY_METRICS = {
    "pretrain": "val_loss",
    "sft": "val_loss",
    "reward": "val_accuracy",
    "referee": "val_accuracy",
    "ppo": "val_reward",
    "evaluate": "ppo.bits_per_byte",
}
console = Console(highlight=False)


@contextmanager
def stage_progress(name: str) -> Iterator[Log]:
    """Yields a log that shows a stage's rows: a bar in a terminal, else a line at most every few seconds."""
    if console.is_terminal:
        with _bar(name) as log:
            yield log
    else:
        yield _lines(name)


@contextmanager
def _bar(name: str) -> Iterator[Log]:
    columns = [TextColumn("{task.description:<9}"), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[words]}"), console=console, transient=True) as bar:
        task = bar.add_task(name, total=None, words="")
        left = _TimeLeft()

        def log(metrics: Metrics, step: int) -> None:
            if "progress" in metrics:
                bar.update(task, total=1.0, completed=metrics["progress"])
            bar.update(task, words=_words(metrics, step, left(metrics)))

        yield log


def _lines(name: str) -> Log:
    left, last = _TimeLeft(), time.monotonic()

    def log(metrics: Metrics, step: int) -> None:
        nonlocal last
        words = _words(metrics, step, left(metrics))
        if time.monotonic() - last >= PLAIN_EVERY:
            last = time.monotonic()
            print(f"{name}: {words}", flush=True)

    return log


class _TimeLeft:
    """Seconds left, from the progress made since the first row: a resumed stage does not begin at 0."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def __call__(self, metrics: Metrics) -> float | None:
        if "progress" not in metrics:
            return None
        now, progress = time.monotonic(), metrics["progress"]
        if self.first is None:
            self.first = (now, progress)
        begun, start = self.first
        return (now - begun) / (progress - start) * (1 - progress) if progress > start else None


def _words(metrics: Metrics, step: int, left: float | None) -> str:
    said = [f"step {step}"]
    said += [f"{key} {metrics[key]:.4g}" for key in LEADING if key in metrics]
    for key, value in metrics.items():
        if key.startswith("perf/") and key.endswith("_per_s"):
            said.append(f"{value:,.0f} {key.removeprefix('perf/').removesuffix('_per_s')}/s")
    if "progress" in metrics and not console.is_terminal:
        said.append(f"{metrics['progress']:.0%}")
    if left is not None:
        said.append(f"{clock(left)} left")
    return ", ".join(said)


def clock(seconds: float | None) -> str:
    """`0:07`, `12:03`; a dash where it is not known."""
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def fail(text: str) -> None:
    """A user's mistake or a stage's failure, on stderr."""
    for line in text.splitlines():
        print(f"forja: {line}", file=sys.stderr)


def summary(stages: list[dict[str, Any]], gates: list[dict[str, Any]]) -> None:
    """The table of stages and the table of gates at the end of a run."""
    table = Table("stage", "state", "time", "peak memory", "key metric", title="Stages")
    for stage in stages:
        memory = stage.get("peak_memory_mb")
        table.add_row(
            stage["name"],
            stage["state"],
            clock(stage.get("seconds")),
            f"{memory:,.0f} MB" if memory else "-",
            key_metric(stage["name"], stage.get("metrics") or {}),
        )
    console.print(table)
    if gates:
        console.print(gate_table(gates))


def gate_table(gates: list[dict[str, Any]]) -> Table:
    table = Table("gate", "value", "", "limit", "margin", "verdict", title="Gates")
    for gate in gates:
        numbers = [_number(gate[k]) for k in ("value", "limit", "margin")]
        verdict = "[green]holds[/]" if gate["passed"] else "[red]does not hold[/]"
        table.add_row(gate["name"], numbers[0], gate["comparison"].replace("_", " "), *numbers[1:], verdict)
    return table


def key_metric(stage: str, metrics: Mapping[str, float]) -> str:
    """The number to look at first: the stage's own choice, or its first metric."""
    key = KEY_METRICS.get(stage)
    if key not in metrics:
        key = min(metrics, default=None)
    return f"{key} {metrics[key]:.4g}" if key else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
