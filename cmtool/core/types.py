"""The vocabulary of the engine. Everything else in core is a function of these.

Shapes, everywhere:

    x, x0, noise   (B, C, H, W)  float; images are in [-1, 1]; H and W need not be equal
    sigma          (B,)          noise level; float64 where it comes from a grid
    sigma_to       (B,)          noise level that a flow map jumps to, or None
    labels         (B,)          int64 class indices, NO_CLASS where none is known; or None
    loss           (B,)          one value per image
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

NO_CLASS = -1
"""The label of an image whose class a conditional network is not told."""


class Denoiser(Protocol):
    """A model: `(x, sigma, labels, sigma_to) -> x0`, the x0 by which one Euler step lands.

    The step goes from x at sigma along the path of the probability-flow ODE to sigma_to. A
    diffusion teacher answers for sigma_to = sigma, the posterior mean of x0, whatever it is asked;
    a consistency model answers for sigma_to = 0, the end of the path; a flow map answers for any
    level, and for 0 when none is given. Nothing else tells them apart.
    """

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        sigma_to: Tensor | None = None,
        /,
    ) -> Tensor:
        """Return x0 (B, C, H, W) in x's dtype for x (B, C, H, W) and the others (B,) or None."""
        ...


Solver = Callable[[Denoiser, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""One step of the ODE: `(denoiser, x, sigma, sigma_next, labels) -> x_next`."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""d(x, y) of a loss: two images (B, C, H, W) -> (B,)."""

Weighting = Callable[[Tensor, Tensor], Tensor]
"""lambda of a loss: `(sigma_hi, sigma_lo) -> (B,)`, both (B,); sigma_lo is 0 for one level."""

RandnLike = Callable[[Tensor], Tensor]
"""Unit noise of the shape of its argument: the only source of noise in samplers."""

Projection = Callable[[Tensor], Tensor]
"""What an edit does to each x0: an idempotent affine map."""
