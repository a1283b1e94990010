"""The spectral filter of the Rank Differential Mechanism as a transform of either branch."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.kernels.collectives import process_rank
from fastrdm.kernels.spectral.spectral_filter import SOLVERS, spectral_filter
from fastrdm.methods.transform import BranchContext, Transform, TransformConfig, TransformContext
from fastrdm.runtime.distributed import gather_rows
from fastrdm.schema import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig(TransformConfig):
    """A spectral filter x V f(S) V^T, where x = U S V^T over the rows of all processes (RDM, section 5)."""

    name: Literal["filter"] = "filter"
    kind: Literal["power", "log", "log1p", "log1p_sq"] = "power"  # f(s) = s^power, ln s, ln(1+s), ln(1+s^2)
    power: float | None = Field(default=None, allow_inf_nan=False)  # of f itself, --sigma: online 1 or 2, target < 0
    basis: Literal["self", "other"] = "self"  # whose spectrum: its own, or the other branch's (authors' ImageNet code)
    scale: Literal["raw", "rms"] = "raw"  # raw: singular values of the gathered batch (the paper's); rms: / sqrt(rows)
    cutoff: float | None = Field(default=None, ge=0, lt=1)  # smaller shares of the largest s count as 0; null: by dtype
    solver: str = "auto"  # how W is computed: see docs/spectra.md

    def __post_init__(self) -> None:
        given = "a number for kind=power" if self.kind == "power" else f"left out for kind={self.kind}"
        require((self.power is not None) == (self.kind == "power"), "filter.power", given, self.power)
        require(self.solver in SOLVERS, "filter.solver", f"one of {', '.join(SOLVERS)}", self.solver)


class SpectralFilter(Transform):
    """Online: x W with W constant, so that the gradient is g W. Target: the filtered x, without gradient."""

    def __init__(self, config: FilterConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config, self.side = config, context.side

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        c = self.config
        basis = None
        if c.basis == "other":
            assert branch.other is not None
            basis = gather_rows(branch.other, dim=1)
        return spectral_filter(
            x,
            c.kind,
            c.power,
            x_all=gather_rows(x, dim=1),
            offset=process_rank() * x.shape[1],
            basis=basis,
            side=self.side,
            cutoff=c.cutoff,
            scale=c.scale,
            solver=c.solver,
        )
