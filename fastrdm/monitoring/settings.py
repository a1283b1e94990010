"""Settings of the monitor and its alarms, and the conventions of effective rank by name. No torch."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm.schema import STRICT, Duration, require

Convention = Literal[
    "erank_l/unit/moment",
    "erank_l/unit/cov",
    "erank_l/raw/moment",
    "erank_l/raw/cov",
    "erank_s/unit/moment",
    "erank_s/unit/cov",
    "erank_s/raw/moment",
    "erank_s/raw/cov",
]
HEADLINE_CONVENTION: Convention = "erank_l/unit/moment"
CENTERED_CONVENTION: Convention = "erank_l/unit/cov"

Action = Literal["warn", "stop", "checkpoint_and_stop"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlarmsConfig:
    """Conditions of the alarms, and what they do. Ranks are `erank_l/unit/cov/batch`, deviations `std/batch`.

    Both are judged at the target, before the projector's last BatchNorm and at the encoder's features, and a complete
    collapse at the online branch too; an alarm of a tap is raised once, and again after its condition has ended.
    """

    action: Action = "warn"
    """Effect of an alarm besides its log line: warn goes on, stop ends the run, checkpoint_and_stop saves first.
    A loss that is not finite always stops the run.
    """

    complete_std: float = Field(default=0.1, ge=0)
    """Complete collapse needs a standard deviation below this. A healthy branch has about 1."""

    complete_rank: float = Field(default=1.2, ge=0)
    """Complete collapse also needs an effective rank `erank_l/unit/moment/batch` below this."""

    complete_patience: Duration = "5%"
    """Time for which the signs of complete collapse must last before the alarm."""

    dimensional_rank: float = Field(default=2.0, ge=0)
    """Dimensional collapse is an effective rank `erank_l/unit/cov/batch` below this."""

    dimensional_patience: Duration = "5%"
    """Time for which the rank must stay below `dimensional_rank` before the alarm."""

    falling_share: float = Field(default=0.33, ge=0, le=1)
    """A falling rank is one below this share of its highest value since `falling_after`."""

    falling_after: Duration = "30%"
    """Time from which on the highest rank is tracked. The rank of an untrained network falls in every run, so the start
    is left out.
    """

    falling_patience: Duration = "5%"
    """Time for which the rank must stay below `falling_share` of its highest value before the alarm."""

    floor_share: float = Field(default=0.01, ge=0, le=1)
    """The loss counts as being at its floor below this share of the distance from the lowest possible loss to that of
    unrelated views.
    """

    floor_patience: Duration = "5%"
    """Time for which the loss must stay at its floor before the alarm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MonitorConfig:
    """Measurements of both branches besides the loss; see docs/monitoring.md. None of them touches the weights."""

    every: Duration = "5%"
    """Time between the starts of two windows, whose rows give ranks and spectra. `0st` measures single batches only."""

    rows: int | None = Field(default=None, ge=1)
    """Rows of a window. `null` takes 10 for each dimension of the widest layer that is measured in full."""

    max_width: int = Field(default=2048, ge=2, le=4096)
    """Largest number of dimensions of a layer that is measured in full. Wider layers are measured on a sample of as
    many rows.
    """

    groups: int = Field(default=8, ge=0, le=32)
    """Groups of batches, or of images where a window has few batches, from which confidence intervals are computed: 4
    to 32. `0` computes none, and so does a batch with fewer images than groups.
    """

    conventions: tuple[Convention, ...] = (HEADLINE_CONVENTION, CENTERED_CONVENTION)
    """Conventions of effective rank that are logged for every window, such as erank_l/unit/moment; see
    docs/monitoring.md. The two defaults must be among them.
    """

    alarms: AlarmsConfig = AlarmsConfig()

    def __post_init__(self) -> None:
        require(not 0 < self.groups < 4, "groups", "0 (no interval) or 4 to 32", self.groups)
        missing = [c for c in (HEADLINE_CONVENTION, CENTERED_CONVENTION) if c not in self.conventions]
        require(
            not missing,
            "conventions",
            f"a list with {HEADLINE_CONVENTION} and {CENTERED_CONVENTION}",
            list(self.conventions),
        )
