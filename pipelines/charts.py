"""Charts and the lineage picture as inline SVG, drawn here: no script, no library, nothing to load.

Colours and fonts are classes that the page's style sheet fills in, so one drawing serves light, dark and print. Every
text passes through `Markup.format`, which escapes: names and numbers come from files and are not trusted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

Scale = Callable[[float], float]  # a value to its place in the drawing

WIDTH, HEIGHT = 480, 236
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 32, 30
SLOTS = 160  # points drawn per line; a longer curve is averaged in bins and its range shown as a band
TIPS = 40  # columns that answer to the pointer


class Series(NamedTuple):
    """One line of a chart: points are (step, value), both finite, in step order."""

    name: str
    points: list[tuple[float, float]]


class Node(NamedTuple):
    """One box of the lineage: a name, a line of identities, and whether it exists (`made`) or is still to come."""

    name: str
    detail: str
    made: bool


class Edge(NamedTuple):
    """`source` went into `target` (both are node numbers, source < target); `true` if its bytes are still the same."""

    source: int
    target: int
    true: bool


class _Bin(NamedTuple):
    x: float
    y: float
    low: float
    high: float


def number(value: float | None, digits: int = 4) -> str:
    """A number for reading: 1,234,567; 0.01235; 1.2e-05; an en dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]; needs low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def binned(points: list[tuple[float, float]], slots: int = SLOTS) -> list[_Bin]:
    """Points averaged in at most `slots` equal spans of x, with the lowest and highest value of each span."""
    if len(points) <= slots:
        return [_Bin(x, y, y, y) for x, y in points]
    start, span = points[0][0], (points[-1][0] - points[0][0]) or 1.0
    groups: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        groups.setdefault(min(slots - 1, int((x - start) / span * slots)), []).append((x, y))
    return [
        _Bin(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g), min(y for _, y in g), max(y for _, y in g))
        for _, g in sorted(groups.items())
    ]


def line_chart(title: str, series: list[Series], note: str = "", along: str = "step") -> Markup:
    """A figure with up to three lines over steps, or whatever runs `along` it in whole numbers.

    Series without points are left out; with none, a plain remark.
    """
    series = [Series(s.name, [p for p in s.points if math.isfinite(p[0] + p[1])]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return Markup(
            '<figure class="chart"><figcaption>{}</figcaption><p class="gap">No values yet.</p></figure>'
        ).format(title)
    lines = [binned(s.points) for s in series]
    x_low, x_high = _span([b.x for line in lines for b in line], 0)
    y_low, y_high = _span([v for line in lines for b in line for v in (b.low, b.high)], 0.06)

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_grid(px, py, (x_low, x_high), (y_low, y_high))]
    legend = LEFT
    for i, (s, line) in enumerate(zip(series, lines, strict=True)):
        parts.append(_line(i, line, px, py))
        key = Markup('<path class="line c{}" d="M{} 16h18"/><text x="{}" y="20">{}</text>')
        parts.append(key.format(i, legend, legend + 23, s.name))
        legend += 40 + 9 * len(s.name)
    parts.append(_tips(series, px, py, along))
    said = "; ".join(f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    last = number(max(s.points[-1][0] for s in series))
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}, by {} up to {}: {}">{}</svg>'
        '<p class="note">{}</p></figure>'
    ).format(title, WIDTH, HEIGHT, title, along, last, said, Markup("").join(parts), note)


def bar(value: float, whole: float, css: str = "c0") -> Markup:
    """A horizontal bar for a table cell: `value` of `whole`, both at least 0."""
    share = min(100.0, 100.0 * value / whole) if whole > 0 else 0.0
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="rail" width="100" height="8"/><rect class="{}" width="{:.2f}" height="8"/></svg>'
    ).format(css, share)


def lineage_chart(nodes: list[Node], edges: list[Edge]) -> Markup:
    """The chain as boxes from top to bottom; neighbours are joined below the box, the rest by arcs on the right.

    A dashed edge means that the source has changed since the target was made from it.
    """
    row, box, wide, margin = 66, 46, 560, 2
    full = wide + 28 + 15 * max((e.target - e.source for e in edges), default=1)
    parts = []
    for e in sorted(edges, key=lambda e: e.source - e.target):
        css = "edge" if e.true else "edge old"
        if e.target == e.source + 1:
            top = e.source * row + box + margin
            path = f"M{wide / 2:g} {top}V{top + row - box - 5}"
        else:
            # Arcs that end in one box arrive in the order of their length, so that none crosses another there.
            into = sorted(o.target - o.source for o in edges if o.target == e.target and o.target != o.source + 1)
            y1 = e.source * row + margin + box * 0.62
            y2 = e.target * row + margin + 8 + (box - 14) * into.index(e.target - e.source) / max(1, len(into))
            x = wide + 16 + 15 * (e.target - e.source)
            path = f"M{wide} {y1:.1f}C{x} {y1:.1f} {x} {y2:.1f} {wide + 7} {y2:.1f}"
        parts.append(Markup('<path class="{}" d="{}" marker-end="url(#arrow)"/>').format(css, path))
    for i, node in enumerate(nodes):
        y = i * row + margin
        parts.append(
            Markup(
                '<g class="{}"><rect x="{}" y="{}" width="{}" height="{}" rx="7"/>'
                '<text class="name" x="18" y="{}">{}</text><text class="id" x="18" y="{}">{}</text></g>'
            ).format(
                "node" if node.made else "node none",
                margin,
                y,
                wide - margin,
                box,
                y + 19,
                node.name,
                y + 36,
                node.detail,
            )
        )
    said = ", then ".join(n.name for n in nodes)
    return Markup(
        '<svg class="lineage" viewBox="0 0 {} {}" role="img" aria-label="From data to model: {}"><defs>'
        '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>{}</svg>'
    ).format(full, len(nodes) * row - (row - box) + 2 * margin, said, Markup("").join(parts))


def _span(values: list[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _line(i: int, line: list[_Bin], px: Scale, py: Scale) -> Markup:
    """One line, the band of its range where it is averaged, and dots where points are few."""
    parts = []
    if any(b.high > b.low for b in line):
        rim = [(px(b.x), py(b.high)) for b in line] + [(px(b.x), py(b.low)) for b in reversed(line)]
        parts.append(Markup('<path class="band c{}" d="{}Z"/>').format(i, _path(rim)))
    parts.append(Markup('<path class="line c{}" d="{}"/>').format(i, _path([(px(b.x), py(b.y)) for b in line])))
    if len(line) <= 24:
        dot = Markup('<circle class="dot c{}" cx="{}" cy="{}" r="2.6"/>')
        parts += [dot.format(i, px(b.x), py(b.y)) for b in line]
    return Markup("").join(parts)


def _grid(px: Scale, py: Scale, x_span: tuple[float, float], y_span: tuple[float, float]) -> Markup:
    parts = []
    marks = ticks(*y_span, count=4)
    places = max(0, -math.floor(math.log10(marks[1] - marks[0]))) if len(marks) > 1 else 3
    for y in marks:
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/><text class="tick end" x="{}" y="{}">{}</text>').format(
                LEFT, py(y), WIDTH - RIGHT, LEFT - 7, py(y) + 4, f"{y:,.{places}f}" if abs(y) < 1e5 else number(y)
            )
        )
    for x in ticks(*x_span, count=5):
        if x != int(x):  # there is no half step
            continue
        parts.append(Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(px(x), HEIGHT - 9, number(x)))
    return Markup("").join(parts)


def _tips(series: list[Series], px: Scale, py: Scale, along: str) -> Markup:
    """Invisible columns; the one under the pointer shows its place and each line's nearest value, by style alone."""
    steps = sorted({x for s in series for x, _ in s.points})
    steps = steps[:: max(1, math.ceil(len(steps) / TIPS))]
    parts = []
    for i, step in enumerate(steps):
        left = LEFT if i == 0 else (px(steps[i - 1]) + px(step)) / 2
        right = WIDTH - RIGHT if i == len(steps) - 1 else (px(step) + px(steps[i + 1])) / 2
        near = [min(s.points, key=lambda p: abs(p[0] - step)) for s in series]
        said = [Markup('<tspan class="c{}">{}</tspan>').format(k, number(y)) for k, (_, y) in enumerate(near)]
        said = [Markup("{} {}").format(along, number(step)), *said]
        dots = [
            Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3.4"/>').format(k, px(x), py(y))
            for k, (x, y) in enumerate(near)
        ]
        parts.append(
            Markup(
                '<g class="hit"><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"/><g>'
                '<path class="rule" d="M{} {}V{}"/>{}<text class="end" x="{}" y="20">{}</text></g></g>'
            ).format(
                *(left, TOP, right - left, HEIGHT - TOP - BOTTOM),
                *(px(step), TOP, HEIGHT - BOTTOM),
                *(Markup("").join(dots), WIDTH - RIGHT, Markup(" · ").join(said)),
            )
        )
    return Markup("").join(parts)
