"""Charts: values land where they should, ticks are round, nothing extreme is lost, words are escaped."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fastrdm.report.svg.axes import Axis, Scale, log_ticks, nice_ticks, spread, thin
from fastrdm.report.svg.line_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    PALETTE,
    TOP,
    WIDTH,
    Level,
    Line,
    Mark,
    chart,
    color_at,
    color_of,
)

SVG = "{http://www.w3.org/2000/svg}"


def points(drawing: str, color: str) -> list[list[tuple[float, float]]]:
    """The vertices of each stretch of the curves of one color."""
    paths = [p for p in ElementTree.fromstring(drawing).iter(f"{SVG}path") if p.get("stroke") == color]
    curves = [p.attrib["d"] for p in paths if p.get("stroke-width") == "1.8"]
    stretches = [s for d in curves for s in d.split("M") if s]
    return [[tuple(map(float, pair.split())) for pair in s.split("L")] for s in stretches]


def words(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.03, 0.97, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.7, -0.2, [-0.7, -0.6, -0.5, -0.4, -0.3, -0.2]),
        (0, 1437, [0, 500, 1000, 1500]),
        (4, 4, [2, 3, 4, 5, 6]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (-1e-9, 1e-9, [-1e-9, -5e-10, 0, 5e-10, 1e-9]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks, abs=1e-15)


def test_ticks_of_logarithmic_axes_are_powers_of_ten() -> None:
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(1, 60) == [1, 2, 5, 10, 20, 50]
    wide = log_ticks(1e-12, 1)
    assert len(wide) <= 7
    assert all(math.log10(t) == round(math.log10(t)) for t in wide)
    assert log_ticks(3.1, 3.2) == [3.1, 3.2]


@pytest.mark.parametrize(
    ("axis", "value", "written"),
    [
        (Axis(""), 1500.0, "1,500"),
        (Axis(""), -0.5, "\N{MINUS SIGN}0.5"),
        (Axis(""), 1e-5, "10⁻⁵"),
        (Axis(""), 2e-4, "2·10⁻⁴"),
        (Axis(""), 0.0, "0"),
        (Axis("", percent=True), 0.375, "37.5 %"),
    ],
)
def test_tick_labels(axis: Axis, value: float, written: str) -> None:
    assert Scale(axis, [0, 1], 0, 1).text(value) == written


def test_linear_values_land_in_proportion() -> None:
    drawing = chart([Line("a", [0, 5, 10], [0, 1, 4], "#123456")], Axis("x"), Axis("y"), title="t")
    ((p, q, r),) = points(drawing, "#123456")
    low, high = HEIGHT - BOTTOM, TOP
    assert p == (LEFT, low)
    assert q[0] == pytest.approx((p[0] + r[0]) / 2, abs=0.1)
    assert q[1] == pytest.approx(low + (high - low) / 4, abs=0.1)
    assert r[1] == high
    assert LEFT < r[0] < WIDTH


def test_equal_factors_are_equal_distances_on_logarithmic_axes() -> None:
    line = Line("a", [1, 10, 100], [1e-6, 1e-3, 1], "#123456")
    ((p, q, r),) = points(chart([line], Axis("x", log=True), Axis("y", log=True), title="t"), "#123456")
    assert q[0] - p[0] == pytest.approx(r[0] - q[0], abs=0.2)
    assert q[1] - p[1] == pytest.approx(r[1] - q[1], abs=0.2)
    assert (p[1], r[1]) == (HEIGHT - BOTTOM, TOP)


def test_what_cannot_be_drawn_is_a_gap() -> None:
    line = Line("a", [0, 1, 2, 3, 4, 5], [1, 2, math.nan, 3, math.inf, 4], "#123456")
    assert [len(s) for s in points(chart([line], Axis("x"), Axis("y"), title="t"), "#123456")] == [2, 1, 1]
    line = Line("a", [0, 1, 2], [1, 0, 2], "#123456")
    assert [len(s) for s in points(chart([line], Axis("x"), Axis("y", log=True), title="t"), "#123456")] == [1, 1]


def test_bands_enclose_their_line() -> None:
    line = Line("a", [0, 1], [2, 3], "#123456", low=[1, 2], high=[4, 5])
    root = ElementTree.fromstring(chart([line], Axis("x"), Axis("y"), title="t"))
    (band,) = (p.attrib["d"] for p in root.iter(f"{SVG}path") if p.get("fill-opacity"))
    corners = [tuple(map(float, pair.split())) for pair in band.strip("MZ").split("L")]
    ys = [y for _, y in corners]
    scale = Scale(Axis("y"), [1, 5], HEIGHT - BOTTOM, TOP)
    assert ys == pytest.approx([scale(4), scale(5), scale(2), scale(1)], abs=0.1)


@pytest.mark.parametrize("count", [1, 600, 601, 5000])
def test_thinning_keeps_ends_extremes_and_gaps(count: int) -> None:
    y = [math.sin(i) for i in range(count)]
    for place, value in ((count // 3, 9.0), (count // 2, -9.0), (2 * count // 3, math.nan)):
        y[place] = value
    kept = thin(y)
    assert len(kept) <= 600
    assert kept == sorted(set(kept))
    assert {0, count - 1, count // 3, count // 2, 2 * count // 3} <= set(kept)


def test_labels_are_moved_apart_in_order() -> None:
    assert spread([10, 50], 13, 0, 100) == [10, 50]
    assert spread([50, 51, 52], 13, 0, 100) == [50, 63, 76]
    assert spread([99, 98, 97], 13, 0, 100) == [100, 87, 74]
    assert spread([-5, 200], 13, 0, 100) == [0, 100]
    crowd = spread([50.0] * 20, 13, 0, 100)
    assert crowd == sorted(crowd)
    assert (min(crowd), max(crowd)) == pytest.approx((0, 100))


def test_every_word_is_there_and_none_is_markup() -> None:
    odd = '<b>"&'
    drawing = chart(
        [Line(odd, [0, 1], [1, 2], "#123456")],
        Axis(odd),
        Axis(odd),
        title=odd,
        levels=[Level(1.5, f"level {odd}")],
        marks=[Mark(0.5, "7", "#654321", odd)],
    )
    assert {odd, f"level {odd}", "7"} <= set(words(drawing))
    assert "<b>" not in drawing


def test_marks_outside_the_axis_are_left_out() -> None:
    line = Line("a", [0, 10], [1, 2], "#123456")
    drawing = chart([line], Axis("x"), Axis("y"), title="t", marks=[Mark(5, "in", "#000"), Mark(50, "out", "#000")])
    assert "in" in words(drawing)
    assert "out" not in words(drawing)


@pytest.mark.parametrize("y", [[], [math.nan], [3.0], [0.0, 0.0]])
def test_few_and_equal_values_make_a_chart(y: list[float]) -> None:
    for log in (False, True):
        drawing = chart([Line("a", list(range(len(y))), y, "#123456")], Axis("x"), Axis("y", log=log), title="t")
        assert "nan" not in re.sub(r"<title>.*?</title>", "", drawing)
        HTMLParser().feed(drawing)
        ElementTree.fromstring(drawing)


def test_words_stay_inside_the_drawing() -> None:
    lines = [Line("w" * 80, [0, 1], [i, i], "#123456") for i in range(3)]
    root = ElementTree.fromstring(chart(lines, Axis("x"), Axis("y"), title="t"))
    for element in root.iter(f"{SVG}text"):
        width = 5.9 * len(element.text or "")
        start = (
            float(element.attrib["x"]) - {"start": 0, "middle": width / 2, "end": width}[element.attrib["text-anchor"]]
        )
        assert start >= 0
        assert start + width <= WIDTH


def test_colors_tell_many_runs_apart_and_time_runs_from_light_to_dark() -> None:
    assert len({color_of(i) for i in range(21)}) == 21
    assert color_of(0) == (PALETTE[0], "")
    brightness = [sum(bytes.fromhex(color_at(i / 10)[1:])) for i in range(11)]
    assert brightness == sorted(brightness, reverse=True)
