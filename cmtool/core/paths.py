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
    """The paths of a block of steps: points (n, N, C, H, W), their ends (N, C, H, W), labels."""

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

    A block is as many steps as a path has points, times `mixed`. At its first step the paths of
    `mixed` microbatches of images are walked, x0 + sigma_max noise being the start; then each step
    takes one point of as many paths as a microbatch has images, and all levels are among them. So a
    step costs one teacher call an image, in batches as large as the student's. With `mixed` 1 the
    steps of a block have the same paths, else random ones. The bank is a function of (seed, block,
    shard): a resumed run makes the one of its block again.
    """

    images: Draw
    teacher: Denoiser
    noise_range: NoiseRange
    seed: int
    points: int = 16
    walk: str = "dpmpp_2m"
    rho: float | None = None
    mixed: int = 1
    banks: dict[int, Bank] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps that share a bank."""
        return self.points * self.mixed

    def __call__(self, step: int, shard: int) -> Drawn:
        """Return points of paths as noise beside their ends, and the level of each."""
        block, place = divmod(step, self.steps)
        bank = self.banks.get(shard)
        if bank is None or bank.block != block:
            bank = self.banks[shard] = self.walked(block, shard)
        index, rows = self.taken(place, block, shard, len(bank.ends))
        levels = path_levels(self.points, self.noise_range, self.rho)
        sigma = to_device(levels[index], bank.ends.device)
        index, rows = (to_device(t, bank.ends.device) for t in (index, rows))
        ends = bank.ends[rows]
        noise = (bank.points[index, rows] - ends) / expand(sigma, ends)
        return Drawn(ends, None if bank.labels is None else bank.labels[rows], noise, sigma)

    def taken(self, place: int, block: int, shard: int, paths: int) -> tuple[Tensor, Tensor]:
        """Return the levels and the paths, (B,) each, of the points of a step of a block."""
        size = paths // self.mixed
        slots = torch.arange(size)
        index = (slots + place) % self.points
        if self.mixed == 1:
            return index, slots
        turns = torch.arange(self.steps)[:, None]
        levels = ((slots + turns) % self.points).flatten()  # of all steps of the block
        generator = keyed_generator("mixed", self.seed, block, shard)
        order = torch.cat([torch.randperm(paths, generator=generator) for _ in range(self.points)])
        rows = torch.empty_like(levels)
        rows[levels.argsort(stable=True)] = order  # each level has every path once
        return index, rows.view(-1, size)[place]

    def walked(self, block: int, shard: int) -> Bank:
        """Return the paths of a block, whose images are those of the steps of its numbers."""
        numbers = range(block * self.mixed, (block + 1) * self.mixed)
        points, ends, labels = zip(*(self.walk_of(n, shard) for n in numbers), strict=True)
        known = None if labels[0] is None else torch.cat(labels)
        return Bank(block, torch.cat(points, dim=1), torch.cat(ends), known)

    @torch.no_grad()
    def walk_of(self, number: int, shard: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return points, ends and labels of the paths of one microbatch."""
        x0, labels, *_ = self.images(number, shard)
        generator = keyed_generator("path", self.seed, number, shard)
        noise = to_device(torch.randn(x0.shape, generator=generator), x0.device)
        levels = path_levels(self.points, self.noise_range, self.rho)
        start = x0 + expand(levels[:1], x0) * noise
        *points, end = WALKS[self.walk](self.teacher, start, levels, labels)
        return torch.stack([start, *points]), end, labels


def teacher_paths(
    images: Draw,
    teacher: Denoiser | None,
    noise_range: NoiseRange,
    seed: int,
    *,
    points: int = 16,
    walk: str = "dpmpp_2m",
    rho: float | None = None,
    mixed: int = 1,
) -> Draw:
    """Return the Draw of points of the teacher's paths. Raises UserError for a choice that is none.

    `points` is the number of levels of a path, `walk` the solver, `rho` that of the levels' grid;
    without it they are even in ln sigma. `mixed` is the number of microbatches whose paths are
    mixed.
    """
    if walk not in WALKS:
        raise UserError(f"loss.source.walk = {walk!r} is unknown", nearest(walk, WALKS))
    if not 2 <= points <= 1000:
        what = f"loss.source.points = {points} is out of range"
        raise UserError(what, "give 2 to 1000")
    if not 1 <= mixed <= 1000:
        what = f"loss.source.mixed = {mixed} is out of range"
        raise UserError(what, "give 1 to 1000")
    assert teacher is not None
    return PathPoints(images, teacher, noise_range, seed, points, walk, rho, mixed)


def only_images(images: Draw, teacher: Denoiser | None, noise_range: NoiseRange, seed: int) -> Draw:
    """Return the Draw of the training images themselves."""
    return images


SOURCES: dict[str, Callable[..., Draw]] = {"images": only_images, "paths": teacher_paths}
"""What a step learns from: `(images, teacher, noise_range, seed, *, ...) -> Draw`."""
