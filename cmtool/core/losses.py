"""Losses: a teacher learns to denoise; a consistency model learns to agree with itself.

An `Objective` is one microbatch of a method: it picks levels, makes the pair, and returns the
loss per image. A method is a choice of functions, not a class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cmtool.core.augment import Augment
from cmtool.core.noise import LevelPicker, NoiseRange, Stage
from cmtool.core.rng import same_dropout
from cmtool.core.solvers import euler, slope
from cmtool.core.tangents import OdePoint, curvature, half_square, tangent
from cmtool.core.tensors import expand, to_device
from cmtool.core.types import Denoiser, Distance, Solver, Weighting


class Pair(NamedTuple):
    """Two points of one path of the ODE, x (B, C, H, W) and sigma (B,), sigma_lo < sigma_hi."""

    x_hi: Tensor
    sigma_hi: Tensor
    x_lo: Tensor
    sigma_lo: Tensor


class LossBatch(NamedTuple):
    """The loss of each image (B,), and the higher noise level it was measured at (B,)."""

    loss: Tensor
    sigma: Tensor


Objective = Callable[
    [Denoiser, Denoiser | None, Tensor, Tensor | None, Stage, Generator], LossBatch
]
"""`(student, target, x0, labels, stage, generator) -> LossBatch`."""


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

    Only the student is differentiated; both passes see the same dropout masks. The weight is
    taken at sigma_hi, as in the released code; the paper writes the lower level (the published
    weighting is 1).
    """
    with same_dropout() as replay:
        x0_student = student(pair.x_hi, pair.sigma_hi, labels)
        replay()
        with torch.no_grad():
            x0_target = target(pair.x_lo, pair.sigma_lo, labels)
    return weight(pair.sigma_hi).to(x0_student) * distance(x0_student, x0_target)


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
    return weight(point.sigma).to(x0) * ((x0 - x0.detach() + g / 2) * h_g).flatten(1).sum(1)


def live_loss(
    student: Denoiser,
    target: Denoiser,
    point: OdePoint,
    labels: Tensor | None,
    distance: Distance,
    weight: Weighting,
    *,
    norm: bool,
) -> Tensor:
    """Return lambda g^T H g / 2, or lambda d(g, 0) of a norm, (B,) (Song et al. 2023, Th. 3 and 4).

    `target` is the module of the student, whose g is differentiated too (theta- = theta). For l2
    this is the mean of g^2 (eq. 21; the released code takes the root of the sum), for l1 the mean
    of |g|. The one image is for what wraps the student: DDP gets ready for a backward pass when it
    is called, and cannot itself be differentiated forwards.
    """
    student(point.x[:1], point.sigma[:1], None if labels is None else labels[:1])
    x0, g = tangent(target, point, labels)
    near = distance(g, torch.zeros_like(g)) if norm else half_square(distance, x0, g)
    return weight(point.sigma).to(g) * near


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
    return weight(sigma_hi).to(x) * distance(student(x, sigma_hi, labels), x0)


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
    return weight(sigma).to(x0) * (denoised - x0).square().flatten(1).mean(1)


def uniform_weight(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return 1: every published consistency model."""
    return torch.ones_like(sigma)


def snr(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return the signal-to-noise ratio sigma^-2."""
    return sigma**-2


def snr_plus_one(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return sigma^-2 + 1."""
    return sigma**-2 + 1


def karras(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return sigma^-2 + sigma_data^-2, which makes the network's own error unit-weighted (EDM)."""
    return sigma**-2 + sigma_data**-2


def truncated_snr(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return max(sigma^-2, 1) (Salimans & Ho 2022)."""
    return torch.clamp(sigma**-2, min=1)


def with_warps(network: Callable[..., Tensor], warps: Tensor) -> Denoiser:
    """Return the denoiser of images that were warped: the network hears how, (B, LABELS)."""

    def denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return network(x, sigma, labels, warps)

    return denoiser


def noise_like(x0: Tensor, generator: Generator) -> Tensor:
    """Return unit noise of x0's shape, dtype and device, drawn on the CPU."""
    return to_device(torch.randn(x0.shape, generator=generator), x0.device).to(x0.dtype)


def denoising_objective(
    levels: LevelPicker,
    weight: Weighting,
    noise_range: NoiseRange,
    augment: Augment | None = None,
) -> Objective:
    """Return the objective of a teacher: one level, one denoising loss, no target.

    With `augment` the images are warped first, and the student takes labels that say how.
    """

    def objective(
        student: Denoiser,
        target: Denoiser | None,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
    ) -> LossBatch:
        sigma = to_device(levels(x0.shape[0], stage.n, noise_range, generator).sigma_hi, x0.device)
        noise = noise_like(x0, generator)
        denoiser = student
        if augment is not None:
            x0, warps = augment(x0, generator)
            denoiser = with_warps(student, warps)
        return LossBatch(denoising_loss(denoiser, x0, sigma, noise, labels, weight), sigma)

    return objective


def consistency_objective(
    levels: LevelPicker,
    make_pair: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Pair],
    distance: Distance,
    weight: Weighting,
    noise_range: NoiseRange,
) -> Objective:
    """Return the objective of CD or CT: `make_pair(x0, sigma_hi, sigma_lo, noise, labels)` decides.

    Without a target network the target is the student itself, not differentiated (mu = 0).
    """

    def objective(
        student: Denoiser,
        target: Denoiser | None,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
    ) -> LossBatch:
        sigma_hi, sigma_lo = levels(x0.shape[0], stage.n, noise_range, generator)
        noise = noise_like(x0, generator)
        sigma_hi, sigma_lo = (to_device(sigma, x0.device) for sigma in (sigma_hi, sigma_lo))
        pair = make_pair(x0, sigma_hi, sigma_lo, noise, labels)
        loss = consistency_loss(student, target or student, pair, labels, distance, weight)
        return LossBatch(loss, pair.sigma_hi)

    return objective


def continuous_objective(
    levels: LevelPicker,
    make_point: Callable[[Tensor, Tensor, Tensor, Tensor | None], OdePoint],
    loss: Callable[[Denoiser, Denoiser, OdePoint, Tensor | None], Tensor],
    noise_range: NoiseRange,
) -> Objective:
    """Return the objective of continuous-time CD or CT: `make_point(x0, sigma, noise, labels)`."""

    def objective(
        student: Denoiser,
        target: Denoiser | None,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
    ) -> LossBatch:
        sigma = levels(x0.shape[0], stage.n, noise_range, generator).sigma_hi.to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        point = make_point(x0, sigma, noise, labels)
        return LossBatch(loss(student, target or student, point, labels), sigma)

    return objective


def progressive_objective(
    levels: LevelPicker, distance: Distance, weight: Weighting, noise_range: NoiseRange
) -> Objective:
    """Return the objective of progressive distillation; the target is the previous student."""

    def objective(
        student: Denoiser,
        target: Denoiser | None,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
    ) -> LossBatch:
        assert target is not None
        hi, lo = levels(x0.shape[0], stage.n, noise_range, generator)
        root = (hi ** (1 / noise_range.rho) + lo ** (1 / noise_range.rho)) / 2
        hi, mid, lo = (to_device(s, x0.device) for s in (hi, root**noise_range.rho, lo))
        noise = noise_like(x0, generator)
        x = x0 + expand(hi, x0) * noise
        loss = progressive_loss(student, target, x, hi, mid, lo, labels, distance, weight)
        return LossBatch(loss, hi)

    return objective


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_weight,
    "karras": karras,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "truncated_snr": truncated_snr,
}
