"""Picture of a report of six runs of the record, by a headless Chromium.

python -m benchmarks.plots.report docs/report.jpg
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml
from PIL import Image

from benchmarks import common
from benchmarks.verdict.record import Labelled, load
from fastrdm.report.page import write

# Of the record of verdicts, on the digits: methods that are healthy, and runs that collapse in both ways.
RUNS = (("rdm_byol", 2), ("rdm_simsiam", 0), ("simsiam", 0), ("byol", 2), ("symsimsiam", 0), ("dino_no_centering", 0))
SIZE, WIDTH = (1280, 830), 960  # pixels of the window, and across the picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def folder_of(run: Labelled, root: Path) -> Path:
    """The run as its folder was: what it logged, and the settings that the report asks for."""
    folder = root / run.arm
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in run.lines))
    epochs = round(run.horizon.total / run.horizon.steps_per_epoch)
    config = {"train": {"length": f"{epochs}ep"}, "loader": {"batch_size": run.batch}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text("{}")
    return folder


def main() -> None:
    """Write the picture."""
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("needs Chromium: apt-get install chromium")
    found = {(run.arm, run.seed): run for run in load() if run.data == "digits"}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        page = write([folder_of(found[run], root) for run in RUNS], root / "report.html")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=5000"]
        command += [f"--screenshot={root / 'shot.png'}", f"file://{page}"]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        with Image.open(root / "shot.png") as shot:
            small = shot.convert("RGB").resize((WIDTH, WIDTH * shot.height // shot.width), Image.Resampling.LANCZOS)
    small.save(options.out, quality=65)


if __name__ == "__main__":
    main()
