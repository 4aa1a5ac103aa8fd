"""Group normalisation of images that lie in memory pixel by pixel, on a GPU, in one kernel.

PyTorch's own knows only images channel by channel: under autocast it takes a cast to float32, a
copy to that layout, the norm, a cast back and, by the next convolution, a copy to the old layout.
Here what is added before the norm, scale, shift and SiLU are part of it too, and all is computed in
float32 and rounded once.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from cmtool.core.networks.cpu.normalise import whole

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 1 << 12
"""Channels that images may have: a program has a whole group of them in its registers."""
CAPABILITY = 8
"""GPUs before it do not compute in bfloat16, and Triton promises nothing of them."""


def by_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Return silu(norm(x + added) (1 + scale) + shift), in x's dtype, by PyTorch's operations."""
    x = plus(x, added)
    y = F.group_norm(whole(x), groups, weight, bias, eps).to(x.dtype)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]).to(y.dtype) + shift[:, :, None, None].to(y.dtype)
    return F.silu(y) if silu else y


def plus(x: Tensor, added: Tensor | None) -> Tensor:
    """Return x (B, C, H, W) plus added (B, C) at each pixel, in x's dtype; without it, x."""
    return x if added is None else x + added[:, :, None, None].to(x.dtype)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Return what `by_steps` does, for x that the kernel `takes`."""
    given = (x, weight, bias, scale, shift, added)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        result: Tensor = Normalise.apply(*given, groups, eps, silu)
        return result
    return forward(*given, groups, eps, silu)[0]


def takes(x: Tensor, *rest: Tensor | None) -> bool:
    """Tell whether the kernel takes x (B, C, H, W), with the other tensors beside it.

    x must be dense, pixel by pixel, and on a GPU. The kernel has no forward mode: what is
    differentiated so goes the plain way.
    """
    if torch.compiler.is_exporting() or not runs_on(x.device):
        return False
    return fits(x) and not any(has_tangent(t) for t in (x, *rest) if t is not None)


def fits(x: Tensor) -> bool:
    """Tell whether dtype and layout of x are the kernel's."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype in DTYPES and x.shape[1] <= WIDEST and x.numel() > 0 and is_last


def has_tangent(t: Tensor) -> bool:
    """Tell whether t is differentiated forwards."""
    return unpack_dual(t).tangent is not None


def runs_on(device: torch.device) -> bool:
    """Tell whether a device is a GPU that Triton knows, and Triton is installed."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).major < CAPABILITY:
        return False
    return torch.compiler.is_compiling() or has_triton()  # the compiler needs it itself


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed: PyTorch for Windows comes without."""
    return importlib.util.find_spec("triton") is not None


class Normalise(torch.autograd.Function):
    """`group_norm` with its derivative; of its size it keeps x alone, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return y."""
        y, stats = forward(*inputs)
        *given, ctx.groups, ctx.eps, ctx.silu = inputs
        ctx.save_for_backward(*given, stats)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias, scale, shift and what is added.

        Where they are to be differentiated once more they are those of `by_steps`.
        """
        *given, stats = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            settings = (ctx.groups, ctx.eps, ctx.silu)
            return (*differentiable(grads[0], given, settings), None, None, None)
        of_x, of_rest, of_added = backward(grads[0], *given, stats, ctx.groups, ctx.silu)
        of_weight, of_bias = of_rest[:2].sum(1)
        of_scale, of_shift = (None, None) if given[3] is None else of_rest[2:]
        of_rows = (of_scale, of_shift, None if given[5] is None else of_added)
        return of_x, of_weight, of_bias, *of_rows, None, None, None


def differentiable(
    grad: Tensor, given: list[Tensor | None], settings: tuple[int, float, bool]
) -> list[Tensor | None]:
    """Return the gradients of the given tensors, with a graph to differentiate them by."""
    y = by_steps(*given, *settings)  # type: ignore[arg-type,call-arg]  # of the list's length nobody knows
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in given]


def forward(*given: Any) -> tuple[Tensor, Tensor]:
    """Return what `forward_op` does; only the compiler needs an operator, whose call takes long."""
    if torch.compiler.is_compiling():
        results: tuple[Tensor, Tensor] = forward_op(*given)
        return results
    from cmtool.core.networks.cuda import launches  # it loads Triton

    return launches.forward(*given)


def backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `backward_op` does."""
    if torch.compiler.is_compiling():
        results: tuple[Tensor, Tensor, Tensor] = backward_op(*given)
        return results
    from cmtool.core.networks.cuda import launches

    return launches.backward(*given)


@torch.library.custom_op("cmtool::group_norm", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `by_steps` does, and mean and 1 / std of the groups, (2, B, groups)."""
    return forward(x, weight, bias, scale, shift, added, groups, eps, silu)


@torch.library.custom_op("cmtool::group_norm_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    stats: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, by image of weight, bias, scale and shift, and of what is added.

    The second is (4, B, C), without scale and shift (2, B, C); the third (B, C), or (0,).
    """
    return backward(grad, x, weight, bias, scale, shift, added, stats, groups, silu)


@forward_op.register_fake
def shapes_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return tensors without numbers of the shapes that `forward_op` returns."""
    groups = rest[5]
    return torch.empty_like(x), x.new_empty((2, len(x), groups), dtype=torch.float32)


@backward_op.register_fake
def shapes_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without numbers of the shapes that `backward_op` returns."""
    rows = 2 if rest[2] is None else 4
    of_added = (0,) if rest[4] is None else x.shape[:2]
    made = [x.new_empty(shape, dtype=torch.float32) for shape in ((rows, *x.shape[:2]), of_added)]
    return torch.empty_like(x), made[0], made[1]
