"""MeanFlow (Geng et al. 2025): the mean velocity between two times of a path of straight lines.

At time t, z = (1 - t) x0 + t noise, and the velocity is v = noise - x0. In EDM's terms
sigma = t / (1 - t) and x = z / (1 - t). A flow map's answer x0 for (x, sigma, sigma_to) stands for
the mean velocity u = (z - x0) / t, so that any network with a second noise label may be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmtool.core.rng import same_dropout
from cmtool.core.tangents import forward_mode
from cmtool.core.tensors import expand
from cmtool.core.types import Denoiser


def mean_velocity(f: Denoiser, z: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
    """Return u(z, r, t) (B, C, H, W), the mean velocity from time t down to r, (B,) each."""
    x0 = f(z / expand(1 - t, z), t / (1 - t), labels, r / (1 - r))
    return (z - x0) / expand(t, z)


def mean_flow_target(
    f: Denoiser, z: Tensor, velocity: Tensor, t: Tensor, r: Tensor, labels: Tensor | None
) -> Tensor:
    """Return v - (t - r) du/dt (B, C, H, W), the change along the path (MeanFlow, eq. 8, 10)."""

    def along(z: Tensor, t: Tensor) -> Tensor:
        return mean_velocity(f, z, t, r, labels)

    _, change = forward_mode(along, (z, t), (velocity, torch.ones_like(t)))
    return velocity - expand(t - r, z) * change


def mean_flow_loss(
    student: Denoiser,
    target: Denoiser,
    z: Tensor,
    velocity: Tensor,
    t: Tensor,
    r: Tensor,
    labels: Tensor | None,
    *,
    power: float = 0.75,
    eps: float = 1e-3,
) -> Tensor:
    """Return q / (q + eps)^power, q = |u - target|^2, (B,); the divisor is not differentiated.

    The sum is over pixels (MeanFlow, sec. 4.3). Only the student is differentiated, and both passes
    see the same dropout masks. Where r = t the target is the velocity: flow matching.
    """
    with same_dropout() as replay:
        u = mean_velocity(student, z, t, r, labels)
        replay()
        with torch.no_grad():
            goal = mean_flow_target(target, z, velocity, t, r, labels)
    square = (u - goal).square().flatten(1).sum(1)
    return square / (square.detach() + eps) ** power
