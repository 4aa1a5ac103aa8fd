"""What a run is made of, built from its preset and checked before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cmtool.core.methods import Objective
from cmtool.core.noise import Curriculum
from cmtool.core.samplers import check_levels
from cmtool.data.batches import BatchFn, batches
from cmtool.data.datasets import Dataset, load_dataset
from cmtool.data.survey import check_images
from cmtool.errors import InputError
from cmtool.evaluation.during_training import Evaluation, build_evaluation
from cmtool.models import Model
from cmtool.presets.build import build_curriculum, build_objective, build_sampler
from cmtool.presets.schema import Preset
from cmtool.sampling import plan
from cmtool.system.dist import Group
from cmtool.training.events import event_writer
from cmtool.training.log import Watcher
from cmtool.training.start import Start
from cmtool.training.state import TrainState, build_state


class Run(NamedTuple):
    """A run as each of its processes knows it."""

    preset: Preset
    out: Path
    watcher: Watcher
    teacher: Model | None
    device: str
    group: Group
    data: Dataset
    evaluation: Evaluation | None
    objective: Objective
    curriculum: Curriculum
    state: TrainState
    microbatch: BatchFn


def set_up(start: Start, watcher: Watcher, teacher: Model | None, device: str, group: Group) -> Run:
    """Return a run, ready for its first step. Raises UserError or InputError if a part is wrong."""
    preset = start.preset
    data = load_images(preset, watcher)
    check_fit(preset, data, teacher)
    chosen = plan(preset)  # of the sample grids
    build_sampler(chosen.sampler)
    check_levels(chosen.sigmas, preset.noise.sigma_min)
    evaluation = build_evaluation(preset, data, device)
    if preset.run.tensorboard:
        event_writer()  # raises now, not at the first line, where TensorBoard is missing
    objective = build_objective(preset, teacher.f if teacher else None, device)
    curriculum = build_curriculum(preset)
    curriculum(0, preset.train.steps)
    if data.is_checked_first and not start.resume:
        watcher.note(f"decoding all {len(data):,} images once, to find bad ones before training")
        check_images(data, preset.data.workers, group.rank, group.world_size)
    state = build_state(preset, teacher, device, group)
    microbatch = batches(
        data, batch=preset.train.batch, shards=preset.train.accumulate * group.world_size,
        seed=preset.train.seed, device=device, flip=preset.data.flip, workers=preset.data.workers,
        timeout=preset.data.timeout, rank=group.rank, world_size=group.world_size,
    )  # fmt: skip
    return Run(
        preset, start.out, watcher, teacher, device, group, data, evaluation, objective,
        curriculum, state, microbatch,
    )  # fmt: skip


def load_images(preset: Preset, watcher: Watcher) -> Dataset:
    """Return the preset's data set; without its labels if the model has no classes."""
    data = load_dataset(
        preset.data.path, size=preset.model.image_size, channels=preset.model.channels,
        fit=preset.data.fit,
    )  # fmt: skip
    if data.labels is None or preset.model.num_classes:
        return data
    watcher.note(f"the {data.num_classes} classes of {data.name} are not used: the model has none")
    return replace(data, labels=None, num_classes=0)


def check_fit(preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise InputError unless data, preset and teacher agree on size, channels and classes."""
    if teacher is not None and teacher.kind != "teacher":
        raise InputError(
            f"{teacher.source} is a consistency model, not a teacher",
            "give a model trained with an edm preset",
        )
    who = "the model" if teacher is None else f"the teacher {teacher.source}"
    channels, h, w = preset.model.channels, *preset.model.image_size
    c, dh, dw = data.images.shape[1:]
    if (c, dh, dw) != (channels, h, w):
        raise InputError(
            f"{data.name} has images of {dw}x{dh} with {c} channels, {who} wants {w}x{h} with"
            f" {channels}",
            f"resize the images, or --set model.image_size=[{dh},{dw}] --set model.channels={c}"
            if teacher is None
            else "bring the images to the teacher's size and channels, or give another teacher",
        )
    if preset.model.num_classes != data.num_classes:
        raise InputError(
            f"{data.name} has {data.num_classes} classes, {who} {preset.model.num_classes}",
            f"--set model.num_classes={data.num_classes}"
            if teacher is None
            else "give the classes the teacher was trained with, or another teacher",
        )
