"""The seconds of a training step by phase: what a preset costs on this device, by trying it."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.core.methods import Before, Models
from cmtool.core.noise import Curriculum, Stage, stage_number
from cmtool.core.objective import LossBatch, Objective, Point
from cmtool.core.paths import Draw, Drawn, PathPoints
from cmtool.core.rng import keyed_generator, seeded
from cmtool.models import SCALINGS_OF, Model
from cmtool.presets.build import (
    SAMPLING,
    build_curriculum,
    build_denoiser,
    build_method,
    build_network,
    build_objective,
    build_source,
    method_row,
    needs_teacher,
    noise_range,
)
from cmtool.presets.schema import Card, Choice, Preset
from cmtool.system.devices import best_precision, on_device, synchronise
from cmtool.training.fit import fit, prepared
from cmtool.training.state import TrainState, build_state, fit_settings, frozen_for_steps

MOST_STEPS = 1_000_000
"""Steps that may be timed in a row."""
START = "start"
RANDOM = "random"
"""The source of a teacher, or of images, that stands in for one that is not there."""
Moment = float | torch.cuda.Event
ImagesOf = Callable[[int], Draw]
"""Images in a microbatch -> what gives each microbatch."""


class Lap(NamedTuple):
    """The seconds of a step by phase.

    `data` is the wait for images, and for points of a teacher's paths; `forward` the objective,
    `backward` the gradient, its norm and the look whether it is finite; `update` the optimizer, the
    weights EMAs and the target.
    """

    data: float
    forward: float
    backward: float
    update: float

    @property
    def whole(self) -> float:
        """The seconds of the step."""
        return sum(self)

    def of(self, times: float) -> Lap:
        """Return the lap of a step of so many times as many images; its update takes no longer."""
        return Lap(self.data * times, self.forward * times, self.backward * times, self.update)


class Rig(NamedTuple):
    """All that a step takes but its images, of which `draws` makes microbatches of any size."""

    preset: Preset
    teacher: Model | None
    device: str
    state: TrainState
    objective: Objective
    curriculum: Curriculum
    before: Before | None
    draws: ImagesOf


class Stopwatch:
    """The moments at which phases begin: by the host's clock, and on a GPU by events in its queue.

    A GPU works behind the host, and the host waits for it once a step. So a step takes as long as
    the host says, and events say how its phases share that.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.has_events = device.startswith("cuda")
        self.marks: list[tuple[str, float, Moment]] = []

    def mark(self, phase: str) -> None:
        """Begin a phase."""
        if not self.has_events:
            synchronise(self.device)
            now = time.perf_counter()
            self.marks.append((phase, now, now))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append((phase, time.perf_counter(), event))

    def finished(self) -> Iterator[Lap]:
        """Yield the laps of the steps that the device has done, and forget their marks."""
        starts = [place for place, mark in enumerate(self.marks) if mark[0] == START]
        for first, last in itertools.pairwise(starts):
            end = self.marks[last][2]
            if isinstance(end, torch.cuda.Event) and not end.query():
                self.marks = self.marks[first:]
                return
            yield _lap(self.marks[first : last + 1])
        self.marks = self.marks[starts[-1] :] if starts else self.marks


def _lap(marks: list[tuple[str, float, Moment]]) -> Lap:
    """Return the seconds between marks by phase; what no phase has is part of the update."""
    whole = marks[-1][1] - marks[0][1]
    found = dict.fromkeys(Lap._fields, 0.0)
    for (phase, _, begun), (_, _, ended) in itertools.pairwise(marks):
        found[phase if phase in found else "update"] += _seconds(begun, ended)
    total = sum(found.values())
    if total <= 0:
        return Lap(0.0, 0.0, 0.0, whole)
    return Lap(*(value * whole / total for value in found.values()))


def _seconds(begun: Moment, ended: Moment) -> float:
    """Return the seconds between two moments of one clock."""
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        return begun.elapsed_time(ended) / 1e3
    assert not isinstance(begun, torch.cuda.Event)
    assert not isinstance(ended, torch.cuda.Event)
    return ended - begun


def rig(preset: Preset, teacher: Model | None, device: str, images: ImagesOf | None = None) -> Rig:
    """Return what steps of a preset take, built as a run builds it; random images without others.

    Raises UserError as `build_state` and `build_objective` do.
    """
    preset = with_precision(preset, device)
    guide = frozen_for_steps(teacher.f, preset, device) if teacher else None
    objective = build_objective(preset, guide, device)
    state = build_state(preset, teacher, device)
    found = images or random_images(preset, device)
    return Rig(
        preset, teacher, device, state, objective, build_curriculum(preset),
        build_method(preset).before, lambda size: build_source(preset, found(size), guide),
    )  # fmt: skip


def with_precision(preset: Preset, device: str) -> Preset:
    """Return a preset with the precision that `auto` is on the device."""
    if preset.train.precision != "auto":
        return preset
    train = preset.train.model_copy(update={"precision": best_precision(device)})
    return preset.model_copy(update={"train": train})


def random_images(preset: Preset, device: str) -> ImagesOf:
    """Return what stands in for a data set: microbatches of random images, always the same."""
    shape = (preset.model.channels, *preset.model.image_size)

    def draws(size: int) -> Draw:
        noise = torch.rand(size, *shape, generator=keyed_generator("images of a bench"))
        x0 = noise.to(device) * 2 - 1
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        classes = labels if preset.model.num_classes else None
        return lambda *_: (x0, classes)

    return draws


def random_teacher(preset: Preset, device: str) -> Model | None:
    """Return a teacher without training for a preset that needs one: a step takes as long."""
    if not needs_teacher(preset):
        return None
    kind, ours = method_row(preset).teacher_kind, preset.model
    options = {
        key: value for key, value in ours.network.options.items()
        if kind == "flow map" or key != "two_time"
    }  # fmt: skip
    update = {
        "network": Choice(name=ours.network.name, **options),
        "scalings": Choice(name=SCALINGS_OF[kind]),
        "transition": None,
        "guidance": None,
    }
    model = ours.model_copy(update=update)
    card = Card(kind=kind, model=model, noise=preset.noise, sample=SAMPLING[kind])
    with seeded(keyed_generator("teacher of a bench")):
        network = build_network(card.model)
    f = on_device(build_denoiser(card, network), device)
    return Model(f.eval().requires_grad_(False), card, kind, RANDOM, "", "")


def laps(rig: Rig, images: int, rounds: int = 1) -> Iterator[Lap]:
    """Yield the seconds of one step after another, each of `rounds` microbatches of `images`.

    The first is slow. The steps are those of `fit`, and change the state. A step that takes points
    of a teacher's paths has its share of walking them. What a method does before some steps is left
    out: `seconds_before` tells it.
    """
    watch, draw, state = Stopwatch(rig.device), rig.draws(images), rig.state
    settings = replace(
        fit_settings(rig.preset), batch=images * rounds, rounds=rounds, steps=MOST_STEPS,
        max_bad_steps=MOST_STEPS,
    )  # fmt: skip
    hook = state.optimizer.register_step_pre_hook(lambda *_: watch.mark("update"))
    steps = fit(
        state, _watched(rig.objective, watch), _watched_draw(draw, watch), rig.curriculum,
        settings, None if rig.before is None else _on_both_ends(rig.preset),
    )  # fmt: skip
    first: Lap | None = None
    share: float | None = None
    try:
        watch.mark(START)
        for _ in steps:
            watch.mark(START)
            for lap in watch.finished():
                if first is not None and share is None:
                    walks = isinstance(draw, PathPoints)
                    walked = max(first.data - lap.data, 0.0) if walks else 0.0
                    share = walked / draw.steps if isinstance(draw, PathPoints) else 0.0
                first = first or lap
                yield lap._replace(data=lap.data + (share or 0.0))
    finally:
        hook.remove()


def _watched(objective: Objective, watch: Stopwatch) -> Objective:
    """Return an objective after which the backward pass begins."""

    def compute(
        models: Models, x0: Tensor, labels: Tensor | None, stage: Stage,
        generator: torch.Generator, point: Point | None = None, /,
    ) -> LossBatch:  # fmt: skip
        outcome = objective(models, x0, labels, stage, generator, point)
        watch.mark("backward")
        return outcome

    return compute


def _watched_draw(draw: Draw, watch: Stopwatch) -> Draw:
    """Return a draw for which a step waits, and after which the forward pass begins."""

    def microbatch(step: int, shard: int) -> tuple[Tensor, Tensor | None] | Drawn:
        watch.mark("data")
        found = draw(step, shard)
        watch.mark("forward")
        return found

    return microbatch


def _on_both_ends(preset: Preset) -> Before:
    """Return what stands in for a method's work before its steps: a grid of two levels, at once."""
    ends = torch.tensor(noise_range(preset)[:2], dtype=torch.float64)
    return lambda student, own, images, stage, generator: stage._replace(grid=ends)


def seconds_before(rig: Rig, images: int) -> float:
    """Return the seconds of what a method does before a step, once, by so many images.

    It may take minutes: an adaptive grid has hundreds of levels, each with a forward-mode pass.
    """
    assert rig.before is not None
    settings = replace(fit_settings(rig.preset), batch=images, rounds=1, steps=MOST_STEPS)
    stage = rig.curriculum(0, rig.preset.train.steps)
    synchronise(rig.device)
    begun = time.perf_counter()
    prepared(rig.before, rig.state, rig.draws(images), stage, settings)
    synchronise(rig.device)
    return time.perf_counter() - begun


def times_before(preset: Preset) -> int:
    """Return how often a run does its method's work before a step; 0 for a method without."""
    before = build_method(preset).before
    if before is None:
        return 0
    every = inspect.signature(before).parameters["every_images"].default
    seen = (preset.train.steps - 1) * preset.train.batch
    return stage_number(seen, every) + 1


def short_laps(preset: Preset, teacher: Model | None, device: str, images: int) -> Iterator[Lap]:
    """Yield the laps of steps of so many random images, at once; the first is slow.

    Networks are not compiled: that takes longer than a few steps.
    """
    short = {"batch": images, "accumulate": 1, "compile": False}
    train = preset.train.model_copy(update=short)
    made = rig(preset.model_copy(update={"train": train}), teacher, device)
    yield from laps(made, images)
