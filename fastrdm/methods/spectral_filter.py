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
    """The function f of the singular values s: power is s^power, log is ln s, log1p is ln(1 + s), log1p_sq is ln(1 +
    s^2). For a function of your own, package.module:NAME.
    """

    power: float | None = Field(default=None, allow_inf_nan=False)
    """Exponent of f where `kind` is power, `--sigma` of the authors' scripts: 1 or 2 on the online branch, -0.3 to -1
    on the target. Other kinds take none.
    """

    basis: Literal["self", "other"] = "self"
    """Whose singular values and vectors the filter uses: those of its own branch, or those of the other branch, as the
    authors' ImageNet code does.
    """

    scale: Literal["raw", "rms"] = "raw"
    """The argument of f: raw singular values of the gathered batch, as in the paper, or rms, these divided by the
    square root of the number of rows. Powers do not depend on it, logarithms do.
    """

    cutoff: float | None = Field(default=None, ge=0, lt=1)
    """Share of the largest singular value below which a direction gets weight 0. `null` chooses by dtype, 1e-6 for
    float32.
    """

    solver: str = "auto"
    """How the filter is computed: auto, eigh (float64 eigendecomposition), newton_schulz (matrix products only) or
    gram_power (even powers). See docs/spectra.md.
    """

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

    wide_loss = True

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
