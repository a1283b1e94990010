"""TensorBoard and Weights & Biases: metrics, settings, where the report will be, pictures of views and of spectra."""

import secrets
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

from fastrdm.loaders.spec import ViewSpec

PICTURED = 8  # images whose views are shown
REPORT = "report.html"  # in the run's folder, written when the run ends


class Tracker(Protocol):
    """The interface of a service that shows runs: what a run reports to it."""

    name: str

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Show a picture (H, W, 3) uint8."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of a run. What a killed run wrote after `step` is hidden."""

    name = "TensorBoard"

    def __init__(self, run: Path, step: int, settings: Mapping[str, Any]) -> None:
        writer, _ = _modules("tensorboard", "torch.utils.tensorboard", "matplotlib")
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread
        self.writer = writer.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else 0)
        # Markdown: four spaces before a line make it code.
        shown = yaml.safe_dump(dict(settings), sort_keys=False).replace("\n", "\n    ")
        self.writer.add_text("settings", f"    {shown}", step)
        self.writer.add_text("report", f"`{(run / REPORT).resolve()}`", step)

    def _of_thread(self, raised: Any) -> None:
        """What TensorBoard's writing thread raises, as on a full disk, is raised again by the next write or close."""
        if type(raised.thread).__name__ != "_AsyncWriterThread":
            self._hook(raised)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        threading.excepthook = self._hook


class WandB:
    """A run of a project on Weights & Biases, named as the run's folder."""

    name = "W&B"

    def __init__(self, project: str, run: Path, settings: Mapping[str, Any]) -> None:
        self.wandb, _ = _modules("wandb", "wandb", "matplotlib")
        self.run = self.wandb.init(
            project=project, id=_wandb_id(run), name=run.name, dir=str(run), config=dict(settings), resume="allow"
        )
        self.run.summary["report"] = str((run / REPORT).resolve())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb_id(run: Path) -> str:
    """The run's name on W&B, kept in its folder: folders of one name are different runs, a moved one is the same."""
    file = run / "wandb-id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()


def _modules(extra: str, *names: str) -> list[Any]:
    """The modules; ValueError names the extra that brings them where one is not installed."""
    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        missing = extra if error.name is None or extra in error.name else error.name
        raise ValueError(f"log.{extra} needs {missing}: pip install 'fastrdm[{extra}]'") from None


def view_picture(views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> np.ndarray:
    """The first images of a batch, a row for each view: (H, W, 3) uint8, without normalization.

    `views`: for each view (B, 3, H_v, W_v), normalized as its spec says. Smaller views stand on gray.
    """
    side = max(view.shape[-1] for view in views)
    rows = []
    for view, spec in zip(views, specs, strict=True):
        few = view[:PICTURED].float().cpu()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
        row = torch.full((len(few), 3, side, side), 0.5)
        row[:, :, : few.shape[2], : few.shape[3]] = few * std + mean
        rows.append(row.permute(2, 0, 3, 1).reshape(side, -1, 3))
    return (torch.cat(rows).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def spectrum_picture(record: Mapping[str, Any]) -> np.ndarray:
    """Eigenvalues over their rank, both on logarithmic axes, from a line of spectra.jsonl: (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="share of the sum")
    axes.plot(record["ranks"], record["eigenvalues"])
    axes.set_title(f"{record['tap']}, {record['convention']}", fontsize="medium")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
