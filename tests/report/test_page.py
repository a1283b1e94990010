"""The report: what the files say stands on the page, what they lack is named, and it loads nothing."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastrdm.commands import train, train_cli
from fastrdm.commands.report import main
from fastrdm.monitoring.advice import ADVICE
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION as CENTERED
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.page import page, verdict, write
from fastrdm.report.run_files import read_runs
from fastrdm.report.run_set import with_alarms

CONFIG = "preset: simsiam\ntrain: {length: 5ep}\nmethod: {alignment: {name: negative_cosine}}\nmonitor: {}\n"
VOID = {"meta", "br"}
SILENT = (["style"], ["script"])


class Balanced(HTMLParser):
    """Collects text; raises where a tag is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in SILENT:
            self.said.append(data)


def read(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def text(html: str) -> str:
    return re.sub(r"\s+", " ", " ".join(read(html).said))


def charts(html: str) -> dict[str, Any]:
    """The charts of a page by their titles."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return {chart["title"]: chart for chart in json.loads(found)["charts"]}


def words(cell: str) -> str:
    return re.sub(r"<.*?>", "", cell)


def line(step: int, **figures: float) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "time": float(step), **figures}


def metrics(count: int = 5) -> list[dict[str, float]]:
    lines = [line(0, knn_raw_pixels=0.5, knn_random_encoder=0.25)]
    for i in range(1, count + 1):
        branches = {f"{tap}/{HEADLINE_CONVENTION}/batch": i * k for tap, k in (("online", 1.0), ("target", 3.0))}
        lines.append(
            line(10 * i, loss=-i / 10, learning_rate=0.1, images_per_second=1000.0 + i, data_wait=0.01, **branches)
        )
    return [*lines, line(10 * count, knn=0.625, probe=0.75)]


def make(folder: Path, lines: list[Any] | None = None, **files: Any) -> Path:
    """A run's folder; keyword arguments replace its other files, None leaves one out."""
    folder.mkdir(parents=True)
    dumped = [json.dumps(item) for item in (metrics() if lines is None else lines)]
    (folder / "metrics.jsonl").write_text("".join(f"{item}\n" for item in dumped))
    contents = {
        "config.yaml": CONFIG,
        "summary.json": '{"knn": 0.625}',
        **{name.replace("_", ".", 1): content for name, content in files.items()},
    }
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_text(content)
    return folder


def jsonl(*lines: Any) -> str:
    return "".join(json.dumps(item) + "\n" for item in lines)


def alarm(epoch: float, kind: str = "dimensional_collapse", tap: str = "features") -> dict[str, Any]:
    told = {"value": 1.25, "threshold": 2.0, "action": "warn", "text": "rank <below> 2"}
    return {"step": int(epoch * 10), "epoch": epoch, "alarm": kind, "tap": tap, **told}


def spectrum(epoch: float, tap: str = "online") -> dict[str, Any]:
    ranks = list(range(1, 65))
    values = [2.0**-r for r in ranks]
    return {
        "step": int(epoch * 10),
        "epoch": epoch,
        "rows": 640,
        "tap": tap,
        "convention": "unit/moment",
        "ranks": ranks,
        "eigenvalues": values,
    }


def test_a_finished_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert write([run]) == run / "report.html"
    told = text((run / "report.html").read_text())
    for metric in ("-0.5000", "62.5%", "50.0%", "25.0%", "75.0%", "5.0", "15.0", "1,005", "5 of 5", "simsiam"):
        assert f" {metric} " in told, metric
    assert "not judged fewer than 3 log lines hold ranks and deviations of both branches." in told
    assert "No spectra.jsonl" in told
    assert "1970-01-01 00:00 UTC" in told and "0:00:50" in told, "when it began and how long it took"
    drawn = charts((run / "report.html").read_text())
    levels = [level["label"] for level in drawn["k-NN accuracy"]["levels"]]
    assert levels == ["raw pixels 50.0 %", "random encoder 25.0 %"]
    (difference,) = drawn["Rank difference of run"]["lines"]
    assert difference["y"] == [2, 4, 6, 8, 10]
    ranks = drawn["Effective rank of both branches"]
    assert ranks["y"]["log"] and ranks["y"]["limits"] == [1, 15]
    assert [(line["label"], line["y"][-1]) for line in ranks["lines"]] == [("online", 5), ("target", 15)]


def test_the_rank_about_the_mean_is_shown_first_where_it_was_logged(tmp_path: Path) -> None:
    both = {f"{b}/{c}/batch": v for b in ("online", "target") for c, v in ((HEADLINE_CONVENTION, 9.0), (CENTERED, 2.5))}
    html = page(read_runs([make(tmp_path / "run", [line(10, loss=1.0, **both)])]))
    assert " 2.5 2.5 " in text(html)
    first, folded = html.split("<summary>Rank at every tap", 1)
    assert "about their mean" in first and "counts as a direction" in folded


def test_the_first_screen_has_at_most_a_dozen_charts(tmp_path: Path) -> None:
    files = {"alarms_jsonl": jsonl(alarm(2)), "spectra_jsonl": jsonl(spectrum(1), spectrum(2))}
    many = [line(10 * i, **{f"metric{k}": 1.0 for k in range(40)}) for i in range(5)]
    for runs in (["a"], ["b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]):
        html = page(read_runs([make(tmp_path / name, [*metrics(), *many], **files) for name in runs]))
        first = html.split("<details", 1)[0]
        assert 5 <= first.count("<figure") <= 12
        assert "metric7" not in first and "metric7" in charts(html)


def test_many_runs_have_a_line_each_above_the_charts_and_a_full_row_below(tmp_path: Path) -> None:
    alarms = jsonl(alarm(2))
    runs = [make(tmp_path / name, alarms_jsonl=alarms if name == "d" else None) for name in "abcd"]
    html = page(read_runs(runs))
    first, folded = html.split("<summary>Verdicts and numbers in full", 1)
    assert first.index('class="runs brief"') < first.index('<div class="figures">')
    rows = re.findall(r"<tr>(<td.*?)</tr>", first)
    assert len(rows) == 4 and [words(cell) for cell in re.findall(r"<td.*?</td>", rows[3])][2:6] == [
        "62.5%",
        "62.5%",
        "50.0%",
        "25.0%",
    ]
    assert "<p>4 not judged (a, b, c, ...)</p>" in first
    assert words(folded).count("5 of 5") == 4 and "probe" not in words(
        first.partition("<tbody>")[0].rpartition("<thead>")[2]
    )
    few = page(read_runs(runs[:3]))
    assert "brief" not in few.split("<body>", 1)[1].split("<script", 1)[0] and "numbers in full" not in few


def test_nothing_is_loaded(tmp_path: Path) -> None:
    files = {"alarms_jsonl": jsonl(alarm(2)), "spectra_jsonl": jsonl(spectrum(1), spectrum(2))}
    html = page(read_runs([make(tmp_path / "a", **files), make(tmp_path / "b")]))
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"https://github.com/leeoniya/uPlot"}, "the library's name"
    assert not {"link", "img", "iframe", "object"} & set(read(html).tags)
    assert "url(" not in html and "@import" not in html and "src=" not in html
    assert "Permission is hereby granted" in html, "the license of the library"


def test_windows_replace_batches_and_show_their_interval_and_null(tmp_path: Path) -> None:
    windows: dict[str, float] = {
        f"{tap}/{HEADLINE_CONVENTION}/window": v for tap, v in (("online", 20.0), ("target", 31.5))
    }
    for key, value in (("difference", 11.5), ("null", 0.5)):
        windows |= {
            f"{key}/{HEADLINE_CONVENTION}/window{end}": value + d for end, d in (("", 0), ("/low", -1), ("/high", 1))
        }
    windows["target/std/window"] = 0.875
    html = page(read_runs([make(tmp_path / "run", [line(10, **windows), line(20, **windows)])]))
    told = text(html)
    assert " 20.0 31.5 0.88 " in told
    null, difference = charts(html)["Rank difference of run"]["lines"]
    assert (difference["y"], difference["low"], difference["high"]) == ([11.5] * 2, [10.5] * 2, [12.5] * 2)
    assert (null["y"], null["color"]) == ([0.5] * 2, "muted")
    assert "Null: view 2 minus view 1" in told
    assert "of single batches" not in told


def test_alarms_are_told_marked_and_counted(tmp_path: Path) -> None:
    alarms = jsonl(alarm(2), alarm(4), alarm(3, tap="hidden"), alarm(1, "falling_rank", "target"))
    run = make(tmp_path / "run", alarms_jsonl=alarms)
    (found,) = runs = read_runs([run])
    alarmed = with_alarms(runs)
    assert words(verdict(found, alarmed.alarms)) == (
        "not judged fewer than 3 log lines hold ranks and deviations of both branches. "
        "Alarms: falling rank at target at epoch 1; dimensional collapse at features at epoch 2; "
        "dimensional collapse at hidden at epoch 3."
    )
    html = page(runs)
    marks = [(mark["x"], mark["label"]) for mark in charts(html)["Loss"]["marks"]]
    assert marks == [
        (1, "falling rank at target"),
        (2, "dimensional collapse at features"),
        (3, "dimensional collapse at hidden"),
    ]
    assert "rank &lt;below&gt; 2" in html
    assert re.search(r" run dimensional collapse features 2 20 2 1.25 2 warn rank <below> 2", text(html))


def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "preset: byol\ntrain: {length: 5ep}\nmethod: {alignment: {name: byol}}\n"  # and no monitor
    runs = [make(tmp_path / "one"), make(tmp_path / "two", metrics(3), config_yaml=other, summary_json=None)]
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    told = text((tmp_path / "report.html").read_text())
    assert "setting one two preset simsiam byol method.alignment.name negative_cosine byol" in told
    assert "train.length" not in told
    assert "lie on different scales" in told
    assert "both branches. Unfinished, 3 of 5 epochs." in told
    drawn = charts((tmp_path / "report.html").read_text())
    assert [line["run"] for line in drawn["Rank difference of all runs"]["lines"]] == [0, 1]
    assert "two: no summary.json: the run has not finished" in told


@pytest.mark.parametrize("name", ["run", "two runs"])
def test_runs_of_one_name_are_told_apart(tmp_path: Path, name: str) -> None:
    runs = read_runs([make(tmp_path / "a" / name), make(tmp_path / "b" / name)])
    assert [run.name for run in runs] == [f"a/{name}", f"b/{name}"]
    same = read_runs([tmp_path / "a" / name] * 2)
    assert [run.name for run in same] == [f"{name} (1)", f"{name} (2)"]


def test_an_empty_run_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [], summary_json=None)
    told = text(page(read_runs([run])))
    assert "not judged no training step was logged yet. Unfinished, 0 of 5 epochs." in told
    assert "Not logged: loss." in told
    assert "metrics.jsonl: no metrics yet" in told
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in text(page(read_runs([run])))


def test_a_half_written_run_shows_what_is_there(tmp_path: Path) -> None:
    run = make(tmp_path / "run", config_yaml="a: [", summary_json='{"kn')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"epoch": 3}\n{"step": 7, "epoch": "x"}\n{"step": 60, "epo')
    told = text(page(read_runs([run])))
    assert "-0.5000" in told
    assert "metrics.jsonl: 4 of 11 lines could not be read, the last one cut off" in told
    assert "config.yaml: could not be read" in told
    assert "summary.json: could not be read" in told


def test_what_is_not_a_number_is_a_gap(tmp_path: Path) -> None:
    lines = [line(10, loss=1.0), line(20, loss=float("nan")), line(30, loss=float("inf"))]
    lines.append({**line(40), "loss": "much"})
    (run,) = read_runs([make(tmp_path / "run", lines)])
    assert run.last("loss") == 1.0
    assert "1.0000" in text(page([run]))


def test_spectra_are_drawn_a_tap_each_from_early_to_late(tmp_path: Path) -> None:
    lines = [spectrum(e, tap) for e in range(1, 31) for tap in ("target", "online")]
    half = {"step": 1, "epoch": 1, "tap": "online", "convention": "unit/moment", "ranks": [1, 2]}
    run = make(tmp_path / "run", spectra_jsonl=jsonl(*lines, half))
    html = page(read_runs([run]))
    told = text(html)
    assert told.index("Spectrum of the online branch, run") < told.index("Spectrum of the target branch, run")
    assert "8 moments from early to late" in told
    lines = charts(html)["Spectrum of the online branch, run"]["lines"]
    assert [lines[0]["label"], lines[-1]["label"]] == ["epoch 1", "epoch 30"]
    assert [lines[0]["color"], lines[-1]["color"]] == ["time0.000", "time1.000"]
    assert "spectra.jsonl: 1 of 61 lines could not be read" in told


def test_every_other_figure_gets_a_chart(tmp_path: Path) -> None:
    html = page(read_runs([make(tmp_path / "run", [line(10, rankme=3.0), line(20, rankme=4.0)])]))
    assert "<b>rankme</b>" in html
    assert "<b>loss</b>" not in html


def test_other_figures_of_one_run_share_a_chart_for_all_taps(tmp_path: Path) -> None:
    slopes = {f"{tap}/slope/window": i for i, tap in enumerate(("online", "features"))}
    html = page(read_runs([make(tmp_path / "run", [line(10, **slopes), line(20, **slopes)])]))
    assert html.count("<b>slope/window</b>") == 1
    assert [line["label"] for line in charts(html)["slope/window"]["lines"]] == ["online", "features"]


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&"
    run = make(tmp_path / "r<i>un", [line(10, **{bad: 1.0})], config_yaml=f"preset: '{bad}'\n")
    html = page(read_runs([run, make(tmp_path / "other")]))
    assert read(html).tags.count("script") == 3, "the data, the library and what draws"
    assert "<i>" not in html and "<script>alert" not in html
    assert bad in charts(html)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    lines = [line(i, loss=float(i % 97), **{f"figure{k}": float(i % (k + 2)) for k in range(60)}) for i in range(3000)]
    run = make(tmp_path / "run", lines)
    assert len(page(read_runs([run] * 4)).encode()) < 2e6


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "parent"])
def test_a_path_that_is_no_run_is_refused(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "runs" / "first")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / {"parent": "runs"}.get(kind, kind)
    reasons = {
        "missing": "does not exist",
        "empty": "holds none of metrics.jsonl",
        "file": "is no folder",
        "parent": "did you mean .*first",
    }
    with pytest.raises(ValueError, match=rf"RUN must be the folder of a run, got '.*{path.name}', .*{reasons[kind]}"):
        write([tmp_path / "runs" / "first", path])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(ValueError, match="--out must be a file that can be written"):
        write([run], tmp_path / "none" / "report.html")


def test_a_finished_run_gets_its_report_and_a_failing_one_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [
        "quickstart.yaml",
        "train.length=2st",
        "encoder.width=4",
        "loader.batch_size=16",
        "evaluate.baselines=false",
    ]
    assert train_cli.main([*short, f"run={tmp_path / 'a'}"]) == 0
    assert f"report: {tmp_path / 'a' / 'report.html'}" in capsys.readouterr().out
    assert "2st" not in text((tmp_path / "a" / "report.html").read_text())
    assert train_cli.main([*short, f"run={tmp_path / 'b'}", "log.report=false"]) == 0
    assert not (tmp_path / "b" / "report.html").exists()

    def fail(paths: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(train.page, "write", fail)
    assert train_cli.main([*short, f"run={tmp_path / 'c'}"]) == 0
    assert "no report: RuntimeError: broken" in capsys.readouterr().out


def measured(epoch: float, difference: float, few: bool = False) -> dict[str, Any]:
    """A line of analysis.jsonl."""
    figures: dict[str, float] = {"images": 640, "dimension": 64, "biased": float(few), "filter/verdict": 1}
    figures |= {f"online/{HEADLINE_CONVENTION}": 10.0, f"target/{HEADLINE_CONVENTION}": 10.0 + difference}
    figures |= {
        f"difference/{HEADLINE_CONVENTION}{end}": difference + d for end, d in (("", 0), ("/low", -1), ("/high", 1))
    }
    figures |= {
        f"null/online/{HEADLINE_CONVENTION}": -0.25,
        f"null/target/{HEADLINE_CONVENTION}": 0.125,
        "filter/directions": 7,
    }
    figures |= {"filter/body": 0.75, "filter/tail": -0.5, "filter/tilt": 4.0}
    figures |= {f"alignment/{k}": v for k, v in (("value", 0.5), ("chance", 0.125), ("crossed", 0.4), ("ceiling", 0.6))}
    curves = {name: [[1, 0.5], [4, 0.25], [64, 0.01]] for name in ("spectrum/online", "spectrum/target")}
    curves["filter/root"] = [[1, 1.5], [4, 0.75]]
    return {"step": int(epoch * 10), "epoch": epoch, "metrics": figures, "curves": curves}


def test_analyses_are_drawn_over_epochs_and_at_the_end(tmp_path: Path) -> None:
    lines = jsonl(measured(0, 1.0), measured(2, 3.0, few=True))
    told = text(html := page(read_runs([make(tmp_path / "run", analysis_jsonl=lines)])))
    row = "run 2 640 (biased) 10.0 13.0 +3.00 [+2.00, +4.00] 0.25 low-pass 7 +0.75 -0.50 4 0.50 0.12 0.40 0.60"
    assert row in told
    titles = ["Rank of both branches throughout training, run", "Rank difference throughout training, run"]
    titles += ["Spectral filter when last measured, of what enters the loss"]
    titles += ["Spectral filter throughout training, of what enters the loss, run"]
    titles += ["Spectra when last measured, of what enters the loss, run"]
    for title in titles:
        assert title in told, title
    assert "of the scores" not in told, "SimSiam has none"
    drawn = charts(html)["Rank difference throughout training, run"]["lines"]
    assert [(line["label"], line.get("low")) for line in drawn] == [("null", None), ("difference", [0, 2])]
    assert "<b>analysis/" not in html


def test_methods_stand_side_by_side_on_equal_axes(tmp_path: Path) -> None:
    """From the analysis of a run, from `fastrdm analyze`, and none."""
    whole = measured(0, 100.0)
    whole["curves"] = {name: [v for _, v in pairs] for name, pairs in whole["curves"].items()}
    theory = json.dumps({key: whole[key] for key in ("metrics", "curves")})
    lines = jsonl(measured(0, 1.0), measured(4, 2.0))
    runs = [make(tmp_path / "one", analysis_jsonl=lines), make(tmp_path / "two", analysis_json=theory)]
    one, two, three = read_runs([*runs, make(tmp_path / "three")])
    assert two.analysis[-1].epoch == 5 and two.analysis[-1].curves["filter/root"] == ([1.0, 2.0], [1.5, 0.75])
    told = text(page([one, two, three]))
    assert "one 4 640 10.0 12.0 +2.00" in told and "two 5 640 10.0 110.0 +100.00" in told
    assert "Not measured: three (train with analysis.every=10ep, or call fastrdm analyze RUN)." in told
    assert told.count("Spectra when last measured, of what enters the loss, ") == 2
    assert "throughout training, two" not in told


def test_analyses_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = jsonl({"epoch": 1, "metrics": {}}) + '{"epoch": 2, "fig'
    told = text(page(read_runs([make(tmp_path / "run", analysis_jsonl=broken, analysis_json="[1]")])))
    assert "analysis.jsonl: 2 of 2 lines could not be read, the last one cut off" in told
    assert "analysis.json: could not be read" in told
    assert "Theory" not in told


def test_what_a_run_took_of_its_device_is_drawn_where_it_was_logged(tmp_path: Path) -> None:
    used = {"gflops": 20.0, "flop_utilization": 0.4, "peak_memory_mib": 500.0, "seconds_to_first_step": 7.25}
    said = text(page(read_runs([make(tmp_path / "new", [line(10, loss=1.0, monitor_share=0.01, **used)])])))
    for title in ("Model FLOP utilization", "Arithmetic of a device", "Time in the monitor", "Memory"):
        assert f" {title} " in said, title
    assert "From the start to the first step: 7.2 s (new)." in said
    assert "seconds_to_first_step" not in said and "Time in spectral filters" not in said
    assert "Arithmetic" not in text(page(read_runs([make(tmp_path / "old", [line(10, loss=1.0)])])))


def test_a_folder_whose_name_is_no_utf8_has_a_report(tmp_path: Path) -> None:
    folder = make(tmp_path / os.fsdecode(b"caf\xe9"))
    assert "caf\\udce9" in write([folder]).read_text(encoding="utf-8")


def test_the_verdict_of_a_run_is_told_with_its_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(cov: float) -> list[dict[str, float]]:
        names = {"erank_l/unit/moment": cov, "erank_l/unit/cov": cov, "std": 0.5}
        taps = {f"{tap}/{name}/batch": value for tap in ("online", "target") for name, value in names.items()}
        steps = [line(10 * i, loss=-0.5, **taps) for i in range(1, 5)]
        return [line(0, knn_random_encoder=0.25), *steps, line(40, knn=0.625)]

    config = CONFIG + "loader: {batch_size: 32}\n"
    folders = {name: make(tmp_path / name, lines(cov), config_yaml=config) for name, cov in (("a", 9.0), ("b", 1.5))}
    stopped = {"step": 50, "epoch": 5.0, "alarm": "non_finite_loss", "tap": "loss", "text": "..."}
    folders["c"] = make(tmp_path / "c", lines(9.0), config_yaml=config, alarms_jsonl=jsonl(stopped))
    small = config.replace("{length: 5ep}", "{length: 5ep, accumulate: 4}")
    folders["d"] = make(tmp_path / "d", lines(9.0), config_yaml=small)
    assert main([*map(str, folders.values()), "--out", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr().out
    told = text((tmp_path / "report.html").read_text())
    for name, state in zip(folders, ("healthy", "dimensional collapse", "weak", "not judged"), strict=True):
        assert f"{name}: {state}: " in said
        assert f" {name} simsiam {state} " in told
    assert "batches of 8 images are too small" in told
    assert ADVICE["dimensional_collapse"].text in told
    assert ADVICE["non_finite_loss"].text in told


def test_the_heading_names_a_few_runs_and_counts_many(tmp_path: Path) -> None:
    """The names of many runs would fill a phone's first screen; each of them stands on its button."""
    for count, heading in ((3, "run0, run1, run2"), (4, "4 runs")):
        html = page(read_runs([str(make(tmp_path / str(count) / f"run{k}")) for k in range(count)]))
        assert f"<h1>{heading}</h1>" in html
        assert all(f"run{k}" in html for k in range(count))
