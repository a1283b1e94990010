"""The picture of docs/monitoring.md is what the committed records give, and its table names every field."""

import runpy
from dataclasses import fields
from pathlib import Path

from fastrdm.monitoring.alarms import AlarmsConfig

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "plot_monitoring.py"))
RECORDS = ROOT / "benchmarks" / "records" / "monitoring"


def test_the_picture_is_drawn_from_the_records() -> None:
    drawn = SCRIPT["draw"]([str(RECORDS / "simsiam.jsonl"), str(RECORDS / "without_stop.jsonl")])
    assert (ROOT / "docs" / "monitoring.svg").read_text() == "\n".join(drawn) + "\n"


def test_only_the_run_without_stop_gradient_raised_alarms() -> None:
    alarms = {name: [x for x in SCRIPT["read"](RECORDS / f"{name}.jsonl") if "alarm" in x]
              for name in ("simsiam", "without_stop")}  # fmt: skip
    assert alarms["simsiam"] == []
    assert "dimensional_collapse" in {x["alarm"] for x in alarms["without_stop"]}


def test_every_field_of_the_alarms_is_told_with_its_default() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for field in fields(AlarmsConfig):
        default = getattr(AlarmsConfig(), field.name)
        assert (f"`{field.name}` {default}" in page) or (field.name == "action" and f"`{default}`" in page), field.name
