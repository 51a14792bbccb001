import math
import re

import pytest

from pipelines.charts import Edge, Node, Series, binned, line_chart, lineage_chart, number, ticks


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.83, 7.1, 4) == [2, 4, 6]
    assert ticks(-0.0101, 0.0105, 4) == [-0.01, 0, 0.01]  # 0.005 would make more than four steps
    assert ticks(-0.01, 0.01, 4) == [-0.01, -0.005, 0, 0.005, 0.01]


def test_bins_keep_mean_and_range() -> None:
    points = [(float(i), float(i % 2)) for i in range(8)]
    assert binned(points, 8) == [(x, y, y, y) for x, y in points]
    assert binned(points, 2) == [(1.5, 0.5, 0.0, 1.0), (5.5, 0.5, 0.0, 1.0)]


def test_a_line_goes_where_its_values_are() -> None:
    drawn = line_chart("t", [Series("a", [(0, 0), (1, 1), (2, math.nan)]), Series("none", [])])
    found = re.search(r'class="line c0" d="M(\S+) (\S+?)L(\S+) (\S+?)"', drawn)
    x0, y0, x1, y1 = map(float, found.groups())  # type: ignore[union-attr]
    assert (x0, x1) == (62, 468) and y0 > y1  # from edge to edge, and up, for SVG counts y downwards
    assert "none" not in drawn and "nan" not in drawn
    assert "No values yet." in line_chart("t", [Series("a", [(0, math.inf)])])
    assert line_chart("t", [Series("flat", [(3, 5)])])
    steps = line_chart("t", [Series("a", [(1, 5), (3, 9)])])
    assert re.findall(r'class="tick mid"[^>]*>([^<]+)<', steps) == ["1", "2", "3"]


def test_drawn_text_is_escaped() -> None:
    assert "<b>" not in line_chart("<b>", [Series("<b>", [(0, 1), (1, 2)])], "<b>")
    assert "<b>" not in lineage_chart([Node("<b>", "<b>", True), Node("b", "", False)], [Edge(0, 1, True)])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (math.nan, "–"),
        (1234567.0, "1,234,567"),
        (0.012345, "0.01235"),
        (2.104, "2.104"),
        (1e-5, "1.0e-05"),
    ],
)
def test_numbers(value: float | None, said: str) -> None:
    assert number(value) == said
