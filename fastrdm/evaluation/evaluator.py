"""The measurements of `fastrdm eval` on one encoder and one set of images: k-NN, linear probe, fine-tuning."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastrdm.evaluation.features import FeatureSet, feature_set
from fastrdm.evaluation.finetune import classified, finetune
from fastrdm.evaluation.knn import knn_hits, wilson_interval
from fastrdm.evaluation.linear_probe import Features, Task, cached_batches, linear_probe
from fastrdm.evaluation.settings import FinetuneConfig, FitConfig, KnnConfig, LinearConfig
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.checks import no_accuracy
from fastrdm.loaders.sources.source import Source, Subset
from fastrdm.loaders.spec import Loader, ViewSpec
from fastrdm.loaders.supervised import crop_and_flip, labeled_share, supervised_loader
from fastrdm.models.encoders import Encoder


class Machine(NamedTuple):
    """Device, precision and batch size with which the encoder runs."""

    device: torch.device
    bf16: bool  # autocast of the frozen encoder and of fine-tuning
    batch_size: int  # images a pass where nothing is trained
    workers: int  # decoding threads


class Evaluator:
    """Measures one encoder on the labeled images of a source, whose features are computed once."""

    def __init__(
        self,
        encoder: Encoder,
        view: ViewSpec,
        train: Source,
        test: Source,
        machine: Machine,
        tell: Callable[[str], None],
    ) -> None:
        """ValueError if an accuracy on these splits would mean nothing, for want of labels or of common classes."""
        if not len(test):
            raise ValueError(f"{train.name} has no images to test on: set some aside with --holdout 0.2")
        if reason := no_accuracy(train, test):
            raise ValueError(f"{reason}: an accuracy would mean nothing")
        self.encoder = encoder.to(machine.device).to(memory_format=torch.channels_last)
        self.view, self.machine, self.tell = view, machine, tell
        self.train, self.test = _labeled(train), _labeled(test)
        self.unread: list[str] = []  # images that could not be decoded, and take no part
        self.tops = (1, 5) if len(train.classes) > 5 else (1,)
        self.finetuned: nn.Sequential | None = None  # encoder and classifier of the last call of `finetune`

    def knn(self, config: KnnConfig) -> dict[str, Any]:
        """k-NN accuracy: a weighted vote among the nearest training images."""
        bank, query = self.features
        hits, of = knn_hits(bank, query, config.k, config.temperature, self.tops)
        return self._accuracy(hits, of)

    def linear(self, config: LinearConfig) -> dict[str, Any]:
        """Accuracy of a linear classifier on the frozen encoder."""
        bank, query = self.features
        held_out = torch.zeros(len(bank.labels), dtype=torch.bool, device=bank.labels.device)
        held_out[torch.from_numpy(labeled_share(self.train.labels, config.held_out, config.seed))] = True
        if len(config.rates) > 1 and bool(held_out.all()):
            raise ValueError(
                f"linear.held_out={config.held_out:g} leaves no image to learn from: give one of linear.rates"
            )
        size = min(config.batch_size, len(self.train))
        loader = self._loader(config, self.train, size) if config.augment else None

        def epoch(number: int) -> Iterable[Features]:
            if loader is None:
                return cached_batches(bank, size, config.seed, number)
            loader.set_epoch(number)
            return ((self._encode(batch.views[0]), batch.label, batch.index) for batch in loader)

        found = linear_probe(config, Task(bank, held_out, query, epoch, size), self.tops, self.tell)
        if loader is not None:
            loader.close()
        accuracy = self._accuracy(found.hits, len(query.labels))
        return {**accuracy, "batch_size": size, "rate": found.rate, "rates": found.rates}

    def finetune(self, config: FinetuneConfig, share: float) -> dict[str, Any]:
        """Accuracy after training encoder and classifier on `share` of the labels."""
        some = Subset(self.train, labeled_share(self.train.labels, share, config.seed))
        size = min(config.batch_size, len(some))
        loader, faults = self._loader(config, some, size), dict[int, str]()
        with self._precision():
            model = finetune(config, self.encoder, len(self.train.classes), loader, size, self.tell)
            self.finetuned = model
            hits, of = classified(model, self._center_views(self.test, faults), self.tops)
        loader.close()
        self.unread += [*loader.faults.values(), *faults.values()]
        return {**self._accuracy(hits, of), "labels": share, "train_images": len(some), "batch_size": size}

    @cached_property
    def features(self) -> tuple[FeatureSet, FeatureSet]:
        """Features of both splits; images that cannot be decoded leave the set."""
        found = []
        for split in ("train", "test"):
            source, faults = getattr(self, split), dict[int, str]()
            self.tell(f"features of {len(source):,} {split} images")
            made = feature_set(self._encode, self._center_views(source, faults))
            bad = int((~made.features.isfinite().all(1)).sum())
            if bad:
                raise ValueError(
                    f"the features of {bad:,} of {len(source):,} {split} images are not finite: nothing can be measured"
                    + (" in bf16, try --precision fp32" if self.machine.bf16 else "")
                )
            found.append(made)
            if faults:
                self.unread += faults.values()
                readable = np.setdiff1d(np.arange(len(source)), list(faults))
                setattr(self, split, Subset(source, readable))
        return found[0], found[1]

    def _encode(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self._precision():
            return self.encoder(images).float()  # type: ignore[no-any-return]

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.machine.device.type, torch.bfloat16) if self.machine.bf16 else nullcontext()

    def _center_views(self, source: Source, faults: dict[int, str]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        m = self.machine
        return evaluation_batches(source, self.view, m.batch_size, device=m.device, workers=m.workers, faults=faults)

    def _loader(self, config: FitConfig, source: Source, size: int) -> Loader:
        view = crop_and_flip(self.view, config.scale, config.flip)
        m = self.machine
        return supervised_loader(source, view, size, seed=config.seed, workers=m.workers, device=m.device)

    def _accuracy(self, hits: list[int], of: int) -> dict[str, Any]:
        return {f"top{top}": _share(right, of) for top, right in zip(self.tops, hits, strict=True)}


def _share(right: int, of: int) -> dict[str, float]:
    low, high = wilson_interval(right, of)
    return {"share": right / of, "low": low, "high": high, "right": right, "of": of}


def _labeled(source: Source) -> Source:
    known = np.flatnonzero(source.labels >= 0)
    return source if len(known) == len(source) else Subset(source, known)


def sized(view: ViewSpec, size: int | None) -> ViewSpec:
    """Return `view` at `size` pixels; unchanged if `size` is None."""
    return view if size is None else replace(view, size=size)
