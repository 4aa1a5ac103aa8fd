"""The vocabulary of the engine. Everything else in core is a function of these.

Shapes, everywhere:

    x, x0, noise   (B, C, H, W)  float; images are in [-1, 1]; H and W need not be equal
    sigma          (B,)          noise level; float64 where it comes from a grid
    labels         (B,)          int64 class indices, or None
    loss           (B,)          one value per image
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A model: `(x, sigma, labels) -> x0`.

    A diffusion teacher returns the posterior mean of x0; a consistency model returns the end
    point of the probability-flow ODE through x. Nothing else tells them apart.
    """

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Return x0 of x's shape and dtype for noise levels `sigma` (B,) and `labels` (B,)."""
        ...


Solver = Callable[[Denoiser, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""One step of the ODE: `(denoiser, x, sigma, sigma_next, labels) -> x_next`."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""d(x, y) of a loss: two images (B, C, H, W) -> (B,)."""

Weighting = Callable[[Tensor], Tensor]
"""lambda(sigma) of a loss: (B,) -> (B,)."""

RandnLike = Callable[[Tensor], Tensor]
"""Unit noise of the shape of its argument: the only source of noise in samplers."""

Projection = Callable[[Tensor], Tensor]
"""What an edit does to each x0: an idempotent affine map."""
