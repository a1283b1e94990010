"""What a chart holds for the script that draws it: nothing extreme is lost, what has no place is a gap."""

import json
import math

import pytest

from fastrdm.report.chart import (
    Axis,
    Chart,
    Figure,
    Level,
    Line,
    as_tree,
    color_at,
    color_of,
    html,
    table,
    thin,
    to_json,
)


@pytest.mark.parametrize("count", [1, 600, 601, 5000])
def test_thinning_keeps_ends_extremes_and_gaps(count: int) -> None:
    y = [math.sin(i) for i in range(count)]
    for place, value in ((count // 3, 9.0), (count // 2, -9.0), (2 * count // 3, math.nan)):
        y[place] = value
    kept = thin(y)
    assert len(kept) <= 600
    assert kept == sorted(set(kept))
    assert {0, count - 1, count // 3, count // 2, 2 * count // 3} <= set(kept)


def test_what_cannot_be_drawn_is_a_gap() -> None:
    line = Line("a", [0, 1, 2, 3], [1, math.nan, math.inf, 0.123456789], "run0")
    (drawn,) = as_tree(Chart([line], Axis("x"), Axis("y")))["lines"]
    assert (drawn["x"], drawn["y"]) == ([0, 1, 2, 3], [1, None, None, 0.123457])
    line = Line("a", [0, 1, 10], [3, 0, -1], "run0", low=[2, -1, -2], high=[4, 1, 1])
    (drawn,) = as_tree(Chart([line], Axis("x", log=True), Axis("y", log=True)))["lines"]
    assert (drawn["x"], drawn["y"], drawn["low"], drawn["high"]) == ([1, 10], [None, None], [None, None], [1, 1])
    assert as_tree(Chart([], Axis("x"), Axis("y"), levels=[Level(math.nan, "none")]))["levels"] == []


def test_no_word_ends_the_script_that_holds_the_data() -> None:
    held = to_json({"label": "</script><b>&"})
    assert "<" not in held and json.loads(held) == {"label": "</script><b>&"}


def test_words_of_figures_and_tables_are_escaped() -> None:
    charts: list[dict[str, object]] = []
    shown = html(Figure("<t>", "<c>", Chart([], Axis(""), Axis("")), run=2), charts) + html(
        Figure("<t>", "<c>"), charts
    )
    assert "<t>" not in shown and "<c>" not in shown
    assert 'data-run="2"' in shown and len(charts) == 1 and "class=missing" in shown
    assert "<h>" not in table(["<h>"], [["cell"]])


def test_colors_tell_many_runs_apart() -> None:
    assert len({color_of(i) for i in range(21)}) == 21
    assert [color_at(share) for share in (-1, 0.25, 2)] == ["time0.000", "time0.250", "time1.000"]
