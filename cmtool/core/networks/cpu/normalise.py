"""Group normalisation of images that lie in memory pixel by pixel, on a CPU.

There PyTorch's own is up to ten times slower than for images that lie channel by channel, while
convolutions are faster. Here scale, shift and SiLU are part of it, and all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

CACHED = 1 << 19
"""Numbers that are worked on at once, so that the steps in between stay in the cache."""


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x (B, C, H, W) lies in memory pixel by pixel, and not channel by channel.

    A network that is exported goes the plain way: to ask for strides would fix its batch.
    """
    if torch.compiler.is_exporting():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def whole(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalised(
    x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Return x (B, n, C) normalised over n and groups of C, times gain plus offset, then SiLU.

    `gain` and `offset` are (B, C) float32. Where a gradient is asked for it is written out: of the
    steps of the formula, PyTorch would keep each. Forward mode takes the formula as it is.
    """
    if unpack_dual(x).tangent is not None:
        y = formula(x, gain, offset, groups=groups, eps=eps, silu=silu, in_place=False)[0]
        return y.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad or offset.requires_grad):
        result: Tensor = Normalise.apply(x, gain, offset, groups, eps, silu)
        return result
    return by_parts(x, gain, offset, groups, eps, silu)[0]


def formula(
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool,
    in_place: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `normalised` does, whole, and mean and 1 / std by channel, (B, C) each.

    With `in_place` steps are written over earlier ones, while these are in the cache; what
    PyTorch is to differentiate forbids that.
    """
    x32, n = whole(x), x.shape[1]
    if is_coarse(x):
        square = x32 * x32
        mean, mean_square = group_mean(torch.stack([x32.sum(1), square.sum(1)]), n, groups)
        z, variance = x32, torch.addcmul(mean_square, mean, mean, value=-1)
    else:
        mean = group_mean(x32.sum(1), n, groups)
        z = x32 - mean[:, None]
        square = z * z
        variance = group_mean(square.sum(1), n, groups)
    rstd = (variance.clamp_min(0) + eps).rsqrt()
    factor, added = line(x, gain, offset, mean, rstd)
    y = torch.addcmul(added[:, None], z, factor[:, None], out=square if in_place else None)
    return F.silu(y, inplace=in_place) if silu else y, mean, rstd


def is_coarse(x: Tensor) -> bool:
    """Tell whether x is worked on as it is, with its mean in it, because it was rounded already.

    That saves time: in bfloat16 the rounding is far more than what float32 loses when the square
    of the mean is subtracted from the mean square.
    """
    return x.dtype == torch.bfloat16


def line(
    x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return by what z, which is x or x without its mean, is multiplied and what is added to it."""
    factor = gain * rstd
    return factor, torch.addcmul(offset, mean, factor, value=-1) if is_coarse(x) else offset


def group_mean(total: Tensor, n: int, groups: int) -> Tensor:
    """Return the mean over n and each group, for its channels, of what sums to `total` over n.

    Both are (..., C). PyTorch's sum over a few neighbours is slow, and a group is often a pair.
    """
    size = total.shape[-1] // groups
    if size == 1:
        return total / n
    parts = total.unflatten(-1, (groups, size))
    sums = parts[..., 0] + parts[..., 1] if size == 2 else parts.sum(-1)
    return (sums / (n * size)).unsqueeze(-1).expand_as(parts).flatten(-2)


def gradients(
    grad: Tensor,
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (B, n, C), whole, and of gain and offset (B, C) for that of y."""
    coarse, x32 = is_coarse(x), whole(x)
    z = x32 if coarse else x32 - mean[:, None]
    given, grad = grad, whole(grad)
    factor, added = line(x, gain, offset, mean, rstd)
    spare = None  # steps are written over earlier ones, while these are in the cache
    if silu:
        y = torch.addcmul(added[:, None], z, factor[:, None])
        spare = None if grad is given else grad
        grad = torch.ops.aten.silu_backward.grad_input(grad, y, grad_input=y)
    of_offset = grad.sum(1)
    product = torch.mul(grad, z, out=spare)
    of_gain = product.sum(1)
    if coarse:
        of_gain.addcmul_(mean, of_offset, value=-1)
    of_gain *= rstd
    # of x: rstd (gain grad - a - b (x - mean) rstd) with a, b the means over a group of
    # gain grad and gain grad (x - mean) rstd
    a, b = rstd * group_mean(gain * torch.stack([of_offset, of_gain]), x.shape[1], groups)
    slope = b * rstd
    base = torch.addcmul(a, mean, slope, value=-1) if coarse else a
    of_x = torch.addcmul(-base[:, None], z, slope[:, None], value=-1, out=product)
    return of_x.addcmul_(grad, factor[:, None]), of_gain, of_offset


def by_parts(
    x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `formula` does, y in x's dtype, from a few images at a time."""
    compute = partial(formula, groups=groups, eps=eps, silu=silu)
    y, mean, rstd = in_parts(compute, x, gain, offset)
    return y, mean, rstd


def in_parts(compute: Callable[..., tuple[Tensor, ...]], x: Tensor, *rest: Tensor) -> list[Tensor]:
    """Return `compute` of a few images at a time, its first result in the dtype of x (B, n, C)."""
    batch, pixels, channels = x.shape
    at_once = max(CACHED // (pixels * channels), 1)
    if at_once >= batch:
        first, *others = compute(x, *rest)
        return [first.to(x.dtype), *others]
    results = [torch.empty_like(t) for t in (x, *rest[-2:])]
    columns = (t.split(at_once) for t in (*results, x, *rest))
    for out_x, out_a, out_b, *part in zip(*columns, strict=True):
        for out, found in zip((out_x, out_a, out_b), compute(*part), strict=True):
            out.copy_(found)
    return results


class Normalise(torch.autograd.Function):
    """`normalised` with its derivative; of its size it keeps x alone, in its own dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        """Return y."""
        y, mean, rstd = by_parts(x, gain, offset, groups, eps, silu)
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, gain and offset."""
        compute = partial(gradients, groups=ctx.groups, silu=ctx.silu)
        return (*in_parts(compute, grads[0], *ctx.saved_tensors), None, None, None)
