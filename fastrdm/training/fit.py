"""Settings of presets, recipes and defaults made to fit a smaller set or a shorter run, and what is told of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastrdm.config.run_config import Config
from fastrdm.loaders.sources.source import Source, Subset
from fastrdm.schema import Horizon, require

Given = Callable[[str], bool]
"""Whether a user set the key, on the command line or in a file of their own."""


def evaluation_bank(source: Source, size: int | None) -> tuple[Source, list[str]]:
    """The training images among which k-NN looks for neighbors: `size` of them, as even over the classes as they allow.

    The first images of each class are taken. A set that has no more images than `size` is used whole, and told.
    """
    if size is None or size == len(source):
        return source, []
    if size > len(source):
        return source, [f"note: evaluate.bank={size}, but the set has {len(source):,} images: k-NN uses all of them"]
    classes, counts = np.unique(source.labels, return_counts=True)
    # as many of each class as it has, but at most `level`; then one more of the first classes that have one
    level = next(n for n in range(counts.max(), -1, -1) if np.minimum(counts, n).sum() <= size)
    shares = np.minimum(counts, level)
    shares[np.flatnonzero(counts > level)[: size - shares.sum()]] += 1
    chosen = [np.flatnonzero(source.labels == label)[:share] for label, share in zip(classes, shares, strict=True)]
    return Subset(source, np.sort(np.concatenate(chosen))), []


def fit_views(settings: Config, source: Source, given: Given) -> tuple[Config, list[str]]:
    """Views that nobody set, and that are far larger than the images of a set in memory, become as large as these."""
    views = settings.loader.views
    if source.images is None or given("loader.views.0.size"):
        return settings, []
    side, largest = min(source.images.shape[1:3]), max(view.size for view in views)
    if largest <= side * settings.loader.max_enlarge:
        return settings, []
    smaller = tuple(replace(v, size=max(round(v.size * side / largest), 1), progressive=()) for v in views)
    note = f"note: the images of {source.name} have {side} px: views of {side} px are drawn instead of {largest}"
    return replace(settings, loader=replace(settings.loader, views=smaller)), [note]


STEPS_AN_EPOCH = 4  # at least, where a batch is made smaller
SMALLEST_BATCH = 32  # images; BatchNorm gets noisy below


def fit_batch(
    settings: Config, images: int, processes: int, given: Given, stored: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """A batch that nobody set, and that a set of `images` or `processes` cannot make, becomes smaller.

    For a set that is smaller than the batch it becomes a power of two of at most a quarter of the set, but no less than
    32 images; docs/small_sets.md has the runs behind these numbers. A run that goes on keeps the batch of `stored`, the
    configuration in its newest checkpoint.
    """
    if given("loader.batch_size"):
        return settings, []
    batch, parts = settings.loader.batch_size, processes * settings.train.accumulate
    if isinstance(kept := ((stored or {}).get("loader") or {}).get("batch_size"), int) and kept > 0:
        told = [] if kept == batch else [f"note: loader.batch_size={kept}, as this run began"]
        return replace(settings, loader=replace(settings.loader, batch_size=kept)), told
    if batch <= images and batch % parts == 0:
        return settings, []
    fitted = batch
    if batch > images:
        fitted = min(max(2 ** ((images // STEPS_AN_EPOCH).bit_length() - 1), SMALLEST_BATCH), images) if images else 0
    fitted -= fitted % parts
    if fitted == 0:
        return settings, []
    what = f"the {images:,} images of the set" if batch > images else f"{parts} equal parts"
    note = f"note: loader.batch_size={batch} does not fit {what}: {fitted} are used"
    return replace(settings, loader=replace(settings.loader, batch_size=fitted)), [note]


def fit_warmup(settings: Config, horizon: Horizon, given: Given) -> tuple[Config, list[str]]:
    """A warm-up that is longer than the run becomes a tenth of it; ValueError when the user asked for its length."""
    warmup = settings.optim.warmup
    if horizon.steps(warmup) <= horizon.total:
        return settings, []
    longest = f"no longer than the run of {horizon.total} steps, such as 10%"
    require(not given("optim.warmup"), "optim.warmup", longest, warmup)
    shorter = replace(settings, optim=replace(settings.optim, warmup="10%"))
    return shorter, [f"note: optim.warmup={warmup} is longer than the run of {horizon.total} steps: 10 % of it is used"]
