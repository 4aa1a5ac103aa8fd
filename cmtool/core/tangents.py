"""Derivatives along a path of the ODE, and of distances: what the losses of continuous time need.

By forward mode: one pass gives a function and its derivative in one direction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool.core.types import Denoiser, Distance


class OdePoint(NamedTuple):
    """A point of a path of the ODE, x (B, C, H, W) at sigma (B,), and dx/dsigma there.

    It is a pair whose two points are infinitely near: what continuous time has.
    """

    x: Tensor
    sigma: Tensor
    slope: Tensor


def tangent(f: Denoiser, point: OdePoint, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return f(x, sigma) and df/dsigma + (df/dx) slope, (B, C, H, W) each."""

    def along(x: Tensor, sigma: Tensor) -> Tensor:
        return f(x, sigma, labels)

    direction = (point.slope, torch.ones_like(point.sigma))
    return forward_mode(along, (point.x, point.sigma), direction)


def forward_mode(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return a network's f(*at) and its derivative in a direction, in float32 under autocast too.

    Fused attention has no forward mode: inside, PyTorch takes the plain one.
    """
    device = "cpu" if at[0].is_meta else at[0].device.type  # meta has no autocast
    with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return derivative(f, at, direction)


def curvature(distance: Distance, x0: Tensor, v: Tensor) -> Tensor:
    """Return H v (B, C, H, W), H the second derivative of d(x, x0) by x at x = x0."""
    gradient = torch.func.grad(lambda x: distance(x, x0).sum())
    return derivative(gradient, (x0,), (v,))[1]


def derivative(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return f(*at) and its derivative in a direction, by forward-mode differentiation."""
    _load_forward_mode()
    both = torch.func.jvp(f, at, direction)
    return both[0], both[1]


@lru_cache
def _load_forward_mode() -> None:
    """Have PyTorch load its forward mode, once, without its warning about its own future."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))


def half_square(distance: Distance, x0: Tensor, v: Tensor) -> Tensor:
    """Return v^T H v / 2, (B,): the limit of d(x0 + h v, x0) / h^2 as h vanishes."""
    return (v * curvature(distance, x0, v)).flatten(1).sum(1) / 2
