"""From a model and seeds to images: what sample, edit, eval and training runs all do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.build import Model, build_curriculum, build_sampler, noise_range
from cmtool.core.edits import Edit
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import SeededNoise
from cmtool.core.samplers import clipped, multistep, sampling_levels
from cmtool.errors import UserError, nearest
from cmtool.presets import Card, Choice, Preset

PUBLISHED_GRID = 40


class Plan(NamedTuple):
    """A sampler and its descending levels; `evaluations` network calls an image."""

    sampler: Choice
    sigmas: tuple[float, ...]

    @property
    def evaluations(self) -> int:
        """Network calls an image."""
        heun = self.sampler.name == "heun"
        return 2 * len(self.sigmas) - 1 if heun else len(self.sigmas)


def plan(
    preset: Card,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """Return how to sample a model: what is given, else what its preset says.

    Levels for n steps are the preset's tuned ones if it has them, else a Karras grid for a
    teacher and levels of the training grid for a consistency model.
    """
    chosen = Choice(name=sampler) if sampler else preset.sample.sampler
    if chosen.name != "multistep" and preset.kind == "consistency":
        raise UserError(
            f"sampler {chosen.name!r} walks a teacher's ODE; this is a consistency model",
            "use multistep, or leave --sampler out",
        )
    if chosen.name == "multistep" and preset.kind == "teacher":
        raise UserError(
            "multistep needs a consistency model; this is a teacher",
            nearest("multistep", ["heun", "euler"]),
        )
    if sigmas is not None and steps is not None:
        raise UserError(f"both --steps {steps} and --sigmas", "give one of them")
    if sigmas is not None and max(sigmas, default=0) > preset.noise.sigma_max:
        raise UserError(
            f"noise level {max(sigmas):g} is above the model's {preset.noise.sigma_max:g}",
            "the model never saw so much noise: lower it",
        )
    if sigmas is not None:
        return Plan(chosen, tuple(sigmas))
    n = steps or preset.sample.steps
    tuned = preset.sample.levels.get(str(n))
    if tuned is not None:
        return Plan(chosen, tuple(tuned))
    if preset.kind == "consistency":
        return Plan(chosen, tuple(trained_levels(preset, n)))
    return Plan(chosen, tuple(sampling_levels(n, noise_range(preset))))


def trained_levels(preset: Card, n: int) -> list[float]:
    """Return n descending levels a consistency model was trained on, n equal strides by index.

    Between the levels of its grid a model distilled on a coarse one is much worse than on them.
    More levels than the grid has above sigma_min are taken from a grid that has enough.
    """
    size = grid_size(preset)
    grid = sampling_levels(max(size, n + 1), noise_range(preset))
    return [grid[round(i * (len(grid) - 1) / n)] for i in range(n)]


def grid_size(preset: Card) -> int:
    """Return the points of the grid a consistency model was trained on; 40 where nobody knows."""
    if preset.sample.grid is not None:
        return preset.sample.grid
    if isinstance(preset, Preset):
        return build_curriculum(preset)(preset.train.steps, preset.train.steps).n
    return PUBLISHED_GRID


@contextmanager
def evaluating(f: Preconditioned) -> Iterator[None]:
    """Put a model that is being trained into eval mode inside the block."""
    before = f.training
    f.eval()
    try:
        yield
    finally:
        f.train(before)


@torch.no_grad()
def generate(
    f: Preconditioned,
    preset: Card,
    chosen: Plan,
    seeds: Sequence[int],
    *,
    labels: Tensor | None = None,
    batch: int = 256,
    device: str = "cpu",
    clip: bool = True,
) -> Iterator[Tensor]:
    """Yield images (B, C, H, W) in [-1, 1] for consecutive batches of seeds.

    An image is a function of its seed, its label and the plan. Without `labels` a conditional
    model draws each image's class from its seed.
    """
    denoiser = clipped(f) if clip else f
    draw = build_sampler(chosen.sampler)
    shape = (preset.model.channels, *preset.model.image_size)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        noise = SeededNoise(part)
        given = None if labels is None else labels[start : start + batch].to(device)
        if given is None and preset.model.num_classes:
            given = noise.labels(preset.model.num_classes).to(device)
        yield draw(
            denoiser,
            torch.zeros(len(part), *shape, device=device),
            chosen.sigmas,
            noise,
            sigma_min=preset.noise.sigma_min,
            labels=given,
        )


@torch.no_grad()
def run_edit(model: Model, edit: Edit, chosen: Plan, seed: int, label: int | None) -> Tensor:
    """Return the edited image (1, C, H, W); what the edit keeps is kept after clamping."""
    init = edit.init
    labels = None if label is None else torch.full((1,), label, device=init.device)
    return multistep(
        clipped(model.f),
        init,
        chosen.sigmas,
        SeededNoise([seed]),
        sigma_min=model.preset.noise.sigma_min,
        labels=labels,
        project=edit.project,
    )


@torch.no_grad()
def best_class(model: Model, edit: Edit, chosen: Plan, seed: int) -> int:
    """Return the class under which an edit's free answer is nearest to what it must keep.

    The edit is run once per class, and the last x0 before projection compared with the one after.
    """
    num_classes = model.preset.model.num_classes
    gaps: list[Tensor] = []

    def project(x0: Tensor) -> Tensor:
        kept = edit.project(x0)
        gaps.append((kept - x0).square().flatten(1).sum(1))
        return kept

    noise = SeededNoise([seed])
    multistep(
        clipped(model.f),
        edit.init.expand(num_classes, *edit.init.shape[1:]),
        chosen.sigmas,
        lambda like: noise(like[:1]).expand_as(like),
        sigma_min=model.preset.noise.sigma_min,
        labels=torch.arange(num_classes, device=edit.init.device),
        project=project,
    )
    return int(torch.stack(gaps[1:] or gaps).mean(0).argmin())
