"""Count the kernels that a call would launch on a GPU, without one: operators of torch that compute, and Triton's."""

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make or describe a tensor and launch nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """While entered, writes down every kernel that would be launched; Triton kernels are not run.

    Results are therefore not to be read. A torch operator that computes counts as one launch, though some (a sort, a
    matrix product that splits its sum) are several. A view is none. Custom operators hide what is inside them: count
    the functions that they call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        same = name == "_to_copy" and out.dtype == args[0].dtype and out.device == args[0].device
        if not func.is_view and name not in FREE and not same:
            self.names.append(name)
        return out

    def __enter__(self) -> "Launches":
        from triton.runtime.jit import KernelInterface

        names = self.names

        def launcher(kernel: Any, grid: Any) -> Any:
            return lambda *args, **kwargs: names.append(getattr(kernel, "fn", kernel).__name__)

        self._patch = mock.patch.object(KernelInterface, "__getitem__", launcher)
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)  # type: ignore[no-untyped-call]
        self._patch.stop()


def launches(call: Any) -> list[str]:
    """Names of the kernels that `call()` would launch, in order."""
    with torch.no_grad(), Launches() as counted:
        call()
    return counted.names
