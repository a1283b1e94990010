"""Fine-tuning learns what frozen features do not hold, at a rate of its own for encoder and head."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastrdm.evaluation.evaluator import Evaluator, Machine
from fastrdm.evaluation.finetune import classified, finetune
from fastrdm.evaluation.settings import FinetuneConfig, LinearConfig
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import ViewSpec
from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder

SILENT = Machine(torch.device("cpu"), False, 64, 1)
VIEW = ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Stripes(Source):
    """Noise with a bright row for class 0 and a bright column for class 1, in memory."""

    name = "stripes"

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.classes = ["row", "column"]
        self.labels = np.arange(count) % 2
        self.images = random.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
        for image, label, place in zip(self.images, self.labels, random.integers(1, 7, count), strict=True):
            (image if label == 0 else image.transpose(1, 0, 2))[place] += 130

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Any:
        return self.images[index]


def collapsed() -> Encoder:
    """An encoder that gives the same features for every image."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet_small", stem="cifar", width=4))
    with torch.no_grad():
        encoder.bn1.weight.zero_()  # type: ignore[operator,union-attr]
        encoder.bn1.bias.fill_(0.1)  # type: ignore[operator,union-attr]
    return encoder.eval()


def measures(train: Source, test: Source) -> Evaluator:
    return Evaluator(collapsed(), VIEW, train, test, SILENT, lambda _: None)


def test_fine_tuning_beats_frozen_features_that_hold_nothing() -> None:
    m = measures(Stripes(400, 0), Stripes(200, 1))
    before = {key: x.clone() for key, x in m.encoder.state_dict().items()}
    frozen = m.linear(LinearConfig(epochs=5))
    config = FinetuneConfig(epochs=12, lr=0.5, head_lr=1.0, batch_size=40, scale=(0.6, 1.0))
    tuned = m.finetune(config, 1.0)
    assert frozen["top1"]["share"] == 0.5
    assert tuned["top1"]["share"] > 0.9
    assert all(torch.equal(x, before[key]) for key, x in m.encoder.state_dict().items()), "a copy was tuned"
    assert "top5" not in tuned, "there are two classes"


def test_a_share_of_the_labels_is_what_is_trained_on() -> None:
    m = measures(Stripes(400, 0), Stripes(40, 1))
    config = FinetuneConfig(epochs=1)
    found = [m.finetune(config, share) for share in (0.01, 0.1)]
    assert [(f["labels"], f["train_images"], f["batch_size"]) for f in found] == [(0.01, 4, 4), (0.1, 40, 40)]
    assert m.finetune(config, 0.1) == found[1]


def loader_of(count: int) -> Any:
    source = Stripes(count, 0)
    m = measures(source, source)
    return m._loader(FinetuneConfig(), source, 20)


@pytest.mark.parametrize(("lr", "head_lr", "moved"), [(0.0, 1.0, {"1"}), (1.0, 0.0, {"0"}), (0.1, 0.1, {"0", "1"})])
def test_encoder_and_head_have_rates_of_their_own(lr: float, head_lr: float, moved: set[str]) -> None:
    torch.manual_seed(1)
    encoder = build_encoder(EncoderConfig(name="resnet_small", stem="cifar", width=4))
    config = FinetuneConfig(epochs=2, lr=lr, head_lr=head_lr)
    start = dict(
        finetune(FinetuneConfig(epochs=1, lr=0, head_lr=0), encoder, 2, loader_of(40), 20, print).named_parameters()
    )
    ended = dict(finetune(config, encoder, 2, loader_of(40), 20, print).named_parameters())
    assert {name[0] for name, x in ended.items() if not torch.equal(x, start[name])} == moved


def test_fine_tuning_that_diverges_is_told() -> None:
    with pytest.raises(ValueError, match=r"diverged in epoch \d: lower finetune\.lr=1e\+30"):
        finetune(FinetuneConfig(epochs=3, lr=1e30, head_lr=1e30), collapsed(), 2, loader_of(40), 20, print)


def test_images_without_label_are_not_counted() -> None:
    images = torch.eye(4).view(4, 4)
    batches = [(images, torch.arange(4), torch.tensor([0, 1, -1, 0]))]
    assert classified(nn.Identity(), batches, (1, 4)) == ([2, 3], 3)


def test_answers_are_counted_without_a_wait_for_each_batch() -> None:
    """On a GPU a number that is read, and rows chosen by truth values, are waits for all that was queued before."""
    pytest.importorskip("triton")
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    batch = torch.eye(4), torch.arange(4), torch.tensor([0, 1, -1, 0])
    found = launches(lambda: classified(nn.Identity(), [batch] * 3, (1, 4)))
    assert found.count("gather") == 3, "once a batch"
    assert not {"_local_scalar_dense", "nonzero", "index", "masked_select"} & set(found), found


def test_a_set_too_small_to_hold_some_out_is_told() -> None:
    m = measures(Stripes(2, 0), Stripes(4, 1))
    with pytest.raises(ValueError, match=r"linear\.held_out=0\.1 leaves no image to learn from: give one"):
        m.linear(LinearConfig(epochs=1))
    assert m.linear(LinearConfig(epochs=1, rates=(0.1,)))["rates"][0]["held_out_top1"] is None


def test_augmented_features_come_from_the_frozen_encoder() -> None:
    m = measures(Stripes(40, 0), Stripes(20, 1))
    before = {key: x.clone() for key, x in m.encoder.state_dict().items()}
    m.linear(LinearConfig(epochs=2, augment=True, batch_size=16))
    assert all(torch.equal(x, before[key]) for key, x in m.encoder.state_dict().items())
