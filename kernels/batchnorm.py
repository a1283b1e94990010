"""BatchNorm with statistics per view and, when asked, over all processes; keys as in torch.nn.BatchNorm2d."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastrdm.kernels.collectives import gather_over_processes, process_count, reduce_over_processes


class _SynchronizedNorm(torch.autograd.Function):
    """Rows (G*N, C, ...) normalized per group over all processes; sums in float32, or float64 for float64 rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalized rows in x's dtype and, without gradient, mean and unbiased variance (G, C)."""
        wide = _wide(x)
        mean, variance, count = _merged_moments(_grouped(wide, groups))
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        y = (wide - _spread(mean, x)) * _spread(scale if weight is None else scale * weight, x)
        if bias is not None:
            y = y + _spread(bias[None], x)
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        # No cast where none is needed: compiled by torch 2.11, a cast that does nothing loses the gradient
        return y if y.dtype == x.dtype else y.to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the summed loss of all processes to x; of this process's own rows to weight and bias."""
        x, weight, mean, scale, count = ctx.saved_tensors
        groups, grads = len(mean), _wide(grad)
        unit = (_wide(x) - _spread(mean, x)) * _spread(scale, x)
        own = torch.stack([_sum_rows(_grouped(grads, groups)), _sum_rows(_grouped(grads * unit, groups))])
        share = reduce_over_processes(own, "sum") / count
        along = grads - _spread(share[0], x) - unit * _spread(share[1], x)
        grad_x = along * _spread(scale if weight is None else scale * weight, x)
        to_bias, to_weight = own.sum(1)
        affine = [
            g if needed else None for g, needed in zip((to_weight, to_bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        return grad_x.to(x.dtype), *affine, None, None


class _FusedSynchronizedNorm(torch.autograd.Function):
    """_SynchronizedNorm by torch's fused CUDA kernels, for steps that are not compiled: each pass over the rows is one
    kernel and keeps nothing in float32. One gather forward and one sum backward carry all groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        groups: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """The normalized rows in x's dtype. `running` moves in place, once for each group."""
        x = x if _channels_last(x) else x.contiguous()
        aten, views = torch.ops.aten, x.chunk(groups)
        own = torch.stack([torch.stack(aten.batch_norm_stats(view, eps)) for view in views])
        count = own.new_full((1,), views[0].numel() // x.shape[1])
        parts = gather_over_processes(torch.cat([own.flatten(), count]))
        counts = parts[:, -1].contiguous()
        y, merged = torch.empty_like(x), []
        for g, (view, place) in enumerate(zip(views, y.chunk(groups), strict=True)):
            means, scales = parts[:, :-1].view(-1, *own.shape)[:, g].unbind(1)
            mean, scale = aten.batch_norm_gather_stats_with_counts(
                view, means.contiguous(), scales.contiguous(), *running, momentum, eps, counts
            )
            aten.batch_norm_elemt.out(view, weight, bias, mean, scale, eps, out=place)
            merged.append(torch.stack([mean, scale]))
        ctx.save_for_backward(x, weight, torch.stack(merged), counts)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the summed loss of all processes to x; of this process's own rows to weight and bias."""
        aten, (x, weight, merged, counts) = torch.ops.aten, ctx.saved_tensors
        needed = ctx.needs_input_grad[1:3]
        # What is cut from a view must have its layout: the kernels read both alike.
        layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
        views, grads = x.chunk(len(merged)), grad.contiguous(memory_format=layout).chunk(len(merged))
        reduced = [
            aten.batch_norm_backward_reduce(g, view, *stats, weight, True, *needed)
            for g, view, stats in zip(grads, views, merged, strict=True)
        ]
        sums = reduce_over_processes(torch.stack([torch.stack(parts[:2]) for parts in reduced]), "sum")
        grad_x, whole = torch.empty_like(x), counts.int()
        for g, view, stats, total, place in zip(grads, views, merged, sums, grad_x.chunk(len(merged)), strict=True):
            aten.batch_norm_backward_elemt.out(g, view, *stats, weight, *total, whole, out=place)
        to_weight, to_bias = (
            torch.stack([parts[2 + k] for parts in reduced]).sum(0) if wanted else None
            for k, wanted in enumerate(needed)
        )
        return grad_x, to_weight, to_bias, None, None, None, None


class _ViewNorm(torch.autograd.Function):
    """Rows (G*N, C, ...) normalized per group on one process, on a CPU: every group is written to its place in one
    tensor, bit for bit what joining the groups' batch_norm gives, without the copies of joining."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        groups: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """The normalized rows in x's dtype and layout. `running` moves in place, once for each group."""
        y = torch.empty_like(x)
        stats = running[0].new_empty(groups, 2, x.shape[1])
        for view, place, (mean, scale) in zip(x.chunk(groups), y.chunk(groups), stats, strict=True):
            torch.ops.aten.native_batch_norm.out(
                view, weight, bias, *running, True, momentum, eps, out=place, save_mean=mean, save_invstd=scale
            )
        ctx.save_for_backward(x, weight, stats)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, weight and bias."""
        x, weight, stats = ctx.saved_tensors
        grad_x, groups, needed = torch.empty_like(x), len(stats), list(ctx.needs_input_grad[:3])
        affine = []
        for g, view, place, (mean, scale) in zip(
            grad.chunk(groups), x.chunk(groups), grad_x.chunk(groups), stats, strict=True
        ):
            to_x, *others = torch.ops.aten.native_batch_norm_backward(
                g, view, weight, None, None, mean, scale, True, ctx.eps, needed
            )
            if needed[0]:
                place.copy_(to_x)
            affine.append(others)
        to_weight, to_bias = (
            sum(parts[1:], parts[0]) if wanted else None
            for parts, wanted in zip(zip(*reversed(affine), strict=True), needed[1:], strict=True)
        )
        return grad_x if needed[0] else None, to_weight, to_bias, None, None, None, None


def _has_fused_kernels(x: Tensor) -> bool:
    """True where torch's kernels of synchronized BatchNorm take x, and add up in a wider type than x's."""
    return x.is_cuda and x.dtype != torch.float64


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Rows (G*N, C, ...) as (G, N, C, ...)."""
    return x.view(groups, -1, *x.shape[1:])


def _spread(per_channel: Tensor, x: Tensor) -> Tensor:
    """Numbers (G, C) in the shape that broadcasts over rows x (G*N, C, ...)."""
    # Spread per row, not by a view of x: autograd refuses to change a returned view in place
    rows = per_channel.repeat_interleave(len(x) // len(per_channel), 0)
    return rows.view(*rows.shape, *[1] * (x.ndim - 2))


def _row_dims(rows: Tensor) -> list[int]:
    return [dim for dim in range(rows.ndim) if dim not in (0, 2)]


def _sum_rows(rows: Tensor) -> Tensor:
    return rows.sum(_row_dims(rows))


def _merged_moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (G, C), biased variance (G, C) and count (1,) over all processes, whose row counts may differ.

    Centered moments are merged, not raw squares: those cancel when the mean is large beside the deviation.
    """
    variance, mean = torch.var_mean(rows, _row_dims(rows), correction=0)
    count = rows.new_full((1,), rows[0].numel() // rows.shape[2])
    own = torch.cat([mean.flatten(), variance.flatten(), count])
    parts = gather_over_processes(own)
    counts = parts[:, -1:]
    total = counts.sum(0)
    means, variances = parts[:, :-1].view(-1, 2, *mean.shape).unbind(1)
    weights = (counts / total)[..., None]
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), total


class ViewBatchNorm(_BatchNorm):
    """BatchNorm over (G*N, C) or (G*N, C, H, W), rows ordered view by view: equal to G passes, one after the other.

    `groups` is G, set by `set_views`; 1 takes the statistics over the joined views. With `sync`, and torch.distributed
    running on several processes, statistics and gradients are those of the concatenated batch.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, sync: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.sync = sync
        self.groups = 1
        # Whether passes in training move the running statistics.
        self.moves = True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sync={self.sync}"  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Normalized x, in x's dtype and memory format; in training the running statistics move once per group."""
        if x.ndim not in (2, 4):
            raise ValueError(f"ViewBatchNorm takes (N, C) or (N, C, H, W), got {tuple(x.shape)}")
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        assert len(x) % self.groups == 0, f"{len(x)} rows do not make {self.groups} views of one size"
        assert self.num_batches_tracked is not None
        if self.moves:
            self.num_batches_tracked.add_(self.groups)
        if self.sync and process_count() > 1:
            return self._synchronized(x)
        if self.groups == 1:
            return self._local(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._by_group(_ViewNorm, x)
        return torch.cat([self._local(view) for view in x.chunk(self.groups)])

    def _running(self) -> tuple[Tensor, Tensor]:
        """The running statistics, or copies of them that may be moved in their place."""
        assert self.running_mean is not None and self.running_var is not None
        running = self.running_mean, self.running_var
        return running if self.moves else (running[0].clone(), running[1].clone())

    def _local(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        return F.batch_norm(x, *self._running(), self.weight, self.bias, True, self.momentum, self.eps)

    def _by_group(self, function: type[torch.autograd.Function], x: Tensor) -> Tensor:
        """x by a function that takes the running statistics, the number of groups, the momentum and epsilon."""
        settings = self._running(), self.groups, self.momentum, self.eps
        return function.apply(x, self.weight, self.bias, *settings)  # type: ignore[no-any-return]

    def _synchronized(self, x: Tensor) -> Tensor:
        if _has_fused_kernels(x) and not torch.compiler.is_compiling():
            return self._by_group(_FusedSynchronizedNorm, x)
        y, means, variances = _SynchronizedNorm.apply(x, self.weight, self.bias, self.groups, self.eps)
        assert self.momentum is not None
        running_mean, running_var = self._running()
        for mean, variance in zip(means, variances, strict=True):
            running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
            running_var.lerp_(variance.to(running_var.dtype), self.momentum)
        return y  # type: ignore[no-any-return]


class _ActivatedBatchNorm(ViewBatchNorm):
    """ViewBatchNorm, then drop block and activation: the shape of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


def set_views(module: nn.Module, groups: int) -> None:
    """Tell every ViewBatchNorm below `module` how many views the next training passes hold."""
    for child in module.modules():
        if isinstance(child, ViewBatchNorm):
            child.groups = groups


class Again(AbstractContextManager[None]):
    """Context in which passes of `module` repeat an earlier one: with the views set when this was made, and with the
    running statistics left alone."""

    def __init__(self, module: nn.Module) -> None:
        self.then = {child: child.groups for child in module.modules() if isinstance(child, ViewBatchNorm)}
        self.now: dict[ViewBatchNorm, int] = {}

    def __enter__(self) -> None:
        self.now = {norm: norm.groups for norm in self.then}
        for norm, groups in self.then.items():
            norm.groups, norm.moves = groups, False

    def __exit__(self, *_: object) -> None:
        for norm, groups in self.now.items():
            norm.groups, norm.moves = groups, True


def convert_batchnorm(module: nn.Module, sync: bool = True) -> nn.Module:
    """`module` with each BatchNorm below replaced by ViewBatchNorm holding the same tensors under the same keys.

    Raises ValueError for a kind of BatchNorm whose behavior would change.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, ViewBatchNorm):
        return _converted(module, sync)
    for name, child in module.named_children():
        setattr(module, name, convert_batchnorm(child, sync))
    return module


def _converted(old: _BatchNorm, sync: bool) -> ViewBatchNorm:
    kind = type(old).__name__
    if kind not in ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d"):
        raise ValueError(f"{kind} has no counterpart with statistics per view: choose a network without it")
    if old.momentum is None or not old.track_running_stats:
        raise ValueError(f"{kind} must have a momentum and running statistics to be split by view, got {old}")
    new_type = _ActivatedBatchNorm if kind == "BatchNormAct2d" else ViewBatchNorm
    new = new_type(old.num_features, old.eps, old.momentum, old.affine, sync)
    new.training = old.training
    for name in ("weight", "bias"):
        setattr(new, name, getattr(old, name))
    for name, buffer in old.named_buffers(recurse=False):
        setattr(new, name, buffer)
    for name, child in old.named_children():
        setattr(new, name, child)
    return new
