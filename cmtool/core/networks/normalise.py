"""Group normalisation of images that lie in memory pixel by pixel, on a CPU.

There PyTorch's own is up to ten times slower than for images that lie channel by channel, while
convolutions are faster. Here scale, shift and SiLU are part of it, and all is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

CACHED = 1 << 19
"""Numbers that are worked on at once, so that the steps in between stay in the cache."""


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x (B, C, H, W) lies in memory pixel by pixel, and not channel by channel."""
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
        return formula(x, gain, offset, groups=groups, eps=eps, silu=silu)[0]
    if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
        y: Tensor = Normalise.apply(x, gain, offset, groups, eps, silu)
        return y
    return by_parts(x, gain, offset, groups, eps, silu)[0]


def formula(
    x: Tensor, gain: Tensor, offset: Tensor, *, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `normalised` does, and mean and 1 / std by channel, (B, C) each."""
    x32 = whole(x)
    mean = group_mean(x32.sum(1), x.shape[1], groups)
    centred = x32 - mean[:, None]
    rstd = (group_mean((centred * centred).sum(1), x.shape[1], groups) + eps).rsqrt()
    y = torch.addcmul(offset[:, None], centred, (gain * rstd)[:, None])
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype), mean, rstd


def group_mean(total: Tensor, n: int, groups: int) -> Tensor:
    """Return the mean over n and each group, for its channels, of what sums to `total` over n."""
    size = total.shape[1] // groups
    sums = total.unflatten(1, (groups, size)).sum(2, keepdim=True)
    return (sums / (n * size)).expand(-1, -1, size).flatten(1)


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
    """Return the gradients of x (B, n, C), gain and offset (B, C) for that of y (B, n, C)."""
    grad, centred = whole(grad), whole(x) - mean[:, None]
    factor = (gain * rstd)[:, None]
    if silu:
        y = torch.addcmul(offset[:, None], centred, factor)
        grad = torch.ops.aten.silu_backward(grad, y)
    of_offset = grad.sum(1)
    of_gain = (grad * centred).sum(1) * rstd
    # of x: rstd (gain grad - a - b centred rstd) with a, b the means over a group of
    # gain grad and gain grad centred rstd
    a, b = (group_mean(gain * of, x.shape[1], groups) for of in (of_offset, of_gain))
    of_x = torch.addcmul((-a * rstd)[:, None], centred, (-b * rstd * rstd)[:, None])
    return of_x.addcmul_(grad, factor).to(x.dtype), of_gain, of_offset


def by_parts(
    x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `formula` does, from a few images at a time."""
    if images_at_once(x) >= len(x):
        return formula(x, gain, offset, groups=groups, eps=eps, silu=silu)
    parts = zip(*(t.split(images_at_once(x)) for t in (x, gain, offset)), strict=True)
    results = [formula(*part, groups=groups, eps=eps, silu=silu) for part in parts]
    y, mean, rstd = (torch.cat(column) for column in zip(*results, strict=True))
    return y, mean, rstd


def images_at_once(x: Tensor) -> int:
    """Return how many of the images x (B, n, C) are worked on at once."""
    return max(CACHED // x[0].numel(), 1)


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
        saved, at_once = (grads[0], *ctx.saved_tensors), images_at_once(grads[0])
        parts = zip(*(t.split(at_once) for t in saved), strict=True)
        results = [gradients(*part, groups=ctx.groups, silu=ctx.silu) for part in parts]
        columns = zip(*results, strict=True)
        return (*(c[0] if len(c) == 1 else torch.cat(c) for c in columns), None, None, None)
