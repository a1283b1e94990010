"""The report in a browser: charts are drawn and legible, values under the pointer, runs that hide, light and dark."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION
from fastrdm.report.page import write

from .browser import ask, needs_chromium

pytestmark = needs_chromium
BRANCHES = [f"{b}/{c}/batch" for b in ("online", "target") for c in (CENTERED_CONVENTION, HEADLINE_CONVENTION)]


def make(folder: Path, end: int) -> Path:
    """A run that ends at an epoch, with an alarm at epoch 2."""
    folder.mkdir()
    head = {"step": 0, "epoch": 0, "time": 0.0, "knn_raw_pixels": 0.5, "knn_random_encoder": 0.25}
    lines: list[dict[str, Any]] = [head]
    for i in range(1, 10 * end):
        ranks = {key: 1 + 40 / i for key in BRANCHES}
        lines.append({"step": i, "epoch": i / 10, "time": float(i), "loss": 1 / i, "images_per_second": 9.0, **ranks})
    lines.append({"step": 10 * end, "epoch": end, "time": 99.0, "knn": 0.625})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alarm = {"step": 20, "epoch": 2, "alarm": "dimensional_collapse", "tap": "target", "text": "rank below 2"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write([make(folder / "long", 8), make(folder / "short", 3)], folder / "page.html")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_charts_are_drawn_inside_the_page_in_its_colors(page: Path, width: int, dark: bool) -> None:
    answer = json.loads(
        ask(
            page,
            """const shown = [...document.querySelectorAll(".chart")].filter(c => !c.closest("details"));
            const data = c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data];
            answer = JSON.stringify({
              charts: shown.length, drawn: shown.filter(c => data(c.querySelector("canvas")).some(v => v)).length,
              folded: document.querySelectorAll("details .chart canvas").length,
              wide: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
              paper: getComputedStyle(document.body).backgroundColor,
              columns: new Set(shown.map(c => Math.round(c.getBoundingClientRect().left))).size,
              letters: Math.min(...[...document.querySelectorAll(".runs td, .u-legend, figcaption")].map(e =>
                parseFloat(getComputedStyle(e).fontSize))),
            });""",
            width,
            dark,
        )
    )
    assert answer["charts"] == answer["drawn"] == 6
    assert answer["folded"] == 0, "a folded chart is drawn when it is asked for"
    assert answer["wide"] <= 0 and answer["width"] == width, "nothing reaches beyond the page"
    assert answer["columns"] == (1 if width == 390 else 3)
    assert answer["letters"] >= 12
    assert sum(map(int, answer["paper"][4:-1].split(","))) < 150 if dark else answer["paper"] == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_charts_of_ten_runs_begin_on_the_first_screen(tmp_path: Path, width: int) -> None:
    page = write([make(tmp_path / f"a run with a long name {i}", 3 + i) for i in range(10)], tmp_path / "page.html")
    answer = json.loads(
        ask(
            page,
            """const box = e => e.getBoundingClientRect(), rows = [...document.querySelectorAll(".brief tbody tr")];
            document.querySelector("[data-switch='1']").click(); await frame();
            answer = JSON.stringify({chart: box(document.querySelector(".chart canvas")).top,
              end: box(document.querySelector(".chart canvas")).bottom, rows: rows.length,
              tallest: Math.max(...rows.filter(r => !r.hidden).map(r => box(r).height)),
              hidden: [...document.querySelectorAll(".runs tbody tr")].filter(r => r.hidden).length,
              wide: document.documentElement.scrollWidth - innerWidth});""",
            width,
        )
    )
    assert answer["rows"] == 10 and answer["wide"] <= 0
    assert answer["hidden"] == 2, "its line and its folded row"
    if width == 1280:
        assert answer["end"] <= 900 and answer["tallest"] < 40
    else:
        assert answer["chart"] <= 844 and answer["tallest"] < 80


def test_values_under_the_pointer_runs_that_hide_zoom_and_folds(page: Path) -> None:
    answer = json.loads(
        ask(
            page,
            """const loss = [...document.querySelectorAll("figure")].find(f => f.textContent.startsWith("Loss"));
            const over = loss.querySelector(".u-over"), box = over.getBoundingClientRect();
            const at = (kind, share, target = over) => target.dispatchEvent(new MouseEvent(kind, {bubbles: true,
              clientX: box.left + share * box.width, clientY: box.top + 50, movementX: 9, button: 0}));
            const legend = () => loss.querySelector(".u-legend").innerText.replace(/\\s+/g, "");
            const ink = () => loss.querySelector("canvas").toDataURL();
            at("mouseenter", 0.5); at("mousemove", 0.5); await frame();
            const hovered = legend();
            const before = ink();
            at("mousedown", 0.25); at("mousemove", 0.5); at("mouseup", 0.5, document); await frame();
            const zoomed = ink() !== before;
            at("dblclick", 0.5); await frame();
            const button = document.querySelector("[data-switch='1']");
            button.click(); await frame();
            const off = [...document.querySelectorAll(".runs tbody tr")].map(r => r.hidden);
            const hidden = loss.querySelectorAll(".u-legend .u-off").length;
            button.click(); await frame();
            const fold = [...document.querySelectorAll("details")].find(d => d.textContent.startsWith("Linear probe"));
            fold.open = true; fold.scrollIntoView(); await frame(); await frame();
            answer = JSON.stringify({hovered, zoomed, off, hidden, pressed: button.getAttribute("aria-pressed"),
              folded: fold.querySelectorAll("canvas").length, charts: fold.querySelectorAll(".chart").length});""",
        )
    )
    # A run that ended before has its last value.
    assert answer["hovered"] == "epoch4long0.025short0.034483"
    assert answer["zoomed"]
    assert answer["folded"] == answer["charts"]
    assert answer["off"] == [False, True] and answer["hidden"] == 1 and answer["pressed"] == "true"
