"""Methods: what a training step compares. Each is one function `(models, given) -> loss (B,)`.

A method takes, as keyword-only parameters, the choices of a preset that it needs: `distance`,
`weight`, `solver`, `noise_range`, and options of its own. Its row in METHODS says what it makes and
needs. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.adaptive import Grid, own_grid
from cmtool.core.losses import (
    answers,
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
from cmtool.core.meanflow import mean_flow_loss
from cmtool.core.networks.edm2 import LogVariance
from cmtool.core.noise import NoiseRange, Stage
from cmtool.core.precond import log_label
from cmtool.core.scm import LinearLogVariance, normaliser, scm_loss
from cmtool.core.tensors import expand
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
    models: Models, given: Given, *, noise_range: NoiseRange, distance: Distance, weight: Weighting
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


def scm_training(
    models: Models,
    given: Given,
    *,
    weight: Weighting,
    sigma_data: float,
    tangent: Literal["norm", "rms", "clip"] = "norm",
    c: float | None = None,
    warmup_images: int = 5_120_000,
) -> Tensor:
    """Return the loss of sCT (Lu & Song 2025, eq. 8): the tangent along the data's own path.

    `tangent` says how it is normalised, by c. In the warm-up it turns from that of a diffusion
    model into that of a consistency model.
    """
    x0, labels, noise, sigma, _, stage = given
    warmth = min(stage.images / max(warmup_images, 1), 1.0)
    return scm_loss(
        models.student, models.target, noise_point(x0, sigma, noise), x0, labels, weight,
        normaliser(tangent, c), sigma_data=sigma_data, log_variance=models.own, warmth=warmth,
    )  # fmt: skip


def scm_distillation(
    models: Models,
    given: Given,
    *,
    weight: Weighting,
    sigma_data: float,
    tangent: Literal["norm", "rms", "clip"] = "norm",
    c: float | None = None,
    warmup_images: int = 5_120_000,
) -> Tensor:
    """Return the loss of sCD (Lu & Song 2025, eq. 8): the tangent along the teacher's path."""
    assert models.teacher is not None
    x0, labels, noise, sigma, _, stage = given
    point = teacher_point(x0, sigma, noise, labels, models.teacher)
    clean = point.x - expand(sigma, x0) * point.slope
    warmth = min(stage.images / max(warmup_images, 1), 1.0)
    return scm_loss(
        models.student, models.target, point, clean, labels, weight, normaliser(tangent, c),
        sigma_data=sigma_data, log_variance=models.own, warmth=warmth,
    )  # fmt: skip


def truncated_training(
    models: Models,
    given: Given,
    *,
    distance: Distance,
    weight: Weighting,
    transition: float,
    boundary_weight: float = 0.1,
) -> Tensor:
    """Return the loss of TCM's second stage (Lee et al. 2025): consistency above the transition.

    Below it the network of the first stage answers, which is frozen: pairs that straddle it tie the
    two together. Images that lie at the transition itself are their own mean, which
    `boundary_weight` multiplies; the mean of the loss is the paper's total.
    """
    loss = consistency_training(models, given, distance=distance, weight=weight)
    at_boundary = (given.sigma_hi == transition).to(loss)
    count, share = len(loss), at_boundary.sum()
    rest = (1 - at_boundary) * count / (count - share).clamp_min(1)
    return loss * (rest + boundary_weight * at_boundary * count / share.clamp_min(1))


def mid_training(models: Models, given: Given, *, distance: Distance, weight: Weighting) -> Tensor:
    """Return the loss of a point of the teacher's path and its end (CMT, Hu et al. 2025).

    `loss.source = "paths"` draws them: x0 is the path's end, and the point is x0 + sigma noise.
    """
    x0, labels, noise, sigma, _, _ = given
    found = models.student(x0 + expand(sigma, x0) * noise, sigma, labels)
    return weight(sigma, torch.zeros_like(sigma)).to(found) * distance(found, x0)


def mean_flow(models: Models, given: Given, *, power: float = 0.75, eps: float = 1e-3) -> Tensor:
    """Return the loss of a mean velocity and its derivative along the path (Geng et al. 2025)."""
    x0, labels, noise, hi, lo, _ = given
    t, r = hi / (1 + hi), lo / (1 + lo)
    z = expand(1 - t, x0) * x0 + expand(t, x0) * noise
    return mean_flow_loss(
        models.student, models.target, z, noise - x0, t, r, labels, power=power, eps=eps
    )


def adaptive_training(models: Models, given: Given, *, distance: Distance) -> Tensor:
    """Return d(f(x_hi), f(x_lo)) / d(f(x_lo), x0), (B,), on a grid of the model's own (ADCM).

    Bai et al. (2025): the weight is the inverse of the global error by the same distance, and is
    not differentiated.
    """
    pair = noise_pair(given.x0, given.sigma_hi, given.sigma_lo, given.noise)
    found, goal = answers(models.student, models.target, pair, given.labels)
    return distance(found, goal) / distance(goal, given.x0).clamp_min(1e-6)


Before = Callable[..., Stage]
"""What a method does before a step: `(target, own, images, stage, generator, *, ...) -> Stage`.

`images()` are those of the first microbatch of the step, the same in all processes.
"""


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
    shares_masks: bool = True
    """Student and target see the same dropout masks, where there are any."""
    warps: bool = False
    """Its training images may be warped (data.augment), and the network is told how."""
    teacher_kind: Kind = "teacher"
    """What its teacher, or the model it starts from, must be."""
    source: str = "images"
    """What loss.source must be."""
    owns: Callable[[], nn.Module] | None = None
    """Makes a module of the method's own: it is trained, saved and sharded with the student."""
    before: Before | None = None
    """Called before each step; it may take options of `loss.method` too."""
    good_loss: str = ""
    """What the loss of a good run looks like, in a sentence or two for its report."""


_CONTINUOUS = (
    "Training follows the gradient of the method and does not minimise this value: the curve may"
    " rise. It should stay bounded, as the gradient norm should. Judge by the samples or a metric."
)
_STAGES = "The loss falls and flattens within a stage, and may step where a stage begins."
_LEARNED_WEIGHT = (
    "The loss falls as the learned log-variance follows it, and may become negative. Its level says"
    " little: judge by the samples or a metric."
)
METHODS: dict[str, MethodRow] = {
    "denoising": MethodRow(
        denoising, "teacher", targets=("none",), shares_masks=False, warps=True,
        good_loss="The loss falls fast at first, then ever more slowly, and never reaches 0: noise"
        " cannot be guessed. Samples still improve when the curve looks flat.",
    ),
    "uncertain_denoising": MethodRow(
        uncertain_denoising, "teacher", targets=("none",), shares_masks=False, owns=LogVariance,
        good_loss="The loss falls fast at first, then ever more slowly. It is a log-likelihood and"
        " may be negative. Samples still improve when the curve looks flat.",
    ),
    "consistency_training": MethodRow(
        consistency_training, "consistency",
        good_loss="The loss falls and flattens while the levels of a pair stay as far apart. Where"
        " the grid gets finer (N grows, or a new stage begins) it may step up or down, as it is"
        " another loss then: compare it within a stage, and the samples across stages.",
    ),
    "consistency_distillation": MethodRow(
        consistency_distillation, "consistency", needs_teacher=True,
        good_loss="The loss falls fast at first and then flattens. It may rise a little later, as"
        " the target becomes sharper: then judge by the samples, or by a metric.",
    ),
    "progressive_distillation": MethodRow(
        progressive_distillation, "teacher", needs_teacher=True, targets=("previous",),
        shares_masks=False,
        good_loss="The loss falls within each stage. It jumps up where a stage begins, as the"
        " student then learns to do two steps in one anew, and its floor rises with each stage.",
    ),
    "continuous_training": MethodRow(
        continuous_training, "consistency", targets=("student",), needs_curvature=True,
        good_loss=_CONTINUOUS,
    ),
    "continuous_distillation": MethodRow(
        continuous_distillation, "consistency", needs_teacher=True, targets=("student",),
        needs_curvature=True,
        good_loss=_CONTINUOUS,
    ),
    "live_distillation": MethodRow(
        live_distillation, "consistency", needs_teacher=True, targets=("student",),
        shares_masks=False, recomputes=False,
        good_loss="The loss falls and flattens: it is the squared change of the model along the"
        " teacher's path, and 0 for a model that is consistent.",
    ),
    "scm_training": MethodRow(
        scm_training, "consistency", targets=("student",), recomputes=False, owns=LinearLogVariance,
        good_loss=_LEARNED_WEIGHT,
    ),
    "scm_distillation": MethodRow(
        scm_distillation, "consistency", needs_teacher=True, targets=("student",), recomputes=False,
        owns=LinearLogVariance,
        good_loss=_LEARNED_WEIGHT,
    ),
    "truncated_training": MethodRow(
        truncated_training, "consistency", targets=("student",), teacher_kind="consistency",
        good_loss=_STAGES,
    ),
    "mid_training": MethodRow(
        mid_training, "consistency", needs_teacher=True, targets=("none",), shares_masks=False,
        source="paths",
        good_loss="The loss falls fast at first, then slowly: it is how far the model is from the"
        " ends of the teacher's paths, and does not depend on the model itself.",
    ),
    "mean_flow": MethodRow(
        mean_flow, "flow map", targets=("student",), recomputes=False,
        good_loss="The loss stays nearly level: each image's is divided by a power of itself. Judge"
        " by the samples or a metric.",
    ),
    "adaptive_training": MethodRow(
        adaptive_training, "consistency", targets=("student",), owns=Grid, before=own_grid,
        good_loss=_STAGES,
    ),
}  # fmt: skip
