"""The spectral filter of the Rank Differential Mechanism as a transform of either branch."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm import parts
from fastrdm.kernels.collectives import process_rank
from fastrdm.kernels.spectral.filter_factors import KINDS
from fastrdm.kernels.spectral.spectral_filter import SOLVERS, spectral_filter
from fastrdm.methods.transform import BranchContext, Transform, TransformConfig, TransformContext
from fastrdm.runtime.distributed import gather_rows
from fastrdm.schema import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig(TransformConfig):
    """A spectral filter x V f(S) V^T, where x = U S V^T over the rows of all processes (RDM, section 5)."""

    name: Literal["filter"] = "filter"
    kind: str = "power"
    """What f is: power (s^power), log (ln s), log1p (ln(1+s)), log1p_sq (ln(1+s^2)), or package.module:function."""

    power: float | None = Field(default=None, allow_inf_nan=False)  # of f itself, --sigma: online 1 or 2, target < 0
    basis: Literal["self", "other"] = "self"  # whose spectrum: its own, or the other branch's (authors' ImageNet code)
    scale: Literal["raw", "rms"] = "raw"  # raw: singular values of the gathered batch (the paper's); rms: / sqrt(rows)
    cutoff: float | None = Field(default=None, ge=0, lt=1)  # smaller shares of the largest s count as 0; null: by dtype
    solver: str = "auto"  # how W is computed: see docs/spectra.md

    def __post_init__(self) -> None:
        if parts.is_own(self.kind):
            own_function(self.kind)
        else:
            known = f"one of {', '.join(KINDS)}, or package.module:function"
            require(self.kind in KINDS, "filter.kind", known, self.kind)
        given = "a number for kind=power" if self.kind == "power" else f"left out for kind={self.kind}"
        require((self.power is not None) == (self.kind == "power"), "filter.power", given, self.power)
        require(self.solver in SOLVERS, "filter.solver", f"one of {', '.join(SOLVERS)}", self.solver)


def own_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function f that package.module:function stands for; ValueError where there is none."""
    expected = "a function annotated as returning a Tensor"
    own: Callable[[Tensor], Tensor] = parts.load(
        name, "filter.kind", lambda x: not isinstance(x, type) and parts.makes(x, Tensor), expected
    )
    return own


class SpectralFilter(Transform):
    """Online: x W with W constant, so that the gradient is g W. Target: the filtered x, without gradient."""

    def __init__(self, config: FilterConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config, self.side = config, context.side
        self.function = own_function(config.kind) if parts.is_own(config.kind) else config.kind

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        c = self.config
        basis = None
        if c.basis == "other":
            assert branch.other is not None
            basis = gather_rows(branch.other, dim=1)
        return spectral_filter(
            x,
            self.function,
            c.power,
            x_all=gather_rows(x, dim=1),
            offset=process_rank() * x.shape[1],
            basis=basis,
            side=self.side,
            cutoff=c.cutoff,
            scale=c.scale,
            solver=c.solver,
        )
