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
from cmtool.core.solvers import euler
from cmtool.core.tensors import expand
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
        slope = (x_lo - x) / expand(sigma_lo - sigma_hi, x)
        x0 = x - expand(sigma_hi, x) * slope
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


def told(network: Callable[..., Tensor], warps: Tensor) -> Denoiser:
    """Return the denoiser of images that were warped: the network hears how, (B, LABELS)."""

    def denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return network(x, sigma, labels, warps)

    return denoiser


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
        sigma = levels(x0.shape[0], stage.n, noise_range, generator).sigma_hi.to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        denoiser = student
        if augment is not None:
            x0, warps = augment(x0, generator)
            denoiser = told(student, warps)
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
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        pair = make_pair(x0, sigma_hi.to(x0.device), sigma_lo.to(x0.device), noise, labels)
        loss = consistency_loss(student, target or student, pair, labels, distance, weight)
        return LossBatch(loss, pair.sigma_hi)

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
        hi, mid, lo = (s.to(x0.device) for s in (hi, root**noise_range.rho, lo))
        noise = torch.randn(x0.shape, generator=generator).to(x0)
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
