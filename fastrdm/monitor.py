"""The rank of both branches: what tells a healthy run from one that collapses."""

from torch import Tensor

from fastrdm.distributed import gather_rows
from fastrdm.kernels.spectrum import effective_rank
from fastrdm.methods.branch import Output

CONVENTION = "erank_l/unit/moment"  # of eigenvalues; rows of unit length; not centred: the headline of the contract


def branch_ranks(output: Output) -> dict[str, Tensor]:
    """Effective rank of both branches over this step's rows of all processes, mean over views; 0-d each.

    A figure of one batch: at most its number of rows, and low where rows are few. Call on every process.
    """
    figures = {}
    for name, x in {"online": output.online, "target": output.target}.items():
        rank = effective_rank(gather_rows(x, dim=1), convention="eigenvalues", normalize=True)
        figures[f"{name}/{CONVENTION}/batch"] = rank.mean()
    return figures
