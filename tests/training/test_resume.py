"""Killed runs continue as if they had never stopped; stopped ones also on another number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "programs"


def lines(script: str, out: Path, *more: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / script), str(out), *more], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, object]]:
    return {(int(str(r["world"])), str(r["case"])): r for r in lines("kills.py", tmp_path_factory.mktemp("kills"))}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "case",
    ["mid-epoch", "last step of an epoch", "first step of an epoch", "accumulation", "moving matrices", "saving"],
)
def test_a_killed_run_ends_with_the_unbroken_runs_weights(
    killed: dict[tuple[int, str], dict[str, object]], world: int, case: str
) -> None:
    result = killed[world, case]
    assert result["codes"] == [[0] * world, [-9] * world, [0] * world]
    assert result["same"], "the weights differ"
    assert result["logged"], "metrics.jsonl differs"


def test_a_stopped_run_goes_on_with_other_numbers_of_processes(tmp_path: Path) -> None:
    results = lines("stops.py", tmp_path)
    assert [r["world"] for r in results] == [1, 2, 4]
    for result in results:
        assert result["stopped"] == [75, 75]
        assert result["continued"] == [0] * int(str(result["world"]))
        assert result["first"], "the first part saw nothing"
        epoch = [*result["first"], *result["second"]]  # type: ignore[misc]
        assert sorted(epoch) == list(range(80)), "an image of the epoch was left out or seen twice"


@pytest.mark.parametrize(
    "form", ["imagenet archives", "tar of folders", "webdataset", "parquet", "remote", "remote webdataset"]
)
def test_a_killed_run_on_other_sources_ends_with_the_unbroken_runs_weights(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    if form.startswith("remote"):
        pytest.importorskip("aiohttp", reason="needs aiohttp")
        pytest.importorskip("fsspec", reason="needs fsspec")
    results = lines("source_kills.py", tmp_path, form)
    assert [r["world"] for r in results] == [1, 2]
    for result in results:
        world = int(str(result["world"]))
        assert result["codes"] == [[0] * world, [-9] * world, [0] * world]
        assert result["same"], "the weights differ"
        assert result["logged"], "metrics.jsonl differs"
