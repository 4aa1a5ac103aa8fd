"""What a training step asks of a method: one microbatch, with its levels and noise drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from cmtool.core.augment import Augment
from cmtool.core.methods import Given, Method, Models
from cmtool.core.noise import LevelPicker, NoiseRange, Stage
from cmtool.core.tensors import to_device
from cmtool.core.types import Denoiser


class LossBatch(NamedTuple):
    """The loss of each image (B,), and the higher noise level it was measured at (B,)."""

    loss: Tensor
    sigma: Tensor


class Objective(Protocol):
    """One microbatch of a method."""

    def __call__(
        self,
        models: Models,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
        point: Point | None = None,
        /,
    ) -> LossBatch:
        """Return the losses of images x0 (B, C, H, W) with labels (B,), at the point if given."""
        ...


class Point(NamedTuple):
    """Where the images of a microbatch start: x0 + sigma noise, sigma (B,)."""

    noise: Tensor
    sigma: Tensor


def make_objective(
    method: Method,
    levels: LevelPicker,
    noise_range: NoiseRange,
    *,
    teacher: Denoiser | None = None,
    augment: Augment | None = None,
) -> Objective:
    """Return what a training step asks for: levels and noise are drawn, the method compares.

    Where points are given, nothing is drawn but what the method draws.

    With `augment` the images are warped first, and the student is told how.
    """

    def objective(
        models: Models,
        x0: Tensor,
        labels: Tensor | None,
        stage: Stage,
        generator: Generator,
        point: Point | None = None,
    ) -> LossBatch:
        if point is None:
            picked = levels(len(x0), stage, noise_range, generator)
            hi, lo = (to_device(sigma, x0.device) for sigma in picked)
            noise = noise_like(x0, generator)
        else:
            noise, hi, lo = point.noise, point.sigma, torch.zeros_like(point.sigma)
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
