"""Continuous-time consistency models, simplified (sCM, Lu & Song 2025): sCT and sCD.

The paper works with TrigFlow, x_t = cos(t) x0 + sin(t) z, z ~ N(0, sigma_data^2), and a network F
with f = cos(t) x_t - sin(t) sigma_data F. Here all is said of f at EDM's levels, so that any
Denoiser with its boundary at 0 may be trained: tan(t) = sigma / sigma_data, and x_t = cos(t) x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.networks.layers import Linear32, sinusoidal_embedding
from cmtool.core.rng import same_dropout
from cmtool.core.tangents import OdePoint, tangent
from cmtool.core.tensors import expand
from cmtool.core.types import Denoiser, Weighting

Normaliser = Callable[[Tensor], Tensor]
"""What is done to a tangent g (B, C, H, W) before it is a target: `(g, *, c) -> g`."""


class Angle(NamedTuple):
    """cos(t) and sin(t) of TrigFlow's time, (B,) each, in the dtype of sigma."""

    cos: Tensor
    sin: Tensor


def angle(sigma: Tensor, sigma_data: float) -> Angle:
    """Return cos and sin of t = arctan(sigma / sigma_data)."""
    length = (sigma**2 + sigma_data**2).sqrt()
    return Angle(sigma_data / length, sigma / length)


def scm_tangent(
    target: Denoiser,
    point: OdePoint,
    clean: Tensor,
    labels: Tensor | None,
    *,
    sigma_data: float,
    warmth: float = 1.0,
) -> Tensor:
    """Return g of the paper's eq. 6 (B, C, H, W): cos(t) df/dt where `warmth` (its r) is 1.

    `clean` is the x0 to which the point's slope leads, (x - x0) / sigma: of the data in sCT, of the
    teacher in sCD. In terms of f, g = (1 - r) cos^2(t) (f - clean) / sin(t) + r cos(t) df/dt.
    """
    cos, sin = angle(point.sigma, sigma_data)
    x0, change = tangent(target, point, labels)
    g = expand(warmth * sigma_data / cos, x0) * change
    if warmth < 1:
        g = g + expand((1 - warmth) * cos**2 / sin, x0) * (x0 - clean)
    return g


def over_norm(g: Tensor, *, c: float = 0.1) -> Tensor:
    """Return g / (|g| + c), the norm over the whole image (Lu & Song 2025, sec. 4.1)."""
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / expand(norm + c, g)


def over_rms(g: Tensor, *, c: float = 0.1) -> Tensor:
    """Return g / (rms(g) + c): |g| / sqrt(D) in place of the norm, as public code has it."""
    rms = g.square().flatten(1).mean(1).sqrt()
    return g / expand(rms + c, g)


def clipped(g: Tensor, *, c: float = 1.0) -> Tensor:
    """Return g clamped to [-c, c], the paper's other choice."""
    return g.clamp(-c, c)


def scm_loss(
    student: Denoiser,
    target: Denoiser,
    point: OdePoint,
    clean: Tensor,
    labels: Tensor | None,
    weight: Weighting,
    normalise: Normaliser,
    *,
    log_variance: Callable[[Tensor], Tensor] | None = None,
    sigma_data: float,
    warmth: float = 1.0,
) -> Tensor:
    """Return exp(-lv) lambda mean (F - F_target - g)^2 + lv, (B,) (Lu & Song 2025, eq. 8).

    The mean is over pixels, g is normalised and not differentiated. lv, the paper's -w, is
    `log_variance` at the point's levels, or 0. F - F_target is 0 and its gradient is that of F, so
    the value is the mean square of g. The paper's prior weight 1 / (sigma_data tan t) is part of g
    already: public code that has 1 / sigma beside it applies it twice.
    """
    with same_dropout() as replay:
        x0 = student(point.x, point.sigma, labels)
        replay()
        with torch.no_grad():
            g = normalise(
                scm_tangent(target, point, clean, labels, sigma_data=sigma_data, warmth=warmth)
            )
    _, sin = angle(point.sigma, sigma_data)
    change = (x0.detach() - x0) / expand(sin * sigma_data, x0)
    square = (change - g).square().flatten(1).mean(1)
    square = weight(point.sigma, torch.zeros_like(point.sigma)).to(square) * square
    if log_variance is None:
        return square
    lv = log_variance(point.sigma).to(square)
    return (-lv).exp() * square + lv


class LinearLogVariance(nn.Module):
    """The log-variance of a loss by noise level: a linear map of features of ln(sigma) / 4.

    It is trained with the student and is not part of the model (Karras et al. 2024, sec. 2; Lu &
    Song 2025, sec. 4.2, whose w is its negative). At the start it is 0.
    """

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.dim = dim
        self.linear = Linear32(dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """Return the log-variance (B,) at sigma (B,)."""
        features = sinusoidal_embedding(sigma.log() / 4, self.dim, end_point=True)
        return self.linear(features.to(self.linear.weight)).squeeze(1)


NORMALISERS: dict[str, Callable[..., Tensor]] = {
    "norm": over_norm,
    "rms": over_rms,
    "clip": clipped,
}


def normaliser(name: str, c: float | None) -> Normaliser:
    """Return a normaliser by its name, with its own c where that is None."""
    chosen = NORMALISERS[name]
    return chosen if c is None else partial(chosen, c=c)
