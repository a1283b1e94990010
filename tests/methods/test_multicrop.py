"""Two global views and local crops: every preset takes them, each resolution in one pass, ViTs through timm."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.config import run_config
from fastrdm.kernels.batchnorm import set_views
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.methods.losses import find_loss
from fastrdm.methods.presets import PRESETS
from fastrdm.models.encoders import TimmEncoder
from fastrdm.trainer import Trainer

Build = Callable[..., DualBranch]
Draw = Callable[..., list[Tensor]]
VIEWS = [{"size": 16}, {"size": 16, "solarize": 0.2}, {"size": 8}, {"size": 8}]


def make(preset: str, **sections: Any) -> Trainer:
    small: dict[str, Any] = {
        "preset": preset,
        "train": {"length": "20st"},
        "encoder": {"name": "resnet_small", "width": 4},
        "method": {"projector": {"hidden": 16, "out": 12}},
        "loader": {"source": "digits", "batch_size": 16, "views": VIEWS},
        "optim": {"warmup": "0st"},
        "evaluate": {"baselines": False},
    }
    return Trainer(run_config.resolve(small, *({name: section} for name, section in sections.items())))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_pairs_each_view_with_the_other_global_ones(preset: str) -> None:
    trainer = make(preset)
    for batch in itertools.islice(trainer.loader, 2):
        output = trainer.train_step(batch)
        trainer.step += 1
    assert [view.shape[-1] for view in batch.views] == [16, 16, 8, 8]
    count = trainer.settings.method.target_views
    assert len(output.online) == 4 and len(output.target) == count == (4 if preset == "fastsiam" else 2)
    alignment = trainer.settings.method.alignment
    loss = find_loss(alignment.name).formula
    online = output.scores[0] if output.scores else output.online
    if alignment.targets == "pairs":
        met = [(v, output.target[t]) for v, t in ((0, 1), (1, 0), *itertools.product((2, 3), (0, 1)))]
    else:
        every = [[t for t in range(count) if t != v or alignment.targets == "center"] for v in range(4)]
        met = [(v, output.target[ts].mean(0)) for v, ts in enumerate(every)]
    expected = sum(loss(online[v], target, alignment) for v, target in met)
    expected = alignment.weight * expected / (len(met) if alignment.directions == "mean" else 1)
    found = next(iter(output.terms.values()), output.loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bn_views", ["per_view", "joint"])
def test_one_encoder_pass_for_a_resolution_and_one_of_the_projector(branch: Build, views: Draw, bn_views: str) -> None:
    method, images = branch({"bn_views": bn_views}), views(8, 8, 4, 4)
    alone, seen = copy.deepcopy(method.online), []
    method.online.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    method.online.projector[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    found = method.online(images, None)
    assert seen == [(16, 3, 8, 8), (16, 3, 4, 4), (32, 6)]
    set_views(alone, 1)
    if bn_views == "per_view":
        expected = torch.cat([alone.projector(alone.encoder(view)) for view in images])
    else:
        features = [alone.encoder(torch.cat(images[:2])), alone.encoder(torch.cat(images[2:]))]
        expected = alone.projector(torch.cat(features))
    torch.testing.assert_close(found.projection.flatten(0, 1), expected, rtol=0, atol=1e-12)


def test_durations_beyond_the_run_are_told() -> None:
    assert list(make("dino").method.unfinished_durations()) == [
        "method.online.0.freeze=1ep is not over within this run: the prototypes never learn",
        "method.target.0.freeze=1ep is not over within this run: the prototypes never learn",
        "method.target.1.warmup=50ep is not over within this run: the temperature rises over the whole run instead",
    ]
    long = {"train": {"length": "60ep"}}
    assert list(make("dino", **long).method.unfinished_durations()) == []
    swav = make("swav", train={"length": "40ep"}, method={"target": {"1": {"queue": 32}}})
    assert list(swav.method.unfinished_durations()) == [
        "method.target.1.queue_start=50ep is not over within this run: the queue is never used"
    ]
    assert (
        list(
            make("swav", train={"length": "40ep"}, method={"target": {"1": {"queue": 0}}}).method.unfinished_durations()
        )
        == []
    )


def vit(**encoder: Any) -> Trainer:
    """DINO with a small ViT on 2 x 32 + 2 x 16 px, its decay rising."""
    pytest.importorskip("timm")
    options = {"dynamic_img_size": True, "drop_path_rate": 0.3, "patch_size": 8, "img_size": 32}
    views = [{"size": 32}, {"size": 32}, {"size": 16}, {"size": 16}]
    optim = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0}
    return make(
        "dino",
        encoder={"name": "timm/test_vit", "width": None, "options": options, **encoder},
        loader={"views": views},
        optim={**optim, "clip_grad_of": "each"},
    )


def test_vit_with_crops_of_two_sizes() -> None:
    trainer = vit()
    before = {name: p.detach().clone() for name, p in trainer.method.online.named_parameters()}
    for batch in itertools.islice(trainer.loader, 2):
        output = trainer.train_step(batch)
        trainer.step += 1
        assert output.loss.isfinite() and output.online.shape == (4, 16, 4096) and output.target.shape == (2, 16, 4096)
    still = [name for name, p in trainer.method.online.named_parameters() if torch.equal(p, before[name])]
    assert still == ["prototypes.weight"]
    decays = {group["name"]: float(group.get("decay", 0)) for group in trainer.optimizer.param_groups}
    rising = 0.04 + 0.36 * (1 - torch.cos(torch.tensor(torch.pi / 20))) / 2  # at step 1 of 20
    assert decays["network"] == pytest.approx(rising.item(), abs=1e-6)
    assert decays["network.bias_norm"] == decays["probe"] == 0


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (
            20,
            {"dynamic_img_size": True, "patch_size": 8},
            r"size must suit the encoder, got 20: .*divisible by patch size",
        ),
        (
            16,
            {"dynamic_img_size": False},
            r"size must suit the encoder, got 16: .*; ViTs take other sizes with encoder.opt",
        ),
    ],
)
def test_crops_that_a_vit_cannot_take_are_refused_before_training(size: int, options: Any, message: str) -> None:
    pytest.importorskip("timm")
    views = [{"size": 32}, {"size": 32}, {"size": size}]
    encoder = {"name": "timm/test_vit", "width": None, "options": {"img_size": 32, **options}}
    with pytest.raises(ValueError, match=message):
        make("dino", encoder=encoder, loader={"views": views})


def test_the_target_of_a_vit_drops_no_path() -> None:
    trainer = vit()
    assert trainer.method.target is not None
    for network, rates in ((trainer.method.online, True), (trainer.method.target, False)):
        drops = [module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")]
        assert drops and any(drops) is rates


def test_patches_keep_their_first_embedding() -> None:
    trainer = vit(freeze_patch_embed=True)
    encoder = trainer.method.online.encoder
    assert isinstance(encoder, TimmEncoder)
    before = copy.deepcopy(encoder.model.state_dict())
    trainer.train_step(next(iter(trainer.loader)))
    moved = {name for name, x in encoder.model.state_dict().items() if not torch.equal(x, before[name])}
    assert "cls_token" in moved and "blocks.0.attn.qkv.weight" in moved
    assert not [name for name in moved if name.startswith("patch_embed")]
