"""How a run starts: what is decided, built and checked before its first step, and recorded."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from cmtool import __version__
from cmtool.core.methods import Before
from cmtool.core.noise import Curriculum
from cmtool.core.objective import Objective
from cmtool.core.optimizers import OPTIMIZERS
from cmtool.core.paths import Draw
from cmtool.core.samplers import check_levels
from cmtool.data.datasets import Dataset, check_rule, load_dataset
from cmtool.data.decoding import check_background
from cmtool.data.held_out import split
from cmtool.data.images import check_fit_rule
from cmtool.data.survey import check_images
from cmtool.errors import InputError, UserError
from cmtool.evaluation.during_training import (
    Evaluation,
    Given,
    build_evaluation,
    check_metric,
)
from cmtool.models import TRAINING_ONLY, Model
from cmtool.presets.build import (
    build_augment,
    build_curriculum,
    build_denoiser,
    build_method,
    build_network,
    build_objective,
    build_sampler,
    build_source,
    check_guided,
    method_row,
    noise_range,
    pick,
)
from cmtool.presets.schema import Choice, Preset
from cmtool.presets.toml import Resolved, flat, load_preset, origin_of, to_toml, with_values
from cmtool.sampling import plan
from cmtool.system.devices import best_precision, shapes_only
from cmtool.system.dist import Group
from cmtool.system.files import read_own, write_atomic, write_json
from cmtool.system.records import read_facts
from cmtool.system.text import is_utf8, printable
from cmtool.training.cost import check_memory
from cmtool.training.folder import (
    is_resumable,
    launched_by,
    launcher,
    refuse_strange,
)
from cmtool.training.lock import read_status, refuse_busy
from cmtool.training.log import Watcher
from cmtool.training.records import Record
from cmtool.training.same import changes, described, run_inputs
from cmtool.training.state import (
    TrainState,
    build_state,
    frozen_for_steps,
    not_taken,
    training_images,
)
from cmtool.training.trackers import check_trackers, trackers_of

MAX_NAMES = 100
"""Classes whose names are recorded."""


class Start(NamedTuple):
    """How a run starts, the same in all its processes.

    `preset` has its precision and the parts of its batch decided, of which `notes` tell the user;
    `launchers` are the torchruns of the processes, "" without one.
    """

    out: Path
    preset: Preset
    origins: Mapping[str, str]
    resume: bool
    overwrite: bool
    launchers: Sequence[str]
    notes: Sequence[str]


class Run(NamedTuple):
    """A run as each of its processes knows it."""

    preset: Preset
    out: Path
    watcher: Watcher
    teacher: Model | None
    init: Model | None
    device: str
    group: Group
    data: Dataset
    held: Dataset | None
    evaluation: Evaluation | None
    objective: Objective
    curriculum: Curriculum
    state: TrainState
    microbatch: Draw
    before: Before | None


def decide_start(
    preset: Preset,
    out: Path,
    origins: Mapping[str, str],
    device: str,
    group: Group,
    *,
    resume: bool,
    overwrite: bool,
) -> Start:
    """Return how a run starts, as the leading process decides it; every process calls this.

    torchrun starts new workers when one fails (`--max-restarts`): they resume what the first ones
    began. Raises UserError for both `resume` and `overwrite`, BusyError for a folder in use.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite", "give one of them")
    out, launchers = group.tell(out), group.gather(launcher())
    group.agreed(lambda: refuse_strange(out, resume=resume), "regular")
    best = group.tell(best_precision(device))
    if preset.train.precision == "auto":  # the run records the precision, and goes on in it
        origins = {**origins, "train.precision": "auto"}
        preset = _with_train(preset, precision=best)
    group.agreed(lambda: refuse_busy(out), "not busy")
    is_restart = group.tell(launched_by(out, launchers) and is_resumable(out))
    notes: list[str] = []
    if resume or is_restart:
        notes += group.agreed(lambda: remarks_on_end(out), "how it ended")
        asked = not is_restart and origins.get("train.accumulate", "").startswith("--")
        preset, note = group.agreed(
            lambda: split_as_before(out, preset, group.world_size, asked=asked), "split"
        )
        notes += [note] if note is not None else []
    overwrite = overwrite and not is_restart
    return Start(out, preset, origins, resume or is_restart, overwrite, launchers, notes)


def remarks_on_end(out: Path) -> list[str]:
    """Return what to say of how the run to be resumed ended, if it could not say so itself."""
    status = read_status(out)
    if status is None or status.state != "killed":
        return []
    return [f"the run in {out} was killed, or the machine went down, after step {status.step}"]


def split_as_before(
    out: Path, preset: Preset, processes: int, *, asked: bool
) -> tuple[Preset, str | None]:
    """Return the preset with its batch split into as many parts as in `out` so far, and a note.

    A part of the batch has its own noise; there are processes times train.accumulate of them. The
    number of parts changes where the processes do not divide it, or where the user `asked` for
    another train.accumulate: then the noise is another from here on.
    """
    record = read_facts(out / "run.json", Record)
    stored = record.processes if record else None
    if stored is None or not is_resumable(out):
        return preset, None
    accumulate, batch = preset.train.accumulate, preset.train.batch
    before = load_preset(str(out / "preset.toml")).train.accumulate * stored
    if not asked:
        least = -(-before // processes)  # no part may be larger than before
        fitting = (n for n in range(least, batch + 1) if batch % (n * processes) == 0)
        accumulate = next(fitting, least)
    parts, note = accumulate * processes, None
    if parts != before:
        now = f"the batch is split into {parts} parts now, {before} before"
        note = f"{now}: the images stay the same, the noise is different from here on"
    elif processes != stored:
        note = f"the batch is split into {parts} parts as before, {accumulate} for each process"
    return _with_train(preset, accumulate=accumulate), note


def _with_train(preset: Preset, **values: object) -> Preset:
    return preset.model_copy(update={"train": preset.train.model_copy(update=values)})


OF_STUDENT = TRAINING_ONLY | {"two_time"}
"""Options of a network that a student does not take from its teacher."""


def with_teacher(resolved: Resolved, teacher: Model) -> Resolved:
    """Return the preset with the teacher's model and noise sections, but for dropout and scalings.

    A student copies its teacher's weights, so it must be the same network on the same levels.
    """
    ours, theirs = resolved.preset.model, teacher.preset.model
    if theirs.transition is not None:
        what = f"{teacher.source} is made of two networks: one below {theirs.transition:g}"
        raise InputError(what, "give the model that its training started from")
    if teacher.kind == "teacher" and theirs.scalings.name != "edm":
        found = f"{teacher.source} has the scalings of {theirs.scalings.name}"
        what = f"{found}: a student that starts from its weights would be another function"
        raise InputError(what, "distill a teacher with EDM's scalings")
    options = {k: v for k, v in theirs.network.options.items() if k not in OF_STUDENT}
    options |= {k: v for k, v in ours.network.options.items() if k in OF_STUDENT}
    network = Choice(name=theirs.network.name, **options)
    is_new = teacher.kind == "teacher" and resolved.preset.kind != "flow map"
    scalings = ours.scalings if is_new else theirs.scalings
    kept = {
        "network": network,
        "scalings": scalings,
        "transition": ours.transition,
        "guidance": None,  # what it learns is guided already
        "guide_hears_class": True,
    }
    model = theirs.model_copy(update=kept)
    noise, sample = teacher.preset.noise, resolved.preset.sample
    known = {
        n: levels for n, levels in sample.levels.items() if levels and levels[0] <= noise.sigma_max
    }
    sample = sample.model_copy(update={"levels": known})
    update = {"model": model, "noise": noise, "sample": sample}
    preset = resolved.preset.model_copy(update=update)
    before, now = (dict(flat(p.model_dump())) for p in (resolved.preset, preset))
    taken = [key for key, value in now.items() if before.get(key, ...) != value]
    return Resolved(preset, resolved.origins | dict.fromkeys(taken, f"teacher {teacher.source}"))


def set_up(
    start: Start,
    watcher: Watcher,
    teacher: Model | None,
    init: Model | None,
    device: str,
    group: Group,
) -> Run:
    """Return a run, ready for its first step. Raises UserError or InputError if a part is wrong."""
    preset = start.preset
    check_components(preset)
    data, held = load_parts(preset, watcher.note)
    for part in (data,) if held is None else (data, held):
        check_fit(preset, part, teacher)
    guide = teacher.f if teacher else None
    given = Given(preset, data, held, guide, device, watcher.working)
    evaluation = build_evaluation(given)
    check_trackers(trackers_of(preset))  # now, and not at the first line of the log
    called = frozen_for_steps(teacher.f, preset, device, group) if teacher else None
    objective = build_objective(preset, called, device)
    curriculum = build_curriculum(preset)
    if data.is_checked_first and not start.resume:
        watcher.note(f"decoding all {len(data):,} images once, to find bad ones before training")
        check_images(data, preset.data.workers, group.rank, group.world_size)
    check_memory(preset, teacher, device, group)
    state = build_state(preset, teacher, device, group, init)
    if init is not None:
        for left in not_taken(preset, init):
            watcher.note(f"new, not from {init.source}: {left}")
    images = training_images(preset, data, device, group=group)
    microbatch = build_source(preset, images, called)
    return Run(
        preset, start.out, watcher, teacher, init, device, group, data, held, evaluation, objective,
        curriculum, state, microbatch, build_method(preset).before,
    )  # fmt: skip


def check_components(preset: Preset) -> None:
    """Raise UserError for a component or an option that does not exist, used or not.

    So it does for a name that preset.toml cannot hold.
    """
    for key, value in flat(preset.model_dump()):
        if isinstance(value, str) and not is_utf8(value):
            what = f"{key} = {value!r} is not UTF-8: preset.toml cannot hold it"
            raise UserError(what, "rename it, or give a link to it that has a plain name")
    with shapes_only():
        build_denoiser(preset, build_network(preset.model))
    build_augment(preset, method_row(preset))
    levels, span = build_method(preset).levels, noise_range(preset)
    stage = build_curriculum(preset)(0, preset.train.steps)
    own = torch.tensor(span[:2], dtype=torch.float64) if method_row(preset).before else None
    levels(4, stage._replace(grid=own), span, torch.Generator())
    pick(OPTIMIZERS, preset.train.optimizer, "train.optimizer", ["lr"])
    check_metric(preset)
    check_fit_rule(preset.data.fit)
    check_background(preset.data.background)
    check_rule(preset.data.path, preset.data.labels)
    chosen = plan(preset)  # of the sample grids
    build_sampler(chosen.sampler)
    check_levels(chosen.sigmas, preset.noise.sigma_min)


def load_images(preset: Preset, tell: Callable[[str], None]) -> Dataset:
    """Return the preset's data set; without its labels if the model has no classes."""
    size, channels = preset.model.image_size, preset.model.channels
    data = load_dataset(
        preset.data.path, size=size, channels=channels, fit=preset.data.fit,
        background=preset.data.background, labels=preset.data.labels, column=preset.data.column,
    )  # fmt: skip
    for note in data.notes:
        tell(note)
    if data.labels is None or preset.model.num_classes:
        return data
    tell(f"the {data.num_classes} classes of {data.name} are not used: the model has none")
    return replace(data, labels=None, num_classes=0)


def load_parts(preset: Preset, tell: Callable[[str], None]) -> tuple[Dataset, Dataset | None]:
    """Return the images to train on, and those held out, if some are: data.held_out says which."""
    data, chosen = load_images(preset, tell), preset.data.held_out
    if chosen is None:
        return data, None
    if not isinstance(chosen, str):
        data, held = split(data, chosen)
        tell(f"{len(held):,} images are held out, {len(data):,} are trained on")
        return data, held
    other = preset.data.model_copy(update={"path": chosen})
    held = load_images(preset.model_copy(update={"data": other}), tell)
    if data.class_names != held.class_names and preset.model.num_classes:
        what = f"the classes of {held.name} are not those of {data.name}"
        raise InputError(what, "name images of the same classes: --set data.held_out=PATH")
    return data, held


def check_fit(preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise InputError unless data, preset and teacher agree on size, channels and classes."""
    row = method_row(preset)
    if teacher is not None and preset.loss.guidance != 1:
        check_guided(teacher.preset, f"loss.guidance = {preset.loss.guidance:g}")
    if teacher is not None and teacher.kind != row.teacher_kind:
        is_start = not row.needs_teacher and row.teacher_kind == "teacher"
        if not is_start or teacher.kind == "flow map":
            raise InputError(*wrong_teacher(teacher, row.teacher_kind))
    who = "the model" if teacher is None else f"the teacher {teacher.source}"
    channels, h, w = preset.model.channels, *preset.model.image_size
    c, dh, dw = data.images.shape[1:]
    if (c, dh, dw) != (channels, h, w):
        has = f"{data.name} has images of {dw}x{dh} with {c} channels"
        remedy = "resize the images with cmtool data prepare, or name another teacher: --teacher"
        ours = f"resize the images, or --set model.image_size=[{dh},{dw}] --set model.channels={c}"
        what = f"{has}, {who} wants {w}x{h} with {channels}"
        raise InputError(what, ours if teacher is None else remedy)
    if preset.model.num_classes != data.num_classes:
        what = f"{data.name} has {data.num_classes} classes, {who} has {preset.model.num_classes}"
        remedy = "name images of the same classes with --data, or another teacher with --teacher"
        ours = f"--set model.num_classes={data.num_classes}"
        raise InputError(what, ours if teacher is None else remedy)


def wrong_teacher(teacher: Model, wanted: str) -> tuple[str, str]:
    """Return what is wrong with a teacher of another kind, and what to do."""
    if wanted == "teacher":
        what = f"{teacher.source} is a {teacher.kind} model, not a teacher"
        return what, "give a model trained with an edm preset"
    what = f"{teacher.source} is a {teacher.kind}: this preset is a second stage"
    return what, "give the consistency model of the first stage, for example of an ect preset"


def write_record(run: Run, start: Start) -> None:
    """Write preset.toml and run.json. In a resumed run, unchanged values keep their origins."""
    preset, origins, path = run.preset, start.origins, run.out / "preset.toml"
    if path.is_file():
        changed = changes(load_preset(str(path)), preset)
        updates = {key: (value, origin_of(key, origins)) for key, value in changed.items()}
        text = with_values(read_own(path).decode(), updates)
    else:
        text = to_toml(preset, origins)
    write_atomic(path, text.encode(), durable=True)
    before = read_facts(run.out / "run.json", Record) if start.resume else None
    init = described(run.init) if run.init else before and before.model_dump()["init"]
    facts = {
        "arguments": sys.argv[1:],
        "versions": versions(),
        "processes": run.group.world_size,
        "threads": torch.get_num_threads(),
        "precision": preset.train.precision,
        "seed": preset.train.seed,
        "init": init,
        **run_inputs(run),
        "class_names": shown_names(run.data),
    }
    write_json(run.out / "run.json", facts, durable=True)


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {
        "cmtool": __version__, "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def shown_names(data: Dataset) -> list[str]:
    """Return the names of the first classes, as reports show them."""
    return [printable(name)[:80] for name in data.class_names[:MAX_NAMES]]
