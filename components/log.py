"""How a stage says how it goes: a plain callable of (metrics, step).

Two keys are set apart from what is learnt. `progress`, in [0, 1], drives the bar. Keys that begin with `perf/` (rates,
seconds, memory) differ from run to run; they go to the tracker and never into an artifact, whose bytes are a function
of recipe, code and inputs alone.
"""

from collections.abc import Callable, Mapping

Metrics = Mapping[str, float]
Log = Callable[[Metrics, int], None]


def silent(metrics: Metrics, step: int) -> None:
    """The log of ranks other than 0."""


def lasting(metrics: Metrics) -> dict[str, float]:
    """The part of `metrics` that belongs in an artifact: everything but `progress` and `perf/...`."""
    return {k: v for k, v in metrics.items() if k != "progress" and not k.startswith("perf/")}
