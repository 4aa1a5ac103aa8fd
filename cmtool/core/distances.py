"""Distances d(x, y) between two images of a loss; each takes (B, C, H, W) twice and returns (B,).

The paper writes sums over pixels; its code, and so cmtool, takes means for l1 and l2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference."""
    return (x - y).abs().flatten(1).mean(1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference (no root)."""
    return (x - y).square().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, *, c: float | None = None) -> Tensor:
    """Return sqrt(|x - y|^2 + c^2) - c with the norm over the whole image.

    c is 0.00054 sqrt(D) for D values an image when None (Song & Dhariwal 2023, sec. 3.3).
    """
    scale = 0.00054 * math.sqrt(x[0].numel()) if c is None else c
    return ((x - y).square().flatten(1).sum(1) + scale**2).sqrt() - scale


DISTANCES: dict[str, Callable[..., Tensor]] = {"l1": l1, "l2": l2, "pseudo_huber": pseudo_huber}
