"""Training on the pretended card: a preset's own steps, without a run folder or real numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from cmtool.core.methods import METHODS
from cmtool.core.objective import Objective
from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import Dataset
from cmtool.models import SCALINGS_OF, Model
from cmtool.presets.build import (
    build_curriculum,
    build_denoiser,
    build_method,
    build_network,
    build_objective,
    build_source,
    needs_teacher,
)
from cmtool.presets.schema import Choice, Preset
from cmtool.presets.toml import parse_override, resolve
from cmtool.system.devices import on_device
from cmtool.training.fit import StepInfo, fit
from cmtool.training.state import (
    TrainState,
    build_state,
    fit_settings,
    frozen_for_steps,
    training_images,
)

DEVICE = "cuda"
NUM_IMAGES = 256


class Training(NamedTuple):
    """A training that has not begun: `steps` takes one step at a time."""

    preset: Preset
    teacher: Model | None
    objective: Objective
    state: TrainState
    steps: Iterator[StepInfo]


class Undrawn(TorchFunctionMode):
    """Leaves the weights of new networks as they are: nobody reads them, and large ones take long.

    Memory that is never written is never taken from the system either.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def preset_of(name, *sets):
    """Return a preset with "KEY=VALUE" overrides."""
    return resolve(name, {"--set": dict(map(parse_override, sets))}).preset


def model_of(preset, kind):
    """Return a model of a preset's network, of a kind, on the card."""
    options = preset.model.model_copy(
        update={"scalings": Choice(name=SCALINGS_OF[kind]), "transition": None}
    )
    card = preset.model_copy(update={"model": options, "kind": kind})
    with Undrawn():
        f: Preconditioned = build_denoiser(card, build_network(card.model))
    f = on_device(f, DEVICE).eval().requires_grad_(False)
    return Model(f, card, kind, "pretended", "", "model")


def teacher_of(preset):
    """Return the teacher that a preset wants, or None."""
    if not needs_teacher(preset):
        return None
    return model_of(preset, METHODS[preset.loss.method.name].teacher_kind)


def images_of(preset):
    """Return images of the preset's size, and classes if it has them."""
    size, classes = preset.model.image_size, preset.model.num_classes
    images = torch.zeros(NUM_IMAGES, preset.model.channels, *size, dtype=torch.uint8)
    labels = torch.zeros(NUM_IMAGES, dtype=torch.int64) if classes else None
    return Dataset("pretended", images, labels, classes)


def training(name, *sets):
    """Return the training of a preset with "KEY=VALUE" overrides."""
    preset = preset_of(name, *sets)
    teacher = teacher_of(preset)
    guide = frozen_for_steps(teacher.f, preset, DEVICE) if teacher else None
    objective = build_objective(preset, guide, DEVICE)
    with Undrawn():
        state = build_state(preset, teacher, DEVICE)
    images = training_images(preset, images_of(preset), DEVICE)
    microbatch = build_source(preset, images, guide)
    steps = fit(
        state, objective, microbatch, build_curriculum(preset), fit_settings(preset),
        build_method(preset).before,
    )  # fmt: skip
    return Training(preset, teacher, objective, state, steps)


@contextmanager
def peak_memory():
    """Yield a list that gains the most bytes that the allocator had given out inside the block."""
    found = []
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated())
