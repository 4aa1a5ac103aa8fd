"""Small helpers: a noise level beside an image, and the two plainest maps of an x0."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

NO_FLOAT64 = {"mps"}
"""Devices that refuse float64. There noise levels and sums are float32."""


def precise(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 on a device that has no better."""
    return torch.float32 if torch.device(device).type in NO_FLOAT64 else torch.float64


def doubled(t: Tensor) -> Tensor:
    """Return a tensor in float64, or as near to it as its device can."""
    return t.to(precise(t.device))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` (B,) as (B, 1, 1, 1), on the device and in the dtype of the image `like`."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def channels_last(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the channels of a pixel beside each other in memory.

    Convolutions are fastest so, and what is computed from it follows. `contiguous` would leave
    images of one channel, whose layout is ambiguous, as they are. Shapes without numbers (the meta
    device) have no use for a layout, and PyTorch 2.8 would count copies that it does not make.
    """
    if x.is_meta:
        return x
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def level(sigma: float | Tensor, like: Tensor) -> Tensor:
    """Return one noise level for a whole batch: (B,) float64 on the device of `like`.

    It is made there: a number that is sent would be waited for.
    """
    value = torch.full((), float(sigma), dtype=precise(like.device), device=like.device)
    return value.expand(like.shape[0])


def identity(x0: Tensor) -> Tensor:
    """Return x0 (B, C, H, W) unchanged."""
    return x0


def clip(x0: Tensor) -> Tensor:
    """Return x0 clamped to [-1, 1], as the released sampler does at every evaluation."""
    return x0.clamp(-1, 1)


def chunks_of(t: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return `size` rows of t at a time; its last row is repeated to fill the last chunk."""
    short = -len(t) % size
    return (torch.cat([t, t[-1:].expand(short, *t.shape[1:])]) if short else t).split(size)


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return the tensor on a device; a copy to a GPU waits for nothing.

    A copy out of memory that is not page-locked would wait for all that the GPU has to do before.
    float64 becomes float32 for a device that has no better.
    """
    if tensor.dtype == torch.float64:
        tensor = tensor.to(precise(device))
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        with suppress(RuntimeError):  # no page-locked memory is left: the copy is waited for
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this process holds: all, unless they are sharded."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
