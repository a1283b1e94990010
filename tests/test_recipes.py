"""Recipes hold the published numbers, every command of docs/reproduction.md loads, and every recipe trains."""

import itertools
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm.config import run_config
from fastrdm.config.run_config import RECIPES, Config
from fastrdm.loaders.sources.archives import Arrays
from fastrdm.loaders.sources.class_list import read_class_list
from fastrdm.loaders.spec import STATISTICS
from fastrdm.methods.presets import PRESETS
from fastrdm.trainer import Trainer

PAGE = (Path(__file__).parents[1] / "docs" / "reproduction.md").read_text()
SMALL = "cifar10/cpu", "cifar10/race", "imagenet/sample_cpu", "photos/"  # of no published row
NAMES = sorted(
    name for path in RECIPES.rglob("*/*.yaml") if not (name := str(path.relative_to(RECIPES))).startswith(SMALL)
)


def expanded(command: str) -> list[str]:
    """As a shell expands {a,b}."""
    parts = [part[1:-1].split(",") if part[:1] == "{" else [part] for part in re.split(r"(\{[^{}]*,[^{}]*\})", command)]
    return ["".join(choice) for choice in itertools.product(*parts)]


COMMANDS = [c for row in re.findall(r"^\| `(\w+/\w+\.yaml.*?)`", PAGE, re.MULTILINE) for c in expanded(row)]


@cache
def load(command: str) -> Config:
    return run_config.load(shlex.split(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_row_is_a_command(command: str) -> None:
    load(command)


def test_every_recipe_has_a_row_and_every_preset_one_for_each_data_set() -> None:
    named: dict[str, set[str]] = {"cifar10": set(), "imagenet100": set()}
    for command in COMMANDS:
        data, preset = command.split("/")[0], load(command).preset
        named.setdefault(data, set()).add(preset)
    aliases = {"rdm_simsiam", "rdm_byol"}  # of target0.5
    families = {"vicreg", "barlow_twins", "lejepa", "w_mse", "directpred", "directcopy", "fastsiam", "simdino", "tico"}
    families |= {"byol_koleo", "isoloss"}
    assert named["cifar10"] == PRESETS.keys() - aliases
    assert named["imagenet100"] == PRESETS.keys() - aliases - families, "the other families are on CIFAR-10 alone"
    assert named["imagenet"] >= {p for p in PRESETS if p.startswith("rdm_")} - aliases
    assert {c.split()[0] for c in COMMANDS} | {"cifar100/resnet18.yaml"} == set(NAMES)


@pytest.mark.parametrize("recipe", NAMES)
def test_heads_tell_command_hardware_and_result(recipe: str) -> None:
    head = [line for line in (RECIPES / recipe).read_text().splitlines() if line.startswith("# ")]
    assert head[0].startswith("# torchrun ") and f"fastrdm/train.py {recipe} " in head[0]
    text = " ".join(head)
    assert "GPU" in text and "Expected" in text and "Our result: not yet run." in text


@dataclass
class Published:
    """A column of the paper's scripts; two numbers are those of the two views."""

    epochs: int
    optimizer: str
    lr: float
    min_lr: float
    decay: float
    excluded: bool
    jitter: tuple[float, ...]  # brightness, contrast, saturation, hue
    blur: tuple[float, float]
    solarize: tuple[float, float]
    zero_init: bool
    head: tuple[int, int]  # hidden, out
    predictor: int | None = None
    ema: float | None = None
    prototypes: int | None = None


PHOTOGRAPHS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation
WEAK, BYOL, STRONG = (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2)
NO, HALF, SECOND, UNEQUAL = (0.0, 0.0), (0.5, 0.5), (0.0, 0.2), (1.0, 0.1)
SIMSIAM_HEAD, BYOL_HEAD, SWAV_HEAD, DINO_HEAD = (2048, 2048), (4096, 256), (2048, 128), (2048, 256)
CIFAR = {
    "simsiam": Published(1000, "sgd", 0.5, 0, 1e-5, False, WEAK, NO, NO, True, SIMSIAM_HEAD, predictor=512),
    "byol": Published(1000, "lars", 1.0, 0, 1e-5, True, BYOL, NO, SECOND, False, BYOL_HEAD, 4096, 0.99),
    "swav": Published(1000, "lars", 0.6, 6e-4, 1e-6, False, STRONG, NO, NO, False, SWAV_HEAD, prototypes=3000),
    "dino": Published(1000, "lars", 0.3, 0, 1e-6, True, BYOL, NO, SECOND, False, DINO_HEAD, None, 0.9995, 4096),
    "rdm_simsiam_log": Published(400, "sgd", 0.5, 0, 1e-5, False, WEAK, NO, NO, True, SIMSIAM_HEAD),
    "rdm_byol_log": Published(400, "lars", 1.0, 0, 1e-5, True, BYOL, NO, SECOND, False, BYOL_HEAD, None, 0.99),
}
IMAGENET100 = {
    "simsiam": Published(400, "sgd", 0.5, 0, 1e-5, False, WEAK, HALF, NO, True, SIMSIAM_HEAD, predictor=512),
    "byol": Published(400, "lars", 0.5, 0, 1e-5, True, BYOL, UNEQUAL, SECOND, False, BYOL_HEAD, 8192, 0.99),
    "swav": Published(400, "lars", 0.6, 6e-4, 1e-6, True, STRONG, HALF, NO, False, SWAV_HEAD, prototypes=3000),
    "dino": Published(400, "lars", 0.3, 0, 1e-6, True, BYOL, UNEQUAL, SECOND, False, DINO_HEAD, None, 0.9995, 4096),
    "rdm_simsiam_log": Published(400, "sgd", 0.5, 0, 1e-5, False, WEAK, HALF, NO, True, SIMSIAM_HEAD),
    "rdm_byol_log": Published(400, "lars", 0.5, 0, 1e-5, True, BYOL, UNEQUAL, SECOND, False, BYOL_HEAD, None, 0.99),
}


def found(c: Config) -> Published:
    """The same column, read from a resolved configuration."""
    views, method = c.loader.views, c.method
    jitter = {(v.brightness, v.contrast, v.saturation, v.hue) for v in views}
    assert len(jitter) == 1 and len(views) == 2
    (predictor,) = [t for t in method.online if t.name == "predictor"] or [None]
    counts = {t.count for t in (*method.online, *method.target) if t.name == "prototypes"} or {None}
    quarter = predictor and (predictor.hidden or method.projector.out // 4)
    return Published(
        epochs=int(c.train.length.removesuffix("ep")),
        optimizer=c.optim.name,
        lr=c.optim.lr,
        min_lr=c.optim.min_lr,
        decay=c.optim.weight_decay,
        excluded=c.optim.exclude_bias_norm,
        jitter=jitter.pop(),
        blur=(views[0].blur, views[1].blur),
        solarize=(views[0].solarize, views[1].solarize),
        zero_init=c.encoder.zero_init_residual,
        head=(method.projector.hidden, method.projector.out),
        predictor=quarter,
        ema=method.ema and method.ema.momentum,
        prototypes=counts.pop(),
    )


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("preset", CIFAR)
def test_published_cifar(preset: str, data: str) -> None:
    length = [f"train.length={CIFAR[preset].epochs}ep"] if preset.startswith("rdm") else []
    c = run_config.load([f"{data}/resnet18.yaml", f"preset={preset}", *length], published=True)
    assert found(c) == CIFAR[preset]
    common(c, size=32)
    assert (c.encoder.stem, c.loader.source, c.loader.classes) == ("cifar_padding2", data, None)
    assert c.loader.views[0].mean == STATISTICS[data][0] and c.loader.views[1].std == STATISTICS[data][1]


@pytest.mark.parametrize("preset", IMAGENET100)
def test_published_imagenet100(preset: str) -> None:
    name = "_".join(preset.split("_")[:2]) if preset.startswith("rdm_byol") else preset.split("_")[-2:][0]
    recipe = f"imagenet100/{name}.yaml"
    c = run_config.load([recipe, f"preset={preset}"], published=True)
    assert found(c) == IMAGENET100[preset]
    common(c, size=224)
    assert (c.encoder.stem, c.encoder.sync_bn, c.loader.classes) == ("imagenet", True, "imagenet100")
    assert c.loader.views[0].std == (0.229, 0.224, 0.225), "the authors' .228 is a slip"


def common(c: Config, size: int) -> None:
    """Settings that all pre-training scripts of solo-learn share (bash_files/pretrain, solo/methods/base.py)."""
    o = c.optim
    assert (c.encoder.name, c.loader.batch_size, c.train.precision) == ("resnet18", 256, "fp16")
    assert (o.warmup, o.warmup_lr, o.momentum, c.evaluate.probe_lr) == ("10ep", 3e-5, 0.9, 0.1)
    assert o.name == "sgd" or (o.eta, o.clip) == (0.02, True)
    for v in c.loader.views:
        assert (v.size, v.scale, v.interpolation, v.flip, v.jitter, v.grayscale) == (
            size,
            (0.08, 1.0),
            "bicubic",
            0.5,
            0.8,
            0.2,
        )
    for t in (*c.method.online, *c.method.target):
        if t.name == "sinkhorn":
            assert (t.epsilon, t.iterations, t.queue, t.queue_start) == (0.05, 3, 3840, "50ep")
        if t.name == "center_sharpen":
            assert (t.warmup_temperature, t.temperature, t.warmup, t.momentum) == (0.04, 0.07, "50ep", 0.9)
        if t.name == "prototypes":
            assert t.freeze == ("2ep" if c.preset == "swav" else "1ep")


@dataclass
class Lightly:
    """A row of lightly's benchmarks (docs/source/getting_started/benchmarks, March 2023)."""

    epochs: int
    batch: int
    optimizer: str
    rate: float  # as its script has it for this batch
    decay: float
    head: tuple[int, int, int, str]  # layers, hidden, out, last norm
    predictor: int | None
    ema: float | None
    prototypes: int | None
    scale: tuple[float, float]
    jitter: tuple[float, ...]
    solarize: tuple[float, float]
    interpolation: str
    views: int = 2
    targets: tuple[str, int] = ("pairs", 2)  # what a view is compared with, and how many views have targets


def lightly(c: Config, batch: int) -> Lightly:
    views, method = c.loader.views, c.method
    (predictor,) = [t.hidden for t in method.online if t.name == "predictor"] or [None]
    counts = {t.count for t in (*method.online, *method.target) if t.name == "prototypes"} or {None}
    (jitter,) = {(v.brightness, v.contrast, v.saturation, v.hue) for v in views}
    head = method.projector
    return Lightly(
        epochs=int(c.train.length.removesuffix("ep")),
        batch=c.loader.batch_size,
        optimizer=c.optim.name,
        rate=pytest.approx(c.optim.lr * batch / 256),  # type: ignore[arg-type]
        decay=c.optim.weight_decay,
        head=(head.layers, head.hidden, head.out, head.last_norm),
        predictor=predictor,
        ema=method.ema and method.ema.momentum,
        prototypes=counts.pop(),
        scale=views[0].scale,
        jitter=jitter,
        solarize=(views[0].solarize, views[1].solarize),
        interpolation=views[0].interpolation,
        views=len(views),
        targets=(method.alignment.targets, method.target_views),
    )


SIAM, BYOL2, SWAV2, DINO2 = (2, 2048, 2048, "affine"), (2, 1024, 256, "none"), (2, 512, 128, "none"), (2, 2048, 256)
LARGE_CROPS, BYOL_CROPS, SWAV_CROPS, DINO_CROPS = (0.2, 1.0), (0.08, 1.0), (0.14, 1.0), (0.4, 1.0)
LIGHTLY = {
    "simsiam": ("sgd", 0.06, 5e-4, SIAM, 512, None, None, LARGE_CROPS, WEAK, NO, "bilinear"),
    "fastsiam": ("sgd", 0.06, 5e-4, SIAM, 512, None, None, LARGE_CROPS, WEAK, NO, "bilinear", 4, ("mean", 4)),
    "byol": ("sgd", 0.06, 5e-4, BYOL2, 1024, 0.99, None, BYOL_CROPS, BYOL, SECOND, "bilinear"),
    "swav": ("adamw", 1e-3, 1e-6, SWAV2, None, None, 512, SWAV_CROPS, WEAK, NO, "bilinear"),
    "dino": ("sgd", 0.06, 5e-4, (*DINO2, "none"), None, 0.99, 2048, DINO_CROPS, BYOL, SECOND, "bicubic"),
}  # at batch 128; the rate is in proportion to the batch but for SimSiam's and FastSiam's


@pytest.mark.parametrize(("batch", "epochs"), [(128, 200), (512, 200), (512, 800)])
@pytest.mark.parametrize("preset", LIGHTLY)
def test_lightlys_cifar10(preset: str, batch: int, epochs: int) -> None:
    rows = [
        run_config.load(shlex.split(c), published=True)
        for c in COMMANDS
        if c.startswith(f"cifar10/lightly_{preset}.yaml")
    ]
    (c,) = [c for c in rows if (c.loader.batch_size, c.train.length) == (batch, f"{epochs}ep")]
    optimizer, rate, *others = LIGHTLY[preset]
    scaled = rate if preset in ("simsiam", "fastsiam") else rate * batch / 128
    assert lightly(c, batch) == Lightly(epochs, batch, optimizer, scaled, *others)
    assert_lightlys(c, 32)
    assert c.encoder.stem == "cifar" and {v.blur for v in c.loader.views} == {0.0}


def assert_lightlys(c: Config, size: int) -> None:
    """What all of lightly's small benchmarks share."""
    assert (c.encoder.name, c.encoder.zero_init_residual, c.train.precision) == ("resnet18", False, "fp32")
    assert (c.optim.warmup, c.optim.min_lr, c.optim.momentum, c.optim.exclude_bias_norm) == ("0ep", 0.0, 0.9, False)
    assert (c.evaluate.every, c.evaluate.k, c.evaluate.temperature) == ("1ep", 200, 0.1)
    assert not c.method.projector.bias and c.method.alignment.directions == "mean"
    assert c.method.alignment.name == ("cross_entropy" if c.preset in ("swav", "dino") else "negative_cosine")
    assert c.method.ema is None or c.method.ema.momentum == c.method.ema.final
    v = c.loader.views[0]
    assert (v.size, v.mean, v.std, v.grayscale, v.jitter, v.flip) == (size, *PHOTOGRAPHS, 0.2, 0.8, 0.5)
    for t in (*c.method.online, *c.method.target):
        if t.name == "predictor":
            assert not t.constant_lr and not t.bias
        if t.name == "sinkhorn":
            assert (t.epsilon, t.iterations, t.queue) == (0.05, 3, 0)
        if t.name == "center_sharpen":
            assert (t.warmup_temperature, t.temperature, t.momentum) == (0.04, 0.04, 0.9)
        if t.name == "prototypes":
            assert t.freeze == "0ep"


SIAM3, BYOL3, SWAV3, DINO3 = (3, 2048, 2048, "plain"), (2, 4096, 256, "none"), (2, 2048, 128, "none"), (3, 2048, 256)
IMAGENETTE = {
    "simsiam": ("sgd", 0.06, 5e-4, SIAM3, 512, None, None, LARGE_CROPS, WEAK, NO, "bilinear", 2),
    "byol": ("sgd", 0.06, 5e-4, BYOL3, 4096, 0.99, None, BYOL_CROPS, BYOL, SECOND, "bilinear", 2),
    "swav": ("adamw", 1e-3, 1e-6, SWAV3, None, None, 3000, SWAV_CROPS, WEAK, NO, "bilinear", 8),
    "dino": ("sgd", 0.06, 5e-4, (*DINO3, "none"), None, 0.99, 2048, DINO_CROPS, BYOL, SECOND, "bicubic", 8),
}


@pytest.mark.parametrize("preset", IMAGENETTE)
def test_lightlys_imagenette(preset: str) -> None:
    c = run_config.load([f"imagenette/lightly_{preset}.yaml"], published=True)
    assert lightly(c, 256) == Lightly(800, 256, *IMAGENETTE[preset])
    assert_lightlys(c, 128)
    blur = [v.blur for v in c.loader.views]
    assert blur[:2] == ([0.5, 0.5] if preset in ("simsiam", "swav") else [1.0, 0.1]) and {*blur[2:]} <= {0.5}
    assert [(v.size, v.scale) for v in c.loader.views[2:]] == [
        (64, (0.05, 0.14) if preset == "swav" else (0.05, 0.4))
    ] * (IMAGENETTE[preset][-1] - 2)


def test_published_imagenet() -> None:
    """SimSiam and RDM-SimSiam on ImageNet-1k (the authors' imagenet/main_simsiam.py and imagenet/run.sh)."""
    for preset in ("simsiam", "rdm_simsiam_target0.3", "rdm_simsiam_power2"):
        c = run_config.load(["imagenet/simsiam.yaml", f"preset={preset}"], published=True)
        o, v = c.optim, c.loader.views[0]
        assert (c.encoder.name, c.encoder.zero_init_residual, c.encoder.sync_bn) == ("resnet50", True, True)
        assert (c.train.length, c.train.precision, c.loader.batch_size) == ("100ep", "fp32", 512)
        assert (o.name, o.lr * 512 / 256, o.weight_decay, o.momentum, o.warmup, o.min_lr) == (
            "sgd",
            0.1,
            1e-4,
            0.9,
            "0ep",
            0,
        )
        assert not o.exclude_bias_norm and c.loader.views == (v, v)
        assert (v.size, v.scale, v.interpolation, v.jitter, v.grayscale, v.flip) == (
            224,
            (0.2, 1.0),
            "bilinear",
            0.8,
            0.2,
            0.5,
        )
        assert (v.brightness, v.contrast, v.saturation, v.hue) == WEAK
        assert (v.blur, v.blur_sigma, v.solarize, v.std) == (0.5, (0.1, 2.0), 0.0, (0.229, 0.224, 0.225))
        assert (c.method.projector.layers, c.method.projector.last_norm) == (3, "plain")


def crops(c: Config) -> list[tuple[int, int, tuple[float, float]]]:
    """(count, size, scale) of views that follow each other."""
    alike = itertools.groupby(c.loader.views, key=lambda v: (v.size, v.scale))
    return [(len(list(same)), *key) for key, same in alike]


def test_published_multi_crop() -> None:
    swav, large, plain, vit, dino = (
        run_config.load([f"imagenet/{name}.yaml"])
        for name in ("swav", "swav_4096", "swav_2x224", "dino_vit_small", "dino")
    )
    assert crops(swav) == crops(large) == [(2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14))]
    assert crops(plain) == [(2, 224, (0.08, 1.0))]
    assert crops(vit) == [(2, 224, (0.4, 1.0)), (8, 96, (0.05, 0.4))]
    assert crops(dino) == [(2, 224, (0.14, 1.0)), (8, 96, (0.05, 0.14))]
    assert {v.blur for v in swav.loader.views} == {0.5}
    assert [v.blur for v in vit.loader.views] == [1.0, 0.1, *[0.5] * 8] == [v.blur for v in dino.loader.views]
    assert [v.solarize for v in vit.loader.views] == [0.0, 0.2, *[0.0] * 8]
    assert swav.optim.lr == 0.6 and large.optim.lr * 4096 / 256 == 4.8 and large.optim.min_lr == 0.0048
    assert (large.optim.eta, large.optim.clip, large.optim.weight_decay) == (0.001, False, 1e-6)
    o = vit.optim
    assert (o.name, o.lr, o.min_lr, o.weight_decay, o.weight_decay_end) == ("adamw", 5e-4, 1e-6, 0.04, 0.4)
    assert (o.clip_grad, o.clip_grad_of, o.exclude_bias_norm, o.warmup) == (3.0, "each", True, "10ep")
    assert (dino.optim.name, dino.optim.lr, dino.optim.weight_decay, dino.optim.weight_decay_end) == (
        "sgd",
        0.03,
        1e-4,
        None,
    )


CLASSES = read_class_list("imagenet100")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val of ImageNet-100's classes, and one class beside them, one small JPEG each."""
    root = tmp_path_factory.mktemp("imagenet")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(root / "one.jpg")
    for folder in (root / split / name for split in ("train", "val") for name in (*CLASSES, "n00000000")):
        folder.mkdir(parents=True)
        (folder / "one.jpg").hardlink_to(root / "one.jpg")
    return root


def tiny_cifar(name: str, root: Path, split: str, download: bool) -> Arrays:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    return Arrays(images, np.arange(20) % 10, [str(i) for i in range(10)])


def two_steps(arguments: list[str], root: Path) -> None:
    """Two optimizer steps; not as in the recipe: images, encoder, batch, 16-bit arithmetic, 65,536 prototypes."""
    c = run_config.load(arguments)
    encoder = "timm/test_vit" if c.encoder.name.startswith("timm/") else "resnet_small"
    small = [
        f"encoder.name={encoder}",
        f"loader.root={root}",
        "loader.batch_size=4",
        "loader.workers=1",
        "loader.prefetch=1",
    ]
    small += ["train.precision=fp32", "evaluate.bank=null"] + ["encoder.width=16"] * (encoder == "resnet_small")
    if any(t.name == "prototypes" and t.count == 65536 for t in c.method.online):
        small += [f"method.{side}.0.count=600" for side in ("online", "target")]
    small += ["method.projector.out=3"] * any(t.name == "whiten" for t in c.method.online)
    trainer = Trainer(run_config.load([*arguments, *small, f"train.accumulate={min(c.train.accumulate, 2)}"]))
    assert trainer.learner.probe is not None and len(trainer.source.classes) in (10, 100)
    before = {name: p.detach().clone() for name, p in trainer.method.online.named_parameters()}
    for batch in itertools.islice(trainer.loader, 2):
        assert [view.shape[-1] for view in batch.views] == [v.size for v in c.loader.views]
        output = trainer.train_step(batch)
        trainer.step += 1
        assert output.loss.isfinite() and len(output.online) == len(c.loader.views)
        assert len(output.target) == c.method.target_views
    trainer.loader.close()
    moved = {name for name, p in trainer.method.online.named_parameters() if not bool((p == before[name]).all())}
    assert "encoder.conv1.weight" in moved or "encoder.model.patch_embed.proj.weight" in moved
    frozen = any(t.name == "prototypes" and t.freeze != "0ep" for t in c.method.online)
    assert any(name.startswith("projector") for name in moved)
    assert not frozen or "prototypes.weight" not in moved, "frozen at first"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrdm.loaders.sources.open.read_cifar", tiny_cifar)
    two_steps(["cifar10/resnet18.yaml", f"preset={preset}"], tmp_path)


UNPUBLISHED = ["cifar10/race.yaml", "photos/96px.yaml", "photos/224px.yaml"]


@pytest.mark.parametrize("recipe", [*(name for name in NAMES if name != "cifar10/resnet18.yaml"), *UNPUBLISHED])
def test_every_recipe_trains(recipe: str, imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "vit" in recipe:
        pytest.importorskip("timm")
    monkeypatch.setattr("fastrdm.loaders.sources.open.read_cifar", tiny_cifar)
    classes = [] if recipe.startswith("imagenet100/") or "cifar" in recipe else ["loader.classes=imagenet100"]
    two_steps([recipe, *classes], imagenet)
