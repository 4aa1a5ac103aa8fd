"""Two helpers that put a noise level beside an image."""

from __future__ import annotations

import torch
from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` (B,) as (B, 1, 1, 1), on the device and in the dtype of the image `like`."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def level(sigma: float | Tensor, like: Tensor) -> Tensor:
    """Return one noise level for a whole batch: (B,) float64 on the device of `like`."""
    value = torch.as_tensor(sigma, dtype=torch.float64, device=like.device)
    return value.expand(like.shape[0])
