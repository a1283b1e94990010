"""The functions g of singular values that a filter can have, and the solvers by name. No torch until one is called."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SOLVERS = ("auto", "eigh", "newton_schulz", "gram_power")


class ChebyshevFit(NamedTuple):
    """How matrix products alone evaluate g: as a Chebyshev series in s^(1 / 2^depth)."""

    degree: int
    """One of chebyshev.DEGREES."""
    start: float = 0.0
    """Share of the largest singular value from which g is fitted; above 0 where g is infinite at 0."""
    depth: int = 2
    """Number of square roots that are taken, each of which costs more products than eight more degrees do."""


class FilterFunction(NamedTuple):
    """A function g of singular values that a filter can have."""

    g: Callable[["Tensor"], "Tensor"]
    """float64 singular values above 0, of any shape -> their weights, of the same shape."""
    fit: ChebyshevFit | None = None
    """None: not by products, so that the solver newton_schulz refuses g and `auto` takes eigh."""


# The filter functions by name, one row each. (s^power is not here: products evaluate it without a fit of its own.) The
# degrees keep 4e-4 of the largest weight up to s_max = 3000. ln s is fitted from below any singular value that is kept,
# so that what is dropped stays bounded too. ln(1 + s) needs one root only; ln(1 + s^2) by one would be off by 2e-3.
FILTER_FUNCTIONS: dict[str, FilterFunction] = {
    "log": FilterFunction(lambda s: s.log(), ChebyshevFit(degree=23, start=1e-6)),
    "log1p": FilterFunction(lambda s: s.log1p(), ChebyshevFit(degree=31, depth=1)),
    "log1p_sq": FilterFunction(lambda s: (s * s).log1p(), ChebyshevFit(degree=31)),
}
KINDS = ("power", *FILTER_FUNCTIONS)
