"""Methods: what a training step compares. Each is one function `(models, given) -> loss (B,)`.

A method takes, as keyword-only parameters, the choices of a preset that it needs: `distance`,
`weight`, `solver`, `noise_range`, and options of its own. Its row in METHODS says what it makes and
needs. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from cmtool.core.augment import Augment
from cmtool.core.losses import (
    consistency_loss,
    continuous_loss,
    denoising_loss,
    live_loss,
    noise_pair,
    noise_point,
    progressive_loss,
    teacher_pair,
    teacher_point,
)
from cmtool.core.networks.edm2 import LogVariance
from cmtool.core.noise import LevelPicker, NoiseRange, Stage
from cmtool.core.precond import log_label
from cmtool.core.tensors import expand, to_device
from cmtool.core.types import Denoiser, Distance, Solver, Weighting

Kind = Literal["teacher", "consistency", "flow map"]


class Models(NamedTuple):
    """The models of a step. The target is the student itself where no other is kept (mu = 0).

    `own` is the module that belongs to the method, if its row names one.
    """

    student: Denoiser
    target: Denoiser
    teacher: Denoiser | None = None
    own: nn.Module | None = None


class Given(NamedTuple):
    """One microbatch: x0 and unit noise (B, C, H, W), labels and levels (B,), and the stage."""

    x0: Tensor
    labels: Tensor | None
    noise: Tensor
    sigma_hi: Tensor
    sigma_lo: Tensor
    stage: Stage


Method = Callable[..., Tensor]
"""`(models, given, *, distance, weight, solver, ...: only what it takes) -> loss (B,)`."""


def denoising(models: Models, given: Given, *, weight: Weighting) -> Tensor:
    """Return the loss of a diffusion teacher at one level (Karras et al. 2022, eq. 2)."""
    x0, labels, noise, sigma, _, _ = given
    return denoising_loss(models.student, x0, sigma, noise, labels, weight)


def uncertain_denoising(models: Models, given: Given, *, weight: Weighting) -> Tensor:
    """Return a teacher's loss over e^u, plus u, its learned log-variance (Karras et al. 2024).

    That is eq. 21 of EDM2, which takes the sum over pixels in place of our mean. With the weight
    `karras` it makes all levels count alike, whatever their error.
    """
    assert models.own is not None
    x0, labels, noise, sigma, _, _ = given
    u = models.own(log_label(sigma).to(x0))
    return denoising_loss(models.student, x0, sigma, noise, labels, weight) / u.exp() + u


def consistency_training(
    models: Models, given: Given, *, distance: Distance, weight: Weighting
) -> Tensor:
    """Return the loss of two levels of one noise (Song et al. 2023, Alg. 3)."""
    pair = noise_pair(given.x0, given.sigma_hi, given.sigma_lo, given.noise)
    return consistency_loss(models.student, models.target, pair, given.labels, distance, weight)


def consistency_distillation(
    models: Models, given: Given, *, solver: Solver, distance: Distance, weight: Weighting
) -> Tensor:
    """Return the loss of two ends of one step of the teacher's ODE (Song et al. 2023, Alg. 2)."""
    assert models.teacher is not None
    x0, labels, noise, hi, lo, _ = given
    pair = teacher_pair(x0, hi, lo, noise, labels, models.teacher, solver)
    return consistency_loss(models.student, models.target, pair, labels, distance, weight)


def progressive_distillation(
    models: Models,
    given: Given,
    *,
    noise_range: NoiseRange,
    distance: Distance,
    weight: Weighting,
) -> Tensor:
    """Return the loss of one step for two of the previous student (Salimans & Ho 2022, Alg. 2).

    The level between the two steps is the middle in rho's scale.
    """
    x0, labels, noise, hi, lo, _ = given
    rho = noise_range.rho
    mid = ((hi ** (1 / rho) + lo ** (1 / rho)) / 2) ** rho
    x = x0 + expand(hi, x0) * noise
    return progressive_loss(models.student, models.target, x, hi, mid, lo, labels, distance, weight)


def continuous_training(
    models: Models, given: Given, *, distance: Distance, weight: Weighting
) -> Tensor:
    """Return the loss of two infinitely near levels of one noise (Song et al. 2023, Th. 6)."""
    point = noise_point(given.x0, given.sigma_hi, given.noise)
    return continuous_loss(models.student, models.target, point, given.labels, distance, weight)


def continuous_distillation(
    models: Models, given: Given, *, distance: Distance, weight: Weighting
) -> Tensor:
    """Return the loss of two infinitely near points of the teacher's path (Song et al., Th. 5)."""
    assert models.teacher is not None
    x0, labels, noise, sigma, _, _ = given
    point = teacher_point(x0, sigma, noise, labels, models.teacher)
    return continuous_loss(models.student, models.target, point, labels, distance, weight)


def live_distillation(
    models: Models, given: Given, *, distance: Distance, weight: Weighting
) -> Tensor:
    """Return the loss of such points with the target differentiated too (Song et al., Th. 3, 4).

    Without a teacher this would minimise the variance of the noise: there is no such training.
    """
    assert models.teacher is not None
    x0, labels, noise, sigma, _, _ = given
    point = teacher_point(x0, sigma, noise, labels, models.teacher)
    return live_loss(models.student, models.target, point, labels, distance, weight)


class MethodRow(NamedTuple):
    """What a method makes and needs."""

    loss: Method
    makes: Kind
    needs_teacher: bool = False
    targets: tuple[str, ...] = ("student", "ema")
    """Values of loss.target that it takes: none, student, ema, or previous (an earlier student)."""
    needs_curvature: bool = False
    """The distance must have a second derivative where both images are equal."""
    recomputes: bool = True
    """train.checkpoint_activations may be on; forward mode through a backward pass forbids it."""
    warps: bool = False
    """Its training images may be warped (data.augment), and the network is told how."""
    owns: Callable[[], nn.Module] | None = None
    """Makes a module of the method's own: it is trained, saved and sharded with the student."""
    good_loss: str = ""
    """What the loss of a good run looks like, in a sentence or two for its report."""


class LossBatch(NamedTuple):
    """The loss of each image (B,), and the higher noise level it was measured at (B,)."""

    loss: Tensor
    sigma: Tensor


Objective = Callable[[Models, Tensor, Tensor | None, Stage, Generator], LossBatch]
"""One microbatch of a method: `(models, x0, labels, stage, generator) -> LossBatch`."""


def make_objective(
    method: Method,
    levels: LevelPicker,
    noise_range: NoiseRange,
    *,
    teacher: Denoiser | None = None,
    augment: Augment | None = None,
) -> Objective:
    """Return what a training step asks for: levels and noise are drawn, the method compares.

    With `augment` the images are warped first, and the student is told how.
    """

    def objective(
        models: Models, x0: Tensor, labels: Tensor | None, stage: Stage, generator: Generator
    ) -> LossBatch:
        picked = levels(len(x0), stage, noise_range, generator)
        hi, lo = (to_device(sigma, x0.device) for sigma in picked)
        noise = noise_like(x0, generator)
        models = models._replace(teacher=teacher)
        if augment is not None:
            x0, warps = augment(x0, generator)
            models = models._replace(student=with_warps(models.student, warps))
        loss = method(models, Given(x0, labels, noise, hi, lo, stage))
        return LossBatch(loss, hi)

    return objective


def noise_like(x0: Tensor, generator: Generator) -> Tensor:
    """Return unit noise of x0's shape, dtype and device, drawn on the CPU."""
    return to_device(torch.randn(x0.shape, generator=generator), x0.device).to(x0.dtype)


def with_warps(network: Callable[..., Tensor], warps: Tensor) -> Denoiser:
    """Return the denoiser of images that were warped: the network is told how, (B, LABELS)."""

    def denoiser(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        return network(x, sigma, *given, augment_labels=warps)

    return denoiser


_CONTINUOUS = (
    "Training follows the gradient of the method and does not minimise this value: the curve may"
    " rise. It should stay bounded, as the gradient norm should. Judge by the samples or a metric."
)
METHODS: dict[str, MethodRow] = {
    "denoising": MethodRow(
        denoising,
        "teacher",
        targets=("none",),
        warps=True,
        good_loss="The loss falls fast at first, then ever more slowly, and never reaches 0: noise"
        " cannot be guessed. Samples still improve when the curve looks flat.",
    ),
    "uncertain_denoising": MethodRow(
        uncertain_denoising,
        "teacher",
        targets=("none",),
        owns=LogVariance,
        good_loss="The loss falls fast at first, then ever more slowly. It is a log-likelihood and"
        " may be negative. Samples still improve when the curve looks flat.",
    ),
    "consistency_training": MethodRow(
        consistency_training,
        "consistency",
        good_loss="The loss falls and flattens while the levels of a pair stay as far apart. Where"
        " the grid gets finer (N grows, or a new stage begins) it may step up or down, as it is"
        " another loss then: compare it within a stage, and the samples across stages.",
    ),
    "consistency_distillation": MethodRow(
        consistency_distillation,
        "consistency",
        needs_teacher=True,
        good_loss="The loss falls fast at first and then flattens. It may rise a little later, as"
        " the target becomes sharper: then judge by the samples, or by a metric.",
    ),
    "progressive_distillation": MethodRow(
        progressive_distillation,
        "teacher",
        needs_teacher=True,
        targets=("previous",),
        good_loss="The loss falls within each stage. It jumps up where a stage begins, as the"
        " student then learns to do two steps in one anew, and its floor rises with each stage.",
    ),
    "continuous_training": MethodRow(
        continuous_training,
        "consistency",
        targets=("student",),
        needs_curvature=True,
        good_loss=_CONTINUOUS,
    ),
    "continuous_distillation": MethodRow(
        continuous_distillation,
        "consistency",
        needs_teacher=True,
        targets=("student",),
        needs_curvature=True,
        good_loss=_CONTINUOUS,
    ),
    "live_distillation": MethodRow(
        live_distillation,
        "consistency",
        needs_teacher=True,
        targets=("student",),
        recomputes=False,
        good_loss="The loss falls and flattens: it is the squared change of the model along the"
        " teacher's path, and 0 for a model that is consistent.",
    ),
}
