"""Adaptive discretisation (ADCM, Bai et al. 2025): the model itself says how far levels lie apart.

A step from t down to t - dt should change f little (local error) and bring it nearer to x0 (global
error, weighed by lam). With v = df/dt from one forward-mode pass the best step is
dt = lam / (1 + lam) E<v, f - x0> / E|v|^2. Steps from sigma_max down make the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from cmtool.core.losses import noise_point
from cmtool.core.noise import NoiseRange, Stage, stage_number
from cmtool.core.tangents import tangent
from cmtool.core.tensors import doubled, level, to_device
from cmtool.core.types import Denoiser
from cmtool.errors import DivergedError

MOST_LEVELS = 4096
"""Levels that a grid may have; the closed form would go on for ever where f does not change."""


def adaptive_step(
    f: Denoiser, x0: Tensor, noise: Tensor, sigma: float, labels: Tensor | None, *, lam: float
) -> float:
    """Return the best step down from a level, by images x0 and unit noise (B, C, H, W).

    It is not bounded: as f becomes consistent, v vanishes and the step grows.
    """
    point = noise_point(x0, level(sigma, x0).contiguous(), noise)
    with torch.no_grad():
        f0, v = tangent(f, point, labels)
    fall, square = doubled(v * (f0 - x0)).sum(), doubled(v).square().sum()
    return float(lam / (1 + lam) * fall / square.clamp_min(torch.finfo(square.dtype).tiny))


def adaptive_grid(
    f: Denoiser,
    x0: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    noise_range: NoiseRange,
    *,
    lam: float,
) -> Tensor:
    """Return the grid from sigma_min to sigma_max, (n,) float64 ascending, both ends exact.

    A step never passes sigma_min. It is at least a quarter of the one for a Gaussian's denoiser,
    sigma lam / (1 + lam): where f hardly changes, few images may even say that it grows. Raises
    DivergedError where f is not finite.
    """
    least = lam / (1 + lam) / 4
    low, sigma = noise_range.sigma_min, noise_range.sigma_max
    found = [sigma]
    while sigma > low and len(found) < MOST_LEVELS - 1:
        step = adaptive_step(f, x0, noise, sigma, labels, lam=lam)
        if step != step:
            raise DivergedError(f"the model is not finite at sigma {sigma:.3g}", "lower train.lr")
        sigma = max(sigma - max(step, sigma * least), low)
        found.append(sigma)
    found[-1] = low
    return torch.tensor(found[::-1], dtype=torch.float64)


class Grid(nn.Module):
    """The grid that a run goes by, saved with it: `sigmas` and how many stages made it."""

    sigmas: Tensor
    facts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigmas", torch.zeros(MOST_LEVELS, dtype=torch.float64))
        self.register_buffer("facts", torch.tensor([0, -1]))  # levels, and the stage they are of

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Grid:
        """Stay on the CPU in float64: it is small, and not all devices have float64."""
        return self

    def levels(self, stage: int, make: Callable[[], Tensor]) -> Tensor:
        """Return the grid (n,) of a stage, made when the stage is new."""
        if int(self.facts[1]) != stage:
            made = make()
            self.sigmas[: len(made)] = made.to(self.sigmas)
            self.facts[0], self.facts[1] = len(made), stage
        return self.sigmas[: int(self.facts[0])].cpu()  # sharding moves it


def own_grid(
    target: Denoiser,
    own: Grid,
    images: Callable[[], tuple[Tensor, Tensor | None]],
    stage: Stage,
    generator: Generator,
    *,
    noise_range: NoiseRange,
    lam: float = 0.01,
    every_images: int = 3_200_000,
) -> Stage:
    """Return the stage with the model's own grid, which is made anew every `every_images` images.

    `images` gives those that it is made by, and `generator` their noise.
    """

    def make() -> Tensor:
        x0, labels = images()
        noise = to_device(torch.randn(x0.shape, generator=generator), x0.device).to(x0.dtype)
        return adaptive_grid(target, x0, noise, labels, noise_range, lam=lam)

    grid = own.levels(stage_number(stage.images, every_images), make)
    return stage._replace(grid=grid, n=len(grid))
