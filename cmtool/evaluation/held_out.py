"""The loss of held-out images: the run's own, at noise that stays the same for the whole run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cmtool.core.adaptive import Grid
from cmtool.core.methods import Models
from cmtool.core.noise import Stage
from cmtool.core.objective import Point, make_objective
from cmtool.core.paths import Drawn, PathPoints
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import keyed_generator
from cmtool.core.tensors import to_device
from cmtool.core.types import Denoiser
from cmtool.data.datasets import Dataset
from cmtool.data.images import from_uint8
from cmtool.presets.build import (
    build_curriculum,
    build_method,
    build_source,
    followed,
    method_row,
    noise_range,
)
from cmtool.presets.schema import Preset
from cmtool.sampling import OnDrawn
from cmtool.system.compiled import evaluating
from cmtool.system.dist import Group
from cmtool.system.room import in_room

CHUNK = 32
"""Images that the network sees at once: the noise of an image depends on its place among them."""
Loss = Callable[[Models, int, Group, OnDrawn | None], float]
"""From the models at a step to the mean loss; every process calls it."""


def measured(held: Dataset, most: int) -> Tensor:
    """Return the places of the images that are measured: all, or `most`, the same ones always."""
    if len(held) <= most:
        return torch.arange(len(held))
    return torch.randperm(len(held), generator=keyed_generator("subset"))[:most]


def held_out_loss(
    preset: Preset, held: Dataset, teacher: Denoiser | None, most: int, device: str
) -> Loss:
    """Return what measures the loss of a preset's method on held-out images, or on `most` of them.

    Levels and noise are a function of an image's place, so that two values differ by the models
    alone. The stage is the last of the curriculum: a loss on another grid could not be compared. A
    grid that the method makes is the one of the moment. Images are not mirrored or warped, and the
    networks drop nothing out and compute in fp32.
    """
    method, levels, _ = build_method(preset)
    roomy = partial(_roomy, size=preset.model.image_size, device=device)
    teacher = None if teacher is None else roomy(teacher)
    guide = followed(preset, teacher) if method_row(preset).needs_teacher else None
    objective = make_objective(method, levels, noise_range(preset), teacher=guide)
    parts, last = measured(held, most).split(CHUNK), last_stage(preset)

    def images(number: int, _: int) -> tuple[Tensor, Tensor | None]:
        index = parts[number]
        labels = None if held.labels is None else to_device(held.labels[index], device)
        return from_uint8(to_device(held.images[index], device)), labels

    draw, stride = build_source(preset, images, teacher), 1
    if isinstance(draw, PathPoints):
        draw = replace(draw, mixed=1)  # a part has paths of its own
        stride = draw.steps  # steps that share their paths

    def losses(models: Models, number: int) -> list[float]:
        x0, labels, noise, sigma = Drawn(*draw(number * stride, 0))
        point = () if noise is None or sigma is None else (Point(noise, sigma),)
        stage = on_own_grid(last, models)
        generator = keyed_generator("held out", number)
        with torch.no_grad():
            found, _ = objective(models, x0, labels, stage, generator, *point)
        return list(found.tolist())

    def mine(models: Models, group: Group, on_drawn: OnDrawn | None) -> dict[int, list[float]]:
        """Return the losses of this process's parts; every process calls the networks as often."""
        found, total = {}, sum(map(len, parts))
        for first in range(0, len(parts), group.world_size):
            number = first + group.rank
            values = losses(models, min(number, len(parts) - 1))
            if number < len(parts):
                found[number] = values
            if on_drawn is not None:
                on_drawn(min((first + group.world_size) * CHUNK, total), total)
        return found

    def loss(models: Models, step: int, group: Group, on_drawn: OnDrawn | None) -> float:
        assert isinstance(models.student, Preconditioned)
        assert isinstance(models.target, Preconditioned)
        with evaluating(models.student), evaluating(models.target):
            fitting = models._replace(student=roomy(models.student), target=roomy(models.target))
            own = group.together(lambda: mine(fitting, group, on_drawn), f"held out {step}")
        every = [value for part in group.gather(own) for some in part.values() for value in some]
        return math.fsum(every) / len(every) if all(map(math.isfinite, every)) else math.nan

    return loss


def _roomy(f: Denoiser, *, size: tuple[int, int], device: str) -> Denoiser:
    """Return a model that a GPU shows no more images at once than it has room for."""
    assert isinstance(f, Preconditioned)
    return f if torch.device(device).type == "cpu" else in_room(f, f, size)


def last_stage(preset: Preset) -> Stage:
    """Return the stage in which a run of a preset ends."""
    steps = preset.train.steps
    seen = (steps - 1) * preset.train.batch
    return build_curriculum(preset)(steps - 1, steps)._replace(images=seen)


def on_own_grid(stage: Stage, models: Models) -> Stage:
    """Return the stage with the grid that the method made last, if it makes one."""
    if not isinstance(models.own, Grid):
        return stage
    grid = models.own.sigmas[: int(models.own.facts[0])].cpu()
    return stage._replace(grid=grid, n=len(grid))
