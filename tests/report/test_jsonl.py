"""Files of JSON lines: thinned by kind, in order, what cannot be read counted, and a million lines in little memory."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fastrdm.config.tree import Tree
from fastrdm.report import jsonl
from fastrdm.report.jsonl import first_lines, read_lines


def everything(_: Tree) -> bool:
    return True


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_short_file_is_kept_whole_and_in_order(tmp_path: Path) -> None:
    lines = [{"step": k, "knn" if k % 7 == 0 else "loss": k / 2} for k in range(1000)]
    found = read_lines(write(tmp_path / "m.jsonl", [*lines]), everything)
    assert found == jsonl.Lines(lines, 1000, 0, False)


def test_a_long_file_keeps_the_rare_kinds_the_first_and_the_last(tmp_path: Path) -> None:
    lines = [{"step": k, **({"knn": 0.5} if k % 1000 == 999 else {"loss": float(k)})} for k in range(30_000)]
    trees = read_lines(write(tmp_path / "m.jsonl", [*lines]), everything).trees
    steps = [tree["step"] for tree in trees]
    assert steps == sorted(set(steps))
    assert [s for s in steps if s % 1000 == 999] == list(range(999, 30_000, 1000)), "all of the rare kind"
    common = [s for s in steps if s % 1000 != 999]
    assert 1000 < len(common) <= 2049 and common[0] == 0 and common[-1] == 29_998
    assert max(b - a for a, b in pairwise(common)) <= 18, "evenly"


def test_taps_that_take_turns_are_thinned_alike(tmp_path: Path) -> None:
    lines = [{"step": k, "tap": f"tap {k % 8}", "ranks": [1, 2]} for k in range(40_000)]
    trees = read_lines(write(tmp_path / "s.jsonl", [*lines]), everything).trees
    counts = [sum(tree["tap"] == f"tap {k}" for tree in trees) for k in range(8)]
    assert min(counts) > 1000 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("end", ['{"step": 4, "lo', "[1, 2]\n", "x\n", "\xff\n", '{"step": "no"}\n', "[" * 100_000])
def test_what_cannot_be_read_is_counted(end: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\n  \nnull\n{"step": 3}\n' + end.encode("latin-1"))
    found = read_lines(path, lambda tree: isinstance(tree.get("step"), int))
    assert [tree["step"] for tree in found.trees] == [1, 3]
    assert (found.total, found.unread, found.cut) == (4, 2, not end.endswith("\n"))


def test_a_line_without_end_is_not_taken_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_BYTES", 1000)
    path = write(tmp_path / "m.jsonl", [{"step": 1}, {"step": 2, "x": "y" * 5000}, {"step": 3}])
    found = read_lines(path, everything)
    assert [tree["step"] for tree in found.trees] == [1, 3] and (found.total, found.unread) == (3, 1)


def test_kinds_without_end_are_thinned_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_KINDS", 10)
    monkeypatch.setattr(jsonl, "MOST_LINES", 20)
    found = read_lines(write(tmp_path / "m.jsonl", [{"step": k, f"key {k}": 0} for k in range(5000)]), everything)
    assert found.total == 5000 and 20 < len(found.trees) < 40


def test_the_first_of_each_kind_with_their_number(tmp_path: Path) -> None:
    lines = [{"alarm": "collapse", "tap": "ab"[k % 2], "text": f"{k}"} for k in range(7)] + [
        {"alarm": "rise", "text": ""}
    ]
    found = first_lines(write(tmp_path / "a.jsonl", [*lines, "x"]), lambda tree: "alarm" in tree, ("alarm", "tap"))
    assert [(tree["alarm"], tree.get("tap"), tree["text"], tree["times"]) for tree in found.trees] == [
        ("collapse", "a", "0", 4),
        ("collapse", "b", "1", 3),
        ("rise", None, "", 1),
    ]
    assert (found.total, found.unread, found.cut) == (9, 1, False)


def million(folder: Path, lines: int) -> None:
    """A run's folder with so many lines in each of its files, as large as in a run."""
    metrics = {f"online/rank {k}/batch": 0.123456789 + k for k in range(30)}
    spectrum = {"convention": "eigenvalues", "ranks": list(range(16)), "eigenvalues": [1 / (k + 1) for k in range(16)]}
    with (
        (folder / "metrics.jsonl").open("w") as m,
        (folder / "spectra.jsonl").open("w") as s,
        (folder / "alarms.jsonl").open("w") as a,
    ):
        common, curve = json.dumps(metrics)[1:], json.dumps(spectrum)[1:]
        for k in range(lines):
            start = f'{{"step": {k}, "epoch": {k / 100}, '
            m.write(f'{start}"loss": {k % 97}, {common}\n')
            s.write(f'{start}"tap": "{"online" if k % 2 else "target"}", {curve}\n')
            a.write(f'{start}"alarm": "complete_collapse", "tap": "online", "text": "step {k}"}}\n')


MEASURED = """
import resource, sys
from fastrdm.commands.report import main
main(sys.argv[1:])
# The kernel's own peak since exec: ru_maxrss would begin with that of the process that started this one.
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, int(peak) / 1024)
"""


def report(folder: Path) -> tuple[float, float]:
    """CPU seconds and MiB that a report on the folder takes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, str(folder)]
    done = subprocess.run(command, check=True, env=environment, timeout=1200, capture_output=True, text=True)
    seconds, memory = done.stdout.splitlines()[-1].split()
    return float(seconds), float(memory)


def test_a_report_on_many_lines_takes_no_more_memory(tmp_path: Path) -> None:
    million(tmp_path, 20_000)
    seconds, memory = report(tmp_path)
    assert memory < 1000 and seconds < 30
    told = (tmp_path / "report.html").read_text()
    assert "20000" in told and len(told) < 3_000_000


@pytest.mark.slow
def test_a_report_on_a_million_lines(tmp_path: Path) -> None:
    million(tmp_path, 1_000_000)
    began = time.monotonic()
    seconds, memory = report(tmp_path)
    print(f"{seconds:.1f} s of CPU, {time.monotonic() - began:.1f} s, {memory:.0f} MiB")
    assert memory < 1000 and seconds < 60
