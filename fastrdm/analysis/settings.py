"""Settings of the analysis while a run goes on. No torch."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm.schema import STRICT, Duration

IMAGES_PER_DIMENSION = 10
"""Images for each dimension below which a metric is called biased."""

MIN_IMAGES = 5000
"""Images that an analysis takes at least, where the set has them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AnalysisConfig:
    """The analysis while a run goes on; see docs/theory.md.

    The weights are frozen meanwhile, and nothing is changed.
    """

    every: Duration = "0st"
    """Time between two analyses, such as 10ep; one more is made at the start and at the end of the run. `0st` makes
    none.
    """

    images: int | None = Field(default=None, ge=1)
    """Images that are analyzed. `null` takes 10 for each dimension of the output and at least 5,000, as far as the set
    has them.
    """

    split: Literal["train", "test"] = "train"
    """Split of the data set whose images are analyzed."""

    replicates: int = Field(default=100, ge=10)
    """Bootstrap samples for the confidence intervals."""
