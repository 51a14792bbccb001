"""Gates: what must hold before a model is promoted. Data in the recipe, judged by pure functions.

A gate compares a metric with a number or with another metric. It fails closed: a metric that is missing or not finite
does not pass. Every gate is judged, so the verdict carries all reasons and not only the first.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal

from pydantic import BaseModel, model_validator

Comparison = Literal["at_most", "at_least", "above", "below"]
COMPARISONS: tuple[Comparison, ...] = ("at_most", "at_least", "above", "below")


class Gate(BaseModel, frozen=True, extra="forbid"):
    """One condition: exactly one of the four comparisons, its limit a number or the name of another metric."""

    name: str
    metric: str
    at_most: float | str | None = None
    at_least: float | str | None = None
    above: float | str | None = None
    below: float | str | None = None

    @model_validator(mode="after")
    def _one_comparison(self) -> "Gate":
        given = [c for c in COMPARISONS if getattr(self, c) is not None]
        if len(given) != 1:
            raise ValueError(f"gate {self.name}: give exactly one of {', '.join(COMPARISONS)}, not {len(given)}")
        limit = getattr(self, given[0])
        if isinstance(limit, float) and not math.isfinite(limit):
            raise ValueError(f"gate {self.name}: the limit {limit} is not a finite number")
        return self

    @property
    def comparison(self) -> Comparison:
        return next(c for c in COMPARISONS if getattr(self, c) is not None)

    @property
    def limit(self) -> float | str:
        limit: float | str = getattr(self, self.comparison)
        return limit


class Judged(BaseModel, frozen=True):
    """A gate with what it found. `value`, `limit` and `margin` are null where the metric is missing or not finite."""

    name: str
    metric: str
    value: float | None
    comparison: Comparison
    limit: float | None
    margin: float | None
    passed: bool
    reason: str


class Verdict(BaseModel, frozen=True):
    verdict: Literal["promote", "hold"]
    gates: list[Judged]

    @property
    def reasons(self) -> list[str]:
        """Why the model is held: the reason of every gate that failed."""
        return [g.reason for g in self.gates if not g.passed]


def check(gates: Iterable[Gate], metrics: Mapping[str, float]) -> Verdict:
    """`promote` when there is a gate and every gate passes, else `hold`. A recipe without gates proves nothing."""
    judged = [judge(gate, metrics) for gate in gates]
    return Verdict(verdict="promote" if judged and all(g.passed for g in judged) else "hold", gates=judged)


def judge(gate: Gate, metrics: Mapping[str, float]) -> Judged:
    """One gate against the metrics. `margin` is signed: positive is room to spare, negative how far it falls short."""
    value, trouble = _finite(gate.metric, metrics)
    limit: float | None
    if isinstance(gate.limit, str):
        limit, limit_trouble = _finite(gate.limit, metrics)
        trouble = trouble or limit_trouble
    else:
        limit = gate.limit
    judged = partial(Judged, name=gate.name, metric=gate.metric, comparison=gate.comparison, value=value, limit=limit)
    if value is None or limit is None:
        return judged(margin=None, passed=False, reason=f"{gate.name}: {trouble}")
    margin = limit - value if gate.comparison in ("at_most", "below") else value - limit
    passed = margin > 0 if gate.comparison in ("above", "below") else margin >= 0
    against = f"{gate.limit} = {limit:.6g}" if isinstance(gate.limit, str) else f"{limit:.6g}"
    wanted = f"{gate.comparison.replace('_', ' ')} {against}"
    reason = f"{gate.name}: {gate.metric} = {value:.6g}, {'is' if passed else 'not'} {wanted}"
    return judged(margin=margin, passed=passed, reason=reason)


def _finite(metric: str, metrics: Mapping[str, float]) -> tuple[float | None, str]:
    """The metric's value, or None and why it cannot be used."""
    if metric not in metrics:
        return None, f"no metric {metric}"
    value = metrics[metric]
    if not math.isfinite(value):
        return None, f"{metric} is {value}"
    return float(value), ""
