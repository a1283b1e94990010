"""Draw docs/collapse_*.svg, a run of each state, from the record's series: `python -m benchmarks.verdict.pictures`."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.verdict.record import Labelled, load, place

DOCS = Path(__file__).parents[2] / "docs"
COLORS = {"target": "#0072b2", "online": "#d55e00"}


class Picture(NamedTuple):
    """Which run shows a state."""

    state: str
    arm: str
    seed: int
    title: str
    data: str = "digits"


PICTURES = (
    Picture("healthy", "rdm_byol", 2, "healthy: rdm_byol on digits"),
    Picture("dimensional", "symsimsiam", 0, "dimensional collapse: symsimsiam on digits"),
    Picture("complete", "symsimsiam_no_batchnorm", 2, "complete collapse: symsimsiam without its last BatchNorm"),
    Picture("weak", "byol", 2, "weak: byol on digits with a rate that is too high"),
)


def curve(run: Labelled, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a key."""
    pairs = [(line["epoch"], line[key]) for line in run.lines if key in line]
    return [x for x, _ in pairs], [y for _, y in pairs]


def draw(run: Labelled, title: str, out: Path) -> None:
    """Rank about the mean, deviation and loss, and k-NN accuracy, side by side."""
    figure, (ranks, deviations, losses, accuracy) = pyplot.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    for tap, color in COLORS.items():
        at = place(run, tap)
        ranks.plot(*curve(run, f"{at}/erank_l/unit/cov/batch"), color=color, label=at.replace("_", " "))
        deviations.plot(*curve(run, f"{at}/std/batch"), color=color)
    ranks.set(title="effective rank about the mean", yscale="log", ylim=(1, 60), yticks=(1, 2, 5, 10, 20, 50))
    ranks.set_yticklabels(["1", "2", "5", "10", "20", "50"])
    ranks.legend(frameon=False)
    deviations.set(title="deviation", ylim=(0, 1.05))
    losses.plot(*curve(run, "loss"), color="#222222")
    losses.set(title="loss")
    accuracy.plot(*curve(run, "knn"), color="#222222", marker=".")
    accuracy.axhline(run.series["knn_random_encoder"][0] or 0.0, color="#666666", linestyle="--")
    accuracy.set(title="k-NN accuracy (dashed: random encoder)")
    for axes in (ranks, deviations, losses, accuracy):
        axes.set_xlabel("epoch")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(out, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    pyplot.rcParams.update({"svg.hashsalt": "fastrdm", "svg.fonttype": "none", "font.size": 8})
    runs = {(run.data, run.arm, run.seed): run for run in load()}
    for picture in PICTURES:
        draw(runs[picture.data, picture.arm, picture.seed], picture.title, DOCS / f"collapse_{picture.state}.svg")


if __name__ == "__main__":
    main()
