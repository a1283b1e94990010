"""Pairs of values as a drawing: what is where, and what cannot be drawn."""

import math
import re
from xml.etree import ElementTree

from fastrdm.report.svg.axes import Axis
from fastrdm.report.svg.dumbbell_chart import Pair, dumbbells


def circles(svg: str) -> list[tuple[float, float, str]]:
    """(x, y, fill) of each."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("fill", "")) for c in found]


def test_a_pair_is_a_ring_and_a_disc_in_order() -> None:
    pairs = [Pair("a", 1.0, 10.0, "#111111"), Pair("", 10.0, 1.0, "#222222"), Pair("b", 1.0, 1.0, "#333333")]
    drawn = circles(dumbbells(pairs, Axis("value", log=True), title="t"))
    (ring, y, white), (disc, same, fill) = drawn[:2]
    assert (white, fill, y) == ("#fff", "#111111", same)
    assert ring < disc and drawn[2][0] == disc and drawn[3][0] == ring
    assert drawn[2][1] - y < drawn[4][1] - drawn[2][1], "pairs of one row lie closer than rows"


def test_words_are_escaped_and_the_page_is_as_high_as_its_rows() -> None:
    few, many = (dumbbells([Pair("<a>", 0.0, 1.0, "#111111")] * n, Axis("<x>"), title="<t>") for n in (1, 9))
    heights = [float(re.search(r'viewBox="0 0 640 (\d+)"', svg)[1]) for svg in (few, many)]  # type: ignore[index]
    assert heights[1] - heights[0] == 8 * 18
    assert "<a>" not in few and "<x>" not in few and "<t>" not in few


def test_what_has_no_place_is_left_out() -> None:
    svg = dumbbells(
        [Pair("a", 0.0, 2.0, "#1"), Pair("b", math.nan, 2.0, "#2"), Pair("c", 1.0, 2.0, "#3")],
        Axis("", log=True),
        title="",
    )
    assert len(circles(svg)) == 2
    assert len(circles(dumbbells([], Axis(""), title=""))) == 0
