"""Paths of the teacher's ODE, kept in a bank and used up: what mid-training learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.core.noise import NoiseRange, karras_sigmas
from cmtool.core.rng import keyed_generator
from cmtool.core.solvers import WALKS
from cmtool.core.tensors import expand, to_device
from cmtool.core.types import Denoiser
from cmtool.errors import UserError, nearest


class Drawn(NamedTuple):
    """What a step learns from: x0 (B, C, H, W), and labels (B,) or None.

    Where they are given, x0 + sigma noise is the point to start from, at the level sigma (B,).
    """

    x0: Tensor
    labels: Tensor | None
    noise: Tensor | None = None
    sigma: Tensor | None = None


Draw = Callable[[int, int], "tuple[Tensor, Tensor | None] | Drawn"]
"""`(step, shard)` -> one microbatch."""


class Bank(NamedTuple):
    """The paths of a block of steps: points (n, B, C, H, W), their ends (B, C, H, W), labels."""

    block: int
    points: Tensor
    ends: Tensor
    labels: Tensor | None


def path_levels(points: int, noise_range: NoiseRange, rho: float | None) -> Tensor:
    """Return the levels of a path, (points,) float64 descending, from sigma_max to sigma_min.

    They are even in ln sigma, as in CMT, or those of Karras et al.'s grid of `rho`.
    """
    low, high, _ = noise_range
    if rho is not None:
        return karras_sigmas(points, low, high, rho).flip(0)
    share = torch.linspace(0, 1, points, dtype=torch.float64)
    return high * (low / high) ** share


@dataclass
class PathPoints:
    """A Draw of points of the teacher's paths: those of a microbatch lie on as many paths.

    A block is as many steps as a path has points. At its first step the paths of a microbatch of
    images are walked, x0 + sigma_max noise being the start; then each step takes one point of every
    path, and all levels are among them. So a step costs one teacher call an image, in batches as
    large as the student's. The bank is a function of (seed, block, shard): a resumed run makes the
    one of its block again.
    """

    images: Draw
    teacher: Denoiser
    noise_range: NoiseRange
    seed: int
    points: int = 16
    walk: str = "dpmpp_2m"
    rho: float | None = None
    banks: dict[int, Bank] = field(default_factory=dict)

    def __call__(self, step: int, shard: int) -> Drawn:
        """Return points of paths as noise beside their ends, and the level of each."""
        block, place = divmod(step, self.points)
        bank = self.banks.get(shard)
        if bank is None or bank.block != block:
            bank = self.banks[shard] = self.walked(block, shard)
        rows = torch.arange(len(bank.ends))
        index = (rows + place) % self.points
        levels = path_levels(self.points, self.noise_range, self.rho)
        sigma = to_device(levels[index], bank.ends.device)
        index, rows = (to_device(t, bank.ends.device) for t in (index, rows))
        noise = (bank.points[index, rows] - bank.ends) / expand(sigma, bank.ends)
        return Drawn(bank.ends, bank.labels, noise, sigma)

    @torch.no_grad()
    def walked(self, block: int, shard: int) -> Bank:
        """Return the paths of a block, whose images are those of the step of its number."""
        x0, labels, *_ = self.images(block, shard)
        generator = keyed_generator("path", self.seed, block, shard)
        noise = to_device(torch.randn(x0.shape, generator=generator), x0.device)
        levels = path_levels(self.points, self.noise_range, self.rho)
        start = x0 + expand(levels[:1], x0) * noise
        *points, end = WALKS[self.walk](self.teacher, start, levels, labels)
        return Bank(block, torch.stack([start, *points]), end, labels)


def teacher_paths(
    images: Draw,
    teacher: Denoiser | None,
    noise_range: NoiseRange,
    seed: int,
    *,
    points: int = 16,
    walk: str = "dpmpp_2m",
    rho: float | None = None,
) -> Draw:
    """Return the Draw of points of the teacher's paths. Raises UserError for a choice that is none.

    `points` is the number of levels of a path, `walk` the solver, `rho` that of the levels' grid;
    without it they are even in ln sigma.
    """
    if walk not in WALKS:
        raise UserError(f"loss.source.walk = {walk!r} is unknown", nearest(walk, WALKS))
    if not 2 <= points <= 1000:
        what = f"loss.source.points = {points} is out of range"
        raise UserError(what, "give 2 to 1000")
    assert teacher is not None
    return PathPoints(images, teacher, noise_range, seed, points, walk, rho)


def only_images(images: Draw, teacher: Denoiser | None, noise_range: NoiseRange, seed: int) -> Draw:
    """Return the Draw of the training images themselves."""
    return images


SOURCES: dict[str, Callable[..., Draw]] = {"images": only_images, "paths": teacher_paths}
"""What a step learns from: `(images, teacher, noise_range, seed, *, ...) -> Draw`."""
