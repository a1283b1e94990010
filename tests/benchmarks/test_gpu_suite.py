"""Benchmarks of steps and of training with its loader give sound ratios; the suite around them can be resumed."""

import argparse
import csv
import importlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrdm.config import run_config
from fastrdm.methods.presets import PRESETS

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def suite() -> ModuleType:
    return importlib.import_module("benchmarks.gpu_suite")


def table(path: Path) -> dict[str, dict[str, str]]:
    return {row["contestant"]: row for row in csv.DictReader(path.open())}


@pytest.mark.slow
def test_the_dry_run_measures_and_records(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    out, state = tmp_path / "out", tmp_path / "out.state"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", str(out), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["record.json", "record.md", "results.tar"]
    step = table(state / "step.txt")
    assert step.keys() == {"step", "ceiling", "reference", "svd", "base"}
    for name, row in step.items():
        for other in step.keys() - {"step"}:
            ratio = float(step[other]["ms"]) / float(row["ms"])
            assert float(row[f"to_{other}"]) == pytest.approx(ratio, rel=0.01), (name, other)
    crops = table(state / "step_crops.txt")["step"]
    assert (crops["views"], crops["crops"], crops["to_svd"]) == ("4", "2x4", "")
    whole = table(state / "end_to_end.txt")
    assert whole.keys() == {"real", "synthetic", "reference"}
    assert float(whole["synthetic"]["to_synthetic"]) == 1
    fed = table(state / "loaders.txt")
    assert {name: row["engine"] for name, row in fed.items()} == {
        "resident": "resident",
        "crops": "native",
        "synthetic": "synthetic",
    }
    assert all(float(row["to_synthetic"]) > 0 and not row["to_reference"] for row in fed.values())
    ran = list(csv.DictReader((state / "profile.txt").open()))
    assert [row["name"] for row in ran[:2]] == ["step", "all kernels"] and len(ran) == 7
    assert float(ran[1]["ms"]) >= sum(float(row["ms"]) for row in ran[2:]) > 0
    alone = table(state / "ddp_one_rank.txt")
    assert {row["outcome"] for row in alone.values()} == {"ok"} and alone.keys() == {"alone", "ddp"}
    assert {row["backend"] for row in alone.values()} == {"gloo"}
    assert float(alone["ddp"]["loss_difference"]) < 1e-5, "the sums of one process change nothing"
    assert (state / "profile.json.gz").exists()
    assert (state / "run" / "summary.json").exists(), "the training ended"
    with tarfile.open(out / "results.tar") as results:
        assert {"step.txt", "run/summary.json", "train.json"} <= set(results.getnames())
    record = json.loads((out / "record.json").read_text())
    assert record["left out"] == {"left_out": "needs --imagenet"}
    assert {name for name, end in record["parts"].items() if end} == {
        "tests",
        "step",
        "step_crops",
        "end_to_end",
        "loaders",
        "profile",
        "ddp_one_rank",
        "train",
    }


def test_parts_that_succeeded_are_not_run_again(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, long = ["-c", "print(7)"], ["-c", "raise SystemExit(3)"], ["-c", "import time; time.sleep(60)"]
    made = [
        suite.Part("good", good, seconds=20, beside=(long,)),
        suite.Part("bad", bad, seconds=20),
        suite.Part("long", long, seconds=20),
        suite.Part("data", good, "cifar"),
    ]
    out, state = tmp_path / "out", tmp_path / "out.state"
    monkeypatch.setattr(suite, "dry_parts", lambda out: made)
    monkeypatch.setattr(suite, "LIMIT", 3)
    ran: list[str] = []
    run_part = suite.run_part

    def noted(part: Any, *rest: Any) -> Any:
        ran.append(part.name)
        return run_part(part, *rest)

    monkeypatch.setattr(suite, "run_part", noted)
    monkeypatch.setattr(suite, "commit", lambda: "first")
    assert suite.main([str(out), "--dry-run"]) == 1
    ends = json.loads((out / "record.json").read_text())["parts"]
    assert {name: end and end["status"] for name, end in ends.items()} == {
        "good": "ok",
        "bad": "failed",
        "long": "over time",
        "data": None,
    }
    assert (state / "good.txt").read_text() == "7\n"
    assert "| data | needs --cifar |" in (out / "record.md").read_text()
    shutil.rmtree(out)
    assert suite.main([str(out), "--dry-run"]) == 1
    assert ran == ["good", "bad", "long", "bad", "long"], "what is done is remembered outside of the output folder"
    monkeypatch.setattr(suite, "commit", lambda: "second")
    suite.main([str(out), "--dry-run", "--only", "good", "--minutes", "0.3"])
    assert ran[5:] == [], "nothing is begun without the time that it takes"
    assert "not begun: good takes 20 s, 18 are left" in capsys.readouterr().out
    suite.main([str(out), "--dry-run", "--only", "good"])
    assert ran[5:] == ["good"], "another commit is measured anew"


@pytest.mark.parametrize("quarter", ["1", "2"])
def test_a_quarter_of_an_hour_is_enough(suite: ModuleType, quarter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--plan", "--quarter", quarter]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "does not fit" in line]
    assert float(lines[-1].split()[0]) <= 15
    names = [part.name for part in suite.parts("C", "I", Path("R")) if part.quarter == int(quarter)]
    assert [line.split()[2].rstrip(",") for line in lines[1:-1]] == names, "by value, as they are listed"


def test_a_plan_says_what_does_not_fit(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    suite.main(["--plan", "--quarter", "1", "--minutes", "6", "--cifar", "C"])
    lines = capsys.readouterr().out.splitlines()
    assert "   does not fit: train_cifar10, 330 s" in lines
    assert any("step_resnet50_rdm" in line and "min" in line for line in lines), "smaller parts behind it do"


def module_of(command: list[str]) -> str | None:
    """The module of benchmarks that a command runs, or None."""
    return next((word for word in command if word.startswith("benchmarks.")), None)


def test_the_whole_suite_names_scripts_and_presets_that_exist(suite: ModuleType) -> None:
    parts = list(suite.parts("C", "I", Path("R")))
    assert len({part.name for part in parts}) == len(parts)
    assert set(suite.METHODS + suite.VARIANTS) <= PRESETS.keys()
    for part in parts:
        assert part.needs is None or part.needs in suite.NEEDS
        assert part.command[0] == "-m" or Path(part.command[0]).exists(), part.name
        module = module_of(part.command)
        assert module is None or part.command[part.command.index(module) - 1] == "-m", part.name
        if "fastrdm" in part.command[0]:
            run_config.load(part.command[1:])


class Parsed(Exception):
    """A benchmark's arguments."""


def test_the_suites_benchmarks_take_their_arguments(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}
    for name, parse in parsers.items():

        def stop(self: argparse.ArgumentParser, *given: Any, parse: Any = parse) -> None:
            raise Parsed(parse(self, *given))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    seen = []
    for part in suite.parts("C", "I", Path("R")):
        name = module_of(part.command)
        if name is None:
            continue
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", part.command[part.command.index(name) :])
        with pytest.raises(Parsed) as parsed:
            module.main()
        seen.append(name.removeprefix("benchmarks."))
        settings_are_sound(seen[-1], module, parsed.value.args[0], monkeypatch)
    assert {"training.step", "training.first_step", "training.end_to_end"} <= set(seen)
    assert {"loaders.throughput", "loaders.augment"} <= set(seen)
    assert {"training.step_kernels", "training.ddp_rank"} <= set(seen)


def test_every_engine_is_attached_in_turns(suite: ModuleType) -> None:
    (part,) = (part for part in suite.parts("C", "I", Path("R")) if part.name == "loaders_224")
    named = [part.command[i + 1] for i, word in enumerate(part.command) if word == "--loader"]
    assert named == ["native", "torchcodec", "dali", "ffcv", "crops"], "and noise, which is always there"
    assert part.command.count("loader.root=R/packed/beton") == 1, "ffcv reads a file of its own"


def settings_are_sound(name: str, module: ModuleType, args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark would train makes a configuration."""
    if name == "training.end_to_end":
        assert run_config.load(args.settings).train.capture
        for _, *own in args.loader:
            assert run_config.load([*args.settings, *own])
    if name == "training.step":
        monkeypatch.setattr(module, "Trainer", lambda settings: settings)
        for preset in args.presets:
            made = module.trainer_of(preset, args, args.compile == "yes", args.capture == "yes")
            assert (made.preset, len(made.loader.views)) == (preset, 2 + args.crops)
            assert made.train.capture == (args.capture == "yes")
            assert "base" not in args.contestants or module.base_of(preset) in PRESETS


def test_without_a_gpu_it_says_so(suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if suite.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path / "out")])
    assert "--dry-run works without" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
