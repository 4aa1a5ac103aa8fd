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


class Rows(NamedTuple):
    """Scale, shift and what is added before the norm, (B, C) each, as a kernel takes them."""

    tensors: tuple[Tensor, ...]
    """With a channel's neighbour beside it; any tensor stands in for one that is not given."""
    strides: tuple[int, ...]
    given: dict[str, bool]
    """What a kernel is compiled for."""


def rows_of(x: Tensor, *rows: Tensor | None) -> Rows:
    """Return scale, shift and addend; scale and shift are there together or not at all."""
    near = [None if t is None else t if t.stride(1) == 1 else t.contiguous() for t in rows]
    scale, _, added = near
    return Rows(
        tuple(x if t is None else t for t in near),
        tuple(0 if t is None else t.stride(0) for t in near),
        {"SCALED": scale is not None, "ADDED": added is not None},
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    added: Tensor | None, groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y, laid out as x (B, C, H, W), and mean and 1 / std of its groups (2, B, groups)."""
    grid, chunks, sizes, shape = planned(x, groups)
    y = torch.empty_like(x)
    stats = parts = x.new_empty((2, len(x), groups), dtype=torch.float32)
    rows = rows_of(x, scale, shift, added)
    with torch.cuda.device_of(x):
        if chunks > 1:
            parts = x.new_empty((2, len(x), chunks, groups), dtype=torch.float32)
            of_added = rows.given["ADDED"]
            moments_kernel[grid](
                x, rows.tensors[2], parts, *sizes, rows.strides[2], ADDED=of_added, **shape
            )
        forward_kernel[grid](
            x, y, weight, bias, *rows.tensors, parts, stats, *sizes, *rows.strides, eps,
            CHUNKS=power_of_2(chunks), SILU=silu, **rows.given, **shape,
        )  # fmt: skip
    return y, stats


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, added: Tensor | None, stats: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, by image of weight, bias, scale and shift, and of the addend.

    The second is (2, B, C), with scale and shift (4, B, C); the third (B, C), without addend (0,).
    """
    grid, chunks, sizes, shape = planned(x, groups)
    grad = grad.contiguous(memory_format=torch.channels_last)
    of_x, parts = torch.empty_like(x), stats
    rows = rows_of(x, scale, shift, added)
    of_rest = x.new_empty((2 if scale is None else 4, *x.shape[:2]), dtype=torch.float32)
    shape_of_added = (0,) if added is None else (len(x), chunks, x.shape[1])
    of_added = x.new_empty(shape_of_added, dtype=torch.float32)
    rest = (weight, bias, *rows.tensors, stats)
    with torch.cuda.device_of(x):
        if chunks > 1:
            parts = x.new_empty((2, len(x), chunks, x.shape[1]), dtype=torch.float32)
            sums_kernel[grid](
                grad, x, *rest, parts, *sizes, *rows.strides, SILU=silu, **rows.given, **shape
            )
        backward_kernel[grid](
            grad, x, of_x, *rest, parts, of_rest, of_added, *sizes, *rows.strides,
            CHUNKS=power_of_2(chunks), SILU=silu, **rows.given, **shape,
        )  # fmt: skip
    if added is not None:
        of_added = of_added.sum(1) if chunks > 1 else of_added[:, 0]
    return of_x, of_rest, of_added
