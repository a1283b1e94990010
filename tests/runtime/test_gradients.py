"""Losses over the rows of several processes have the loss and the gradient that they have on one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrdm.methods.regularizer_settings import REGULARIZERS

PROGRAM = Path(__file__).parents[1] / "programs" / "gradients.py"
WORLDS = (1, 2, 4)
LOSSES = [
    "covariance",
    "gathered",
    "contrastive",
    "cross_correlation",
    *(f"regularizer_{name}" for name in REGULARIZERS),
    *(f"wide_{name}" for name in ("covariance", "coding_rate", "frobenius", "nuclear")),
    *(f"whiten_{root}" for root in ("zca", "newton", "cholesky")),
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the losses, ways and numbers of processes that are selected, and of one eager process."""
    out = tmp_path_factory.mktemp("gradients")
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    keys = (("world", "1"), ("how", "eager"), ("loss", None))
    chosen = [dict.fromkeys([first] * bool(first) + [str(s[key]) for s in selected]) for key, first in keys]
    command = [sys.executable, str(PROGRAM), str(out), *(",".join(words) for words in chosen)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradient_do_not_depend_on_the_number_of_processes(
    results: Path, loss: str, how: str, world: int
) -> None:
    alone, seen = torch.load(results / f"{loss}-eager-1.pt"), torch.load(results / f"{loss}-{how}-{world}.pt")
    assert alone["gradient"].abs().max() > 1e-3
    torch.testing.assert_close(seen, alone, rtol=0, atol=1e-10)
