"""docs/methods.md: the composition trains, the table names every preset, the authors' flags have the same spectra."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastrdm.config import run_config, tree
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.trainer import Trainer

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
FUNCTIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "poly": lambda s, sigma: s**sigma,
    "log": lambda s, _: torch.log(s),
    "log_1": lambda s, _: torch.log(1 + s),
    "log_2": lambda s, _: torch.log(1 + s**2),
}


def test_the_composition_trains() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    small = {
        "train": {"length": "4st"},
        "method": {"projector": {"hidden": 16, "out": 24}},
        "encoder": {"name": "resnet_small", "width": 4},
        "loader": {"source": "digits", "batch_size": 16},
        "optim": {"warmup": "0st"},
        "evaluate": {"baselines": False},
    }
    trainer = Trainer(run_config.resolve(tree.merge(tree.parse(block, "the block"), small)))
    before = {name: p.detach().clone() for name, p in trainer.method.online.named_parameters()}
    for batch in itertools.islice(trainer.loader, 2):
        output = trainer.train_step(batch)
        trainer.step += 1
        assert output.online.shape == (6, 16, 512) and output.target.shape == (2, 16, 512)
        assert output.loss.isfinite()
    moved = [name for name, p in trainer.method.online.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name in before if name != "prototypes.weight"], "frozen for an epoch"


def test_the_table_names_every_preset() -> None:
    shown = set()
    for name, choices in re.findall(r"^\| `(\w+?)(?:\{([^}]*)\})?` \|", PAGE, re.MULTILINE):
        shown |= {name + choice for choice in choices.split(",")}
    assert PRESETS.keys() - {"rdm_simsiam", "rdm_byol"} <= shown


ROWS = re.findall(r"^\| `(--pred-location.*?)` \| `(.*?)` \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("flags", "here"), ROWS)
def test_the_authors_flags(flags: str, here: str) -> None:
    assert len(ROWS) == 9
    words = flags.split()
    told = dict(zip(words[::2], words[1::2], strict=True))
    method = run_config.resolve({"preset": "symsimsiam", "method": tree.parse(here, "the row")}).method
    (transform,) = method.online if told["--pred-location"] == "online" else method.target
    assert isinstance(transform, FilterConfig)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    weights = FUNCTIONS[told.get("--pred-type", "poly")](s, float(told.get("--sigma", 0)))
    ours = spectral_filter(x, transform.kind, transform.power)
    torch.testing.assert_close(ours, u @ torch.diag(s * weights) @ vh, rtol=0, atol=1e-12)
