"""What `auto` becomes, and how a bank and a warm-up are made to fit."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.loaders import spec
from fastrdm.loaders.sources.archives import Arrays
from fastrdm.loaders.sources.source import ArraySource
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import Horizon
from fastrdm.trainer import Trainer
from fastrdm.training import automatic
from fastrdm.training.fingerprint import differences, fingerprint
from fastrdm.training.fit import evaluation_bank, fit_batch, fit_views, fit_warmup

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def chosen(device: torch.device, *words: str, world: int = 1, stored: Any = None) -> tuple[Config, str]:
    settings, lines = automatic.choose(run_config.load([*words, "run=x"]), Processes(0, world, device), None, stored)
    return settings, "".join(lines)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A machine with CUDA, as far as the choice asks: what it says can be changed."""
    has = {"bf16": True, "triton": True, "cc": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has["bf16"])
    monkeypatch.setattr(automatic.importlib.util, "find_spec", lambda name: object() if has[name] else None)
    monkeypatch.setattr(automatic.shutil, "which", lambda name: "/usr/bin/cc" if has["cc"] else None)
    return has


def test_a_gpu_gets_bf16_compiled_and_captured(gpu: dict[str, bool]) -> None:
    c, told = chosen(CUDA)
    assert (c.train.precision, c.train.compile, c.train.capture) == ("bf16", True, True)
    assert told.startswith("chosen automatically: bf16 (native on this GPU), compiled (on CUDA), captured (one process")


@pytest.mark.parametrize(
    ("device", "words", "channels_last"),
    [
        (CUDA, (), True),
        (CPU, ("train.precision=fp32",), True),
        (CPU, ("train.precision=fp64",), True),
        (CPU, ("train.channels_last=true",), True),
        (CPU, ("train.channels_last=false",), False),
        (CUDA, ("train.channels_last=false",), False),
    ],
)
def test_layout(gpu: dict[str, bool], device: Any, words: tuple[str, ...], channels_last: bool) -> None:
    assert chosen(device, *words)[0].train.channels_last is channels_last


def test_cudnn_measures_where_shapes_stay(gpu: dict[str, bool]) -> None:
    assert chosen(CUDA)[0].train.cudnn_benchmark is True
    assert chosen(CPU)[0].train.cudnn_benchmark is False
    growing = "loader.views.*.progressive=[[1, 16]]"
    assert chosen(CUDA, growing)[0].train.cudnn_benchmark is False
    assert chosen(CUDA, growing, "train.cudnn_benchmark=true")[0].train.cudnn_benchmark is True


@pytest.mark.parametrize("layout", ["true", "false"])
def test_maps_lie_as_the_setting_says(tmp_path: Path, layout: str) -> None:
    """The loader's views are channels last; what the encoder gets and makes of them is as asked for."""
    small = ["encoder.width=4", "loader.subset=80", "loader.batch_size=16", f"run={tmp_path}", "train.device=cpu"]
    trainer = Trainer(run_config.load(["quickstart.yaml", *small, f"train.channels_last={layout}"]))
    seen: list[torch.Tensor] = []
    conv = trainer.method.online.encoder.get_submodule("conv1")
    conv.register_forward_hook(lambda module, given, made: seen.extend((given[0], made)))
    trainer.train_step(next(iter(trainer.loader)))
    kind = torch.channels_last if layout == "true" else torch.contiguous_format
    assert len(seen) == 2 and all(x.is_contiguous(memory_format=kind) for x in seen)


@pytest.mark.parametrize(
    ("lacks", "expected", "reason"),
    [
        ("bf16", ("fp16", True, True), "fp16 (this GPU has no bf16)"),
        ("triton", ("bf16", False, True), "eager (Triton is not installed)"),
        ("cc", ("bf16", False, True), "eager (Triton needs a C compiler"),
    ],
)
def test_what_a_gpu_lacks(gpu: dict[str, bool], lacks: str, expected: tuple[object, ...], reason: str) -> None:
    gpu[lacks] = False
    c, told = chosen(CUDA)
    assert (c.train.precision, c.train.compile, c.train.capture) == expected and reason in told


def test_several_processes_and_growing_views_are_not_captured(gpu: dict[str, bool]) -> None:
    c, told = chosen(CUDA, world=2)
    assert (c.train.compile, c.train.capture) == (True, False) and "not captured (several processes)" in told
    c, told = chosen(CUDA, "loader.views.*.progressive=[[2, 8]]")
    assert c.train.capture is False and "not captured (the views grow)" in told


@pytest.mark.parametrize(
    ("native", "encoder", "precision", "why"),
    [
        (True, "resnet18", "bf16", "native on this CPU"),
        (True, "timm/vit_tiny_patch16_224", "bf16", "native on this CPU"),
        (False, "resnet18", "fp32", "this CPU has no AVX512_BF16"),
        (True, "resnet_small", "fp32", "resnet_small on a CPU, whose results are on record"),
    ],
)
def test_a_cpu_stays_eager_and_takes_bf16_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, native: bool, encoder: str, precision: str, why: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    c, told = chosen(CPU, f"encoder.name={encoder}")
    assert (c.train.precision, c.train.compile, c.train.capture) == (precision, False, False)
    assert f"{precision} ({why})" in told and "captured" not in told


def test_all_processes_take_the_precision_of_the_main_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the main process runs on another machine, whose processor has no bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    words = ["encoder.name=resnet18", "encoder.width=1", "encoder.stem=cifar", "loader.source=digits"]
    words += [
        "optim.warmup=0st",
        "loader.batch_size=16",
        "loader.views.*.size=8",
        "train.length=1st",
        "evaluate.baselines=false",
    ]
    assert Trainer(run_config.load([*words, f"run={tmp_path / 'a'}"])).dtype == torch.bfloat16

    def on_main(work: Callable[[], Any]) -> Any:
        return "fp32" if (found := work()) == "bf16" else found

    monkeypatch.setattr(distributed, "on_main", on_main)
    elsewhere = Trainer(run_config.load([*words, f"run={tmp_path / 'b'}"]))
    assert (elsewhere.dtype, elsewhere.settings.train.precision) == (torch.float32, "fp32")


def test_torch_tells_whether_a_cpu_multiplies_bf16() -> None:
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in about:
        pytest.skip("only Linux on x86 names the processor's flags, as CI's does")
    assert automatic.cpu_multiplies_bf16() is ("avx512_bf16" in about)


def test_what_the_user_said_is_left_alone(gpu: dict[str, bool]) -> None:
    words = ["train.precision=fp32", "train.compile=false", "train.capture=false", "loader.workers=3"]
    c, told = chosen(CUDA, *words)
    assert (c.train.precision, c.train.compile, c.train.capture, c.loader.workers) == ("fp32", False, False, 3)
    assert told == ""


def test_a_run_that_goes_on_keeps_its_precision_but_not_its_speed(gpu: dict[str, bool]) -> None:
    stored = {"train": {"precision": "fp32", "compile": False}, "loader": {"engine": "native", "workers": 99}}
    c, told = chosen(CUDA, stored=stored)
    assert (c.train.precision, c.train.compile) == ("fp32", True) and "fp32 (as this run began)" in told
    open_still = chosen(CPU, "quickstart.yaml", stored={"train": {"precision": "auto"}})[0]
    assert open_still.train.precision == "fp32"


@pytest.mark.parametrize(
    ("cores", "together", "expected"), [(8, "", 8), (8, "4", 2), (2, "8", 1), (64, "2", 16), (4, "x", 4)]
)
def test_threads_are_the_cores_of_a_process(
    cores: int, together: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", together)
    assert spec.cores_of_a_process() == LoaderConfig().threads == expected
    assert replace(LoaderConfig(), workers=5).threads == 5


def source(counts: list[int], seed: int = 0) -> ArraySource:
    """Noise with so many images of each class, the classes one after the other."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 3), np.uint8)
    return ArraySource("digits", Arrays(images, labels, [str(i) for i in range(len(counts))]))


@pytest.mark.parametrize(
    ("counts", "size", "shares"),
    [
        ([5, 5, 5], 6, [2, 2, 2]),
        ([5, 5, 5], 7, [3, 2, 2]),
        ([9, 1, 5], 9, [4, 1, 4]),
        ([9, 1, 1], 10, [8, 1, 1]),
        ([5, 5, 5], 2, [1, 1, 0]),
    ],
)
def test_a_bank_is_as_even_over_the_classes_as_they_allow(counts: list[int], size: int, shares: list[int]) -> None:
    bank, notes = evaluation_bank(source(counts), size)
    assert np.bincount(bank.labels, minlength=3).tolist() == shares and notes == []
    starts = np.cumsum([0, *counts[:-1]])
    assert bank.index.tolist() == [i for s, n in zip(starts, shares, strict=True) for i in range(s, s + n)]  # type: ignore[attr-defined]


def test_a_bank_of_all_and_of_more_than_all() -> None:
    images = source([2, 3])
    assert evaluation_bank(images, None) == (images, []) == evaluation_bank(images, 5)
    bank, notes = evaluation_bank(images, 6)
    assert bank is images and notes == ["note: evaluate.bank=6, but the set has 5 images: k-NN uses all of them"]


def test_views_that_nobody_set_shrink_to_the_images_of_a_set_in_memory() -> None:
    settings = run_config.load(["loader.source=my.module:Source"])
    images = source([2, 3])  # of 4 px
    smaller, notes = fit_views(settings, images, lambda key: False)
    assert [view.size for view in smaller.loader.views] == [4, 4]
    assert notes == ["note: the images of digits have 4 px: views of 4 px are drawn instead of 224"]
    assert fit_views(settings, images, lambda key: key == "loader.views.0.size") == (settings, [])
    small = run_config.load(["loader.views.*.size=16"])
    assert fit_views(small, images, lambda key: False) == (small, []), "four times as large is allowed"


@pytest.mark.parametrize(
    ("images", "processes", "accumulate", "fitted"),
    [
        (256, 1, 1, 256),
        (255, 1, 1, 32),
        (44, 1, 1, 32),
        (20, 1, 1, 20),
        (300, 3, 1, 255),
        (2000, 5, 2, 250),
        (200, 3, 1, 30),
    ],
)
def test_a_batch_that_nobody_set_fits_the_set_and_the_processes(
    images: int, processes: int, accumulate: int, fitted: int
) -> None:
    settings = run_config.load([f"train.accumulate={accumulate}"])
    smaller, notes = fit_batch(settings, images, processes, lambda key: False)
    assert smaller.loader.batch_size == fitted and len(notes) == (fitted != 256)
    reason = f"the {images:,} images of the set" if images < 256 else f"{processes * accumulate} equal parts"
    assert all(note == f"note: loader.batch_size=256 does not fit {reason}: {fitted} are used" for note in notes)
    assert fit_batch(settings, images, processes, lambda key: key == "loader.batch_size") == (settings, [])


def test_a_run_that_goes_on_keeps_its_batch() -> None:
    """Begun on three processes, continued on one: the batch that both can make stays."""
    begun, notes = fit_batch(run_config.load(["preset=byol"]), 300, 3, lambda key: False)
    assert begun.loader.batch_size == 255 and notes
    stored = {"loader": {"batch_size": 255}}
    assert fit_batch(run_config.load(["preset=byol"]), 300, 1, lambda key: False, stored) == (
        begun,
        ["note: loader.batch_size=255, as this run began"],
    )
    settings = run_config.load(["loader.batch_size=128"])
    assert fit_batch(settings, 300, 1, lambda key: True, stored) == (settings, [])


def test_a_large_batch_keeps_four_steps_an_epoch() -> None:
    settings = run_config.load(["loader.batch_size=4096"])
    assert fit_batch(settings, 2000, 1, lambda key: False)[0].loader.batch_size == 256


def test_no_batch_fits_fewer_images_than_processes() -> None:
    settings = run_config.load([])
    assert (
        fit_batch(settings, 3, 4, lambda key: False) == (settings, []) == fit_batch(settings, 0, 1, lambda key: False)
    )


def test_a_warmup_that_fits_is_left_alone() -> None:
    settings = run_config.load(["optim.warmup=5st"])
    assert fit_warmup(settings, Horizon(5, 5), lambda key: True) == (settings, [])
    shorter, notes = fit_warmup(settings, Horizon(5, 4), lambda key: False)
    assert shorter.optim.warmup == "10%" and len(notes) == 1
    with pytest.raises(ValueError, match=r"^optim.warmup must be no longer than the run of 4 steps"):
        fit_warmup(settings, Horizon(5, 4), lambda key: key == "optim.warmup")


def test_fingerprints_see_what_changed() -> None:
    images, same, other = source([40, 40]), source([40, 40]), source([40, 40], seed=1)
    assert differences(fingerprint(images), fingerprint(same)) == []
    assert differences(fingerprint(images), fingerprint(other)) == ["other content"]
    assert differences(fingerprint(images), fingerprint(source([41, 39]))) == ["other labels"]
    assert differences(fingerprint(images), fingerprint(source([40, 41])))[:2] == ["images: 80 -> 81", "other labels"]
    assert differences({}, fingerprint(images)) == [], "a checkpoint from before fingerprints"
