"""How well a consistency model is what it promises: the map to the end of the teacher's ODE."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.core.tensors import doubled, level
from cmtool.core.types import Denoiser, Solver


class PathPoint(NamedTuple):
    """A noise level, and images (B, C, H, W) there that lie on one path each."""

    sigma: float
    x: Tensor


@torch.no_grad()
def paths(
    teacher: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    solver: Solver,
    labels: Tensor | None = None,
) -> Iterator[PathPoint]:
    """Yield the points of the teacher's ODE at descending levels, from noise of variance one."""
    x = sigmas[0] * noise
    yield PathPoint(sigmas[0], x)
    for sigma, after in itertools.pairwise(sigmas):
        x = solver(teacher, x, level(sigma, x), level(after, x), labels)
        yield PathPoint(after, x)


class Deviation(NamedTuple):
    """At a noise level, root mean squares over pixels of images in [-1, 1].

    `end` is the distance of f from the end of the path, `next` that of f from f at the next lower
    level, and `teacher` that of the teacher's denoised image from the end, for comparison.
    """

    sigma: float
    end: float
    next: float
    teacher: float


@torch.no_grad()
def deviations(
    f: Denoiser, teacher: Denoiser, points: Sequence[PathPoint], labels: Tensor | None = None
) -> list[Deviation]:
    """Return how far a consistency model is from the end of the paths, by noise level.

    Song et al. (2023), eq. 5 and Theorem 1: f is the same along a path, and is its end. The last
    point is taken for the end; of it there is no deviation.
    """
    end = points[-1].x
    answers = [f(x, level(sigma, x), labels) for sigma, x in points]
    means = [teacher(x, level(sigma, x), labels) for sigma, x in points]
    return [
        Deviation(point.sigma, _rms(answer, end), _rms(answer, after), _rms(mean, end))
        for point, answer, after, mean in zip(
            points[:-1], answers[:-1], answers[1:], means[:-1], strict=True
        )
    ]


def _rms(a: Tensor, b: Tensor) -> float:
    return float((doubled(a) - doubled(b)).square().mean().sqrt())
