"""Draw docs/collapse_*.svg, a run of each state of the record: `python -m benchmarks.plots.collapse`."""

from typing import NamedTuple

from benchmarks import common
from benchmarks.plots import style
from benchmarks.verdict.record import Labelled, load

TAPS = {"target": style.COLORS[0], "online": style.COLORS[1]}
RANKS = (1, 2, 5, 10, 20, 50)


class Picture(NamedTuple):
    """The run of the record that shows a state."""

    state: str
    data: str
    arm: str
    seed: int
    title: str


PICTURES = (
    Picture("healthy", "digits", "rdm_byol", 2, "Healthy: rdm_byol on digits"),
    Picture("weak", "digits", "byol", 2, "Weak: byol on digits, with a learning rate and an average that do not fit"),
    Picture("dimensional", "digits", "symsimsiam", 0, "Dimensional collapse: symsimsiam on digits"),
    Picture("complete", "digits", "dino_no_centering", 0, "Complete collapse: dino on digits, without its centering"),
)


def curve(run: Labelled, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a metric."""
    pairs = [(line["epoch"], line[key]) for line in run.lines if key in line]
    return [x for x, _ in pairs], [y for _, y in pairs]


def drawing(run: Labelled, title: str) -> str:
    """Rank about the mean, deviation, loss and k-NN accuracy over epochs, side by side, as SVG."""
    with style.settings():
        figure, (ranks, deviations, losses, accuracies) = style.subplots(11.0, 2.8, 1, 4)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for (tap, color), stroke in zip(TAPS.items(), style.STROKES, strict=False):
            ranks.plot(*curve(run, f"{tap}/erank_l/unit/cov/batch"), stroke, color=color, label=tap)
            deviations.plot(*curve(run, f"{tap}/std/batch"), stroke, color=color, label=tap)
        ranks.set(title="rank about the mean", yscale="log", ylim=(0.9, 90))
        ranks.set_yticks(RANKS, map(str, RANKS))
        ranks.minorticks_off()
        ranks.legend()
        deviations.set(title="deviation", ylim=(-0.02, 1.05))
        losses.plot(*curve(run, "loss"), color=style.COLORS[-1])
        losses.set(title="loss")
        accuracies.plot(*curve(run, "knn"), color=style.COLORS[-1], marker="o", markersize=3, label="trained")
        accuracies.axhline(curve(run, "knn_random_encoder")[1][0], color=style.GRAY, linestyle="--", label="random")
        accuracies.set(title="k-NN accuracy", ylim=(0.3, 1.0))
        accuracies.legend()
        for axes in (ranks, deviations, losses, accuracies):
            axes.set(xlabel="epoch", xlim=(0, None))
            axes.locator_params(axis="x", steps=[1, 5, 10])
        return style.svg(figure)


def drawings() -> dict[str, str]:
    """Name and SVG of every picture."""
    runs = {(run.data, run.arm, run.seed): run for run in load()}
    return {f"collapse_{p.state}.svg": drawing(runs[p.data, p.arm, p.seed], p.title) for p in PICTURES}


def main() -> None:
    """Write the pictures into docs/."""
    common.parser(__doc__).parse_args()
    common.require_packages("matplotlib")
    for name, picture in drawings().items():
        (common.ROOT / "docs" / name).write_text(picture)


if __name__ == "__main__":
    main()
