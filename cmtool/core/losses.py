"""Losses: the formulas that methods use. A teacher learns to denoise, a consistency model to agree.

Every function returns one value per image, (B,), or the points of a path that are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.core.distances import is_norm
from cmtool.core.rng import same_dropout
from cmtool.core.solvers import euler, slope
from cmtool.core.tangents import OdePoint, curvature, half_square, tangent
from cmtool.core.tensors import expand
from cmtool.core.types import Denoiser, Distance, Solver, Weighting


class Pair(NamedTuple):
    """Two points of one path of the ODE, x (B, C, H, W) and sigma (B,), sigma_lo < sigma_hi."""

    x_hi: Tensor
    sigma_hi: Tensor
    x_lo: Tensor
    sigma_lo: Tensor


def noise_pair(x0: Tensor, sigma_hi: Tensor, sigma_lo: Tensor, noise: Tensor) -> Pair:
    """Return x0 at both levels with the same noise (Song et al. 2023, Alg. 3)."""
    x_hi = x0 + expand(sigma_hi, x0) * noise
    x_lo = x0 + expand(sigma_lo, x0) * noise
    return Pair(x_hi, sigma_hi, x_lo, sigma_lo)


def teacher_pair(
    x0: Tensor,
    sigma_hi: Tensor,
    sigma_lo: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    teacher: Denoiser,
    solver: Solver,
) -> Pair:
    """Return x0 at sigma_hi, and where one step of the teacher's ODE leads (Alg. 2).

    The teacher is not differentiated and its denoised image is not clamped.
    """
    x_hi = x0 + expand(sigma_hi, x0) * noise
    with torch.no_grad():
        x_lo = solver(teacher, x_hi, sigma_hi, sigma_lo, labels)
    return Pair(x_hi, sigma_hi, x_lo, sigma_lo)


def noise_point(x0: Tensor, sigma: Tensor, noise: Tensor) -> OdePoint:
    """Return x0 at sigma; its slope (x - x0) / sigma is the noise (Song et al. 2023, eq. 30)."""
    return OdePoint(x0 + expand(sigma, x0) * noise, sigma, noise)


def teacher_point(
    x0: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None, teacher: Denoiser
) -> OdePoint:
    """Return x0 at sigma with the slope of the teacher's ODE, -sigma s(x) in the paper's eq. 25."""
    x = x0 + expand(sigma, x0) * noise
    with torch.no_grad():
        return OdePoint(x, sigma, slope(teacher, x, sigma, labels))


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    pair: Pair,
    labels: Tensor | None,
    distance: Distance,
    weight: Weighting,
) -> Tensor:
    """Return lambda d(f(x_hi), f_target(x_lo)), (B,) (Song et al. 2023, eq. 7 and 10).

    Only the student is differentiated; both passes see the same dropout masks. Where sigma_lo is 0
    the target is x_lo itself, the end of the path, whatever the network would say. The weight is a
    function of both levels; the released code takes it at the higher one, the paper writes the
    lower (the published weighting is 1).
    """
    x0_student, x0_target = answers(student, target, pair, labels)
    return weight(pair.sigma_hi, pair.sigma_lo).to(x0_student) * distance(x0_student, x0_target)


def answers(
    student: Denoiser, target: Denoiser, pair: Pair, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return f(x_hi) and f_target(x_lo) (B, C, H, W), as `consistency_loss` compares them."""
    with same_dropout() as replay:
        x0_student = student(pair.x_hi, pair.sigma_hi, labels)
        replay()
        with torch.no_grad():
            at_end = pair.sigma_lo == 0
            x0_target = target(pair.x_lo, torch.where(at_end, pair.sigma_hi, pair.sigma_lo), labels)
            x0_target = torch.where(expand(at_end, pair.x_lo) > 0, pair.x_lo, x0_target)
    return x0_student, x0_target


def continuous_loss(
    student: Denoiser,
    target: Denoiser,
    point: OdePoint,
    labels: Tensor | None,
    distance: Distance,
    weight: Weighting,
) -> Tensor:
    """Return lambda f^T H g, g = df/dsigma along the path, (B,) (Song et al. 2023, Th. 5 and 6).

    H is the curvature of d(., f) at f; g and H are of the target, not differentiated. By eq. 25
    and 30 this has the gradient of the consistency loss of a pair of levels, divided by their
    difference, as that vanishes. Its value says nothing; here it is shifted to the one of
    `live_loss`, which does. The paper's l2 is a sum over pixels, ours a mean.
    """
    with same_dropout() as replay:
        x0 = student(point.x, point.sigma, labels)
        replay()
        with torch.no_grad():
            x0_target, g = tangent(target, point, labels)
    h_g = curvature(distance, x0_target, g)
    scale = weight(point.sigma, torch.zeros_like(point.sigma)).to(x0)
    return scale * ((x0 - x0.detach() + g / 2) * h_g).flatten(1).sum(1)


def live_loss(
    student: Denoiser,
    target: Denoiser,
    point: OdePoint,
    labels: Tensor | None,
    distance: Distance,
    weight: Weighting,
) -> Tensor:
    """Return lambda g^T H g / 2, or lambda d(g, 0) of a norm, (B,) (Song et al. 2023, Th. 3 and 4).

    `target` is the module of the student, whose g is differentiated too (theta- = theta). For l2
    this is the mean of g^2 (eq. 21; the released code takes the root of the sum), for l1 the mean
    of |g|. The one image is for what wraps the student: DDP gets ready for a backward pass when it
    is called, and cannot itself be differentiated forwards.
    """
    student(point.x[:1], point.sigma[:1], None if labels is None else labels[:1])
    x0, g = tangent(target, point, labels)
    is_kinked = is_norm(distance)
    near = distance(g, torch.zeros_like(g)) if is_kinked else half_square(distance, x0, g)
    return weight(point.sigma, torch.zeros_like(point.sigma)).to(g) * near


def progressive_loss(
    student: Denoiser,
    previous: Denoiser,
    x: Tensor,
    sigma_hi: Tensor,
    sigma_mid: Tensor,
    sigma_lo: Tensor,
    labels: Tensor | None,
    distance: Distance,
    weight: Weighting,
) -> Tensor:
    """Return lambda d(D(x), the x0 by which one Euler step lands where two of `previous` do), (B,).

    Salimans & Ho (2022), Alg. 2, in the EDM parametrisation; x (B, C, H, W) is at sigma_hi.
    """
    with torch.no_grad():
        x_mid = euler(previous, x, sigma_hi, sigma_mid, labels)
        x_lo = euler(previous, x_mid, sigma_mid, sigma_lo, labels)
        chord = (x_lo - x) / expand(sigma_lo - sigma_hi, x)
        x0 = x - expand(sigma_hi, x) * chord
    return weight(sigma_hi, sigma_lo).to(x) * distance(student(x, sigma_hi, labels), x0)


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    weight: Weighting,
) -> Tensor:
    """Return lambda mean (D(x0 + sigma noise) - x0)^2 over pixels, (B,) (Karras et al., eq. 2)."""
    denoised = denoiser(x0 + expand(sigma, x0) * noise, sigma, labels)
    scale = weight(sigma, torch.zeros_like(sigma)).to(x0)
    return scale * (denoised - x0).square().flatten(1).mean(1)


def uniform_weight(sigma_hi: Tensor, sigma_lo: Tensor) -> Tensor:
    """Return 1: every consistency model of the 2023 paper."""
    return torch.ones_like(sigma_hi)


def snr(sigma_hi: Tensor, sigma_lo: Tensor) -> Tensor:
    """Return the signal-to-noise ratio sigma^-2."""
    return sigma_hi**-2


def snr_plus_one(sigma_hi: Tensor, sigma_lo: Tensor) -> Tensor:
    """Return sigma^-2 + 1."""
    return sigma_hi**-2 + 1


def karras(sigma_hi: Tensor, sigma_lo: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return sigma^-2 + sigma_data^-2 = 1 / c_out^2 (EDM; ECT on ImageNet).

    It makes the network's own error unit-weighted.
    """
    return sigma_hi**-2 + sigma_data**-2


def truncated_snr(sigma_hi: Tensor, sigma_lo: Tensor) -> Tensor:
    """Return max(sigma^-2, 1) (Salimans & Ho 2022)."""
    return torch.clamp(sigma_hi**-2, min=1)


def inverse_gap(sigma_hi: Tensor, sigma_lo: Tensor) -> Tensor:
    """Return 1 / (sigma_hi - sigma_lo) (Song & Dhariwal 2023, sec. 3.2; ECT on CIFAR-10)."""
    return 1 / (sigma_hi - sigma_lo)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_weight,
    "inverse_gap": inverse_gap,
    "karras": karras,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "truncated_snr": truncated_snr,
}
