"""How the kernels of group normalisation are launched; with this file Triton is loaded."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.core.networks.cuda.kernels import (
    backward_kernel,
    forward_kernel,
    moments_kernel,
    sums_kernel,
)

TILE = 2048
"""Numbers that a program works on at once."""
LANES = 64
"""Channels of a program, at least: neighbours in memory are read together."""
WARPS = 4
ENOUGH = 1024
"""Programs that keep a GPU busy; with fewer of them, images are split into chunks."""
TILES = 8
"""A chunk is at least so many tiles high."""
MOST_CHUNKS = 64


class Plan(NamedTuple):
    """How the work on images (B, C, H, W) is divided into programs, the same for all kernels."""

    grid: tuple[int, int]
    chunks: int
    sizes: tuple[int, ...]
    """Pixels, channels, size of a group, groups, pixels of a chunk, chunks."""
    shape: dict[str, Any]
    """What a kernel is compiled for."""


def parts_of(number: int, size: int) -> int:
    """Return how many parts of a size a number of things makes, the last perhaps smaller."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()


@lru_cache(1 << 10)
def plan(images: int, channels: int, pixels: int, groups: int) -> Plan:
    """Return the plan for images of so many channels and pixels."""
    size = channels // groups
    places = power_of_2(size)
    together = min(max(LANES // places, 1), power_of_2(groups))
    rows = min(max(TILE // (places * together), 1), power_of_2(pixels))
    blocks = parts_of(groups, together)
    wanted = min(ENOUGH // (images * blocks), pixels // (rows * TILES), MOST_CHUNKS)
    height = parts_of(parts_of(pixels, max(wanted, 1)), rows) * rows
    chunks = parts_of(pixels, height)
    shape = {
        "ROWS": rows, "GROUPS": together, "PLACES": places, "FULL": size == places,
        "num_warps": WARPS,
    }  # fmt: skip
    sizes = (pixels, channels, size, groups, height, chunks)
    return Plan((images * chunks, blocks), chunks, sizes, shape)


def planned(x: Tensor, groups: int) -> Plan:
    """Return the plan for x (B, C, H, W)."""
    images, channels, height, width = x.shape
    return plan(images, channels, height * width, groups)


def rows_of(scale: Tensor | None, shift: Tensor | None, x: Tensor) -> tuple[Any, ...]:
    """Return scale and shift (B, C) with a channel's neighbour beside it, and their strides.

    Then tells whether there are any; x stands in for them if not.
    """
    if scale is None or shift is None:
        return x, x, 0, 0, False
    scale, shift = (t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return scale, shift, scale.stride(0), shift.stride(0), True


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y, laid out as x (B, C, H, W), and mean and 1 / std of its groups (2, B, groups)."""
    grid, chunks, sizes, shape = planned(x, groups)
    y = torch.empty_like(x)
    stats = parts = x.new_empty((2, len(x), groups), dtype=torch.float32)
    of_scale, of_shift, *strides, scaled = rows_of(scale, shift, x)
    with torch.cuda.device_of(x):
        if chunks > 1:
            parts = x.new_empty((2, len(x), chunks, groups), dtype=torch.float32)
            moments_kernel[grid](x, parts, *sizes, **shape)
        forward_kernel[grid](
            x, y, weight, bias, of_scale, of_shift, parts, stats, *sizes, *strides, eps,
            CHUNKS=power_of_2(chunks), SCALED=scaled, SILU=silu, **shape,
        )  # fmt: skip
    return y, stats


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, stats: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of x, and by image those of weight and bias, then scale and shift.

    The latter are (2, B, C), with scale and shift (4, B, C).
    """
    grid, chunks, sizes, shape = planned(x, groups)
    grad = grad.contiguous(memory_format=torch.channels_last)
    of_x, parts = torch.empty_like(x), stats
    of_scale, of_shift, *strides, scaled = rows_of(scale, shift, x)
    of_rest = x.new_empty((4 if scaled else 2, *x.shape[:2]), dtype=torch.float32)
    rest = (weight, bias, of_scale, of_shift, stats)
    with torch.cuda.device_of(x):
        if chunks > 1:
            parts = x.new_empty((2, len(x), chunks, x.shape[1]), dtype=torch.float32)
            sums_kernel[grid](
                grad, x, *rest, parts, *sizes, *strides, SCALED=scaled, SILU=silu, **shape
            )
        backward_kernel[grid](
            grad, x, of_x, *rest, parts, of_rest, *sizes, *strides,
            CHUNKS=power_of_2(chunks), SCALED=scaled, SILU=silu, **shape,
        )  # fmt: skip
    return of_x, of_rest
