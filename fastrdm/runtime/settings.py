"""Settings of checkpoints, log and profiler. No torch."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm.schema import STRICT, Duration


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """How often checkpoints are written, and which of them are kept."""

    every: Duration = "1ep"
    """Time between two checkpoints. `0st` saves at the end of the run, and when it is asked to stop."""

    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""

    best: bool = True
    """Keep the checkpoint with the best k-NN accuracy as well."""

    store: str | None = None
    """URL of a folder of this run's own on an object store, such as s3://bucket/run1, that every checkpoint is copied
    to while training goes on. A run whose own folder has none, or older ones, continues from there.
    """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileConfig:
    """Steps that torch's profiler records on the main process, into the run's folder. They take longer meanwhile."""

    start: Duration = "20st"
    """Time before the first recorded step."""

    steps: int = Field(default=10, ge=1, le=1000)
    """Number of recorded steps, each with its wait for data."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """Logging of metrics, the report and the profiler."""

    every: int = Field(default=50, ge=1)
    """Steps between two lines of metrics. The host waits for the device only then."""

    tensorboard: bool = False
    """Write metrics, settings and pictures of views and spectra for TensorBoard as well."""

    wandb: str | None = None
    """Project on Weights & Biases that gets metrics, settings and pictures of views and spectra as well. `null` sends
    nothing.
    """

    report: bool = True
    """Write report.html into the run's folder when the run ends."""

    profile: ProfileConfig | None = None
    """Steps that torch's profiler records, such as `log.profile.steps=10`. `null` records none."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak arithmetic of one device at train.precision, in TFLOP/s, against which utilization is measured. `null` looks
    known GPUs up.
    """
