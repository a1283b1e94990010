"""The picture of docs/monitoring.md is what the committed records give, and its table names every field."""

import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.plots import monitoring
from fastrdm.monitoring.alarms import AlarmsConfig

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "monitoring"


def test_the_picture_is_drawn_from_the_records() -> None:
    pytest.importorskip("matplotlib")
    (pinned,) = re.findall(r"^matplotlib==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version("matplotlib") != pinned:
        pytest.skip(f"matplotlib {version('matplotlib')} draws other SVG than {pinned}, which drew the picture")
    drawn = monitoring.drawing([RECORDS / "simsiam.jsonl", RECORDS / "without_stop.jsonl"])
    assert (ROOT / "docs" / "monitoring.svg").read_text() == drawn


def test_only_the_run_without_stop_gradient_raised_alarms() -> None:
    alarms = {name: [x for x in monitoring.read(RECORDS / f"{name}.jsonl") if "alarm" in x]
              for name in ("simsiam", "without_stop")}  # fmt: skip
    assert alarms["simsiam"] == []
    assert "dimensional_collapse" in {x["alarm"] for x in alarms["without_stop"]}


def test_every_field_of_the_alarms_is_told_with_its_default() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for field in fields(AlarmsConfig):
        default = getattr(AlarmsConfig(), field.name)
        assert (f"`{field.name}` {default}" in page) or (field.name == "action" and f"`{default}`" in page), field.name
