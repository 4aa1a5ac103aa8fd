"""cmtool train and cmtool distill: a preset, some overrides, one run folder."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cmtool.cli import _completion
from cmtool.cli._devices import pick_device
from cmtool.cli._options import newest_run, tell_notes, with_options
from cmtool.cli._output import emit, emit_json, processes, say
from cmtool.cli._run_options import RunOptions, parse_time
from cmtool.cli._watching import make_watcher
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.models import Model
    from cmtool.presets.schema import DataSection
    from cmtool.presets.toml import Resolved

Preset = Annotated[
    str | None,
    Option(
        "--preset",
        autocompletion=_completion.presets,
        help="A preset's name or a TOML file. One that names no data, such as edm or ect, is fitted"
        " to yours, for an hour or --max-time on this device: see it with --dry-run."
        " Default: for digits and emoji those of their name, for your own images edm in train and"
        " cmt in distill.",
    ),
]
Init = Annotated[
    str | None,
    Option(
        autocompletion=_completion.models,
        help="Model whose weights training starts from: to fine-tune it on other images, or, in"
        " distill, in place of the teacher's.",
    ),
]


def _train(
    options: RunOptions,
    preset: Preset = None,
    init: Init = None,
) -> None:
    """Train an EDM teacher, or a consistency model from scratch.

    `cmtool train --data photos/ --out runs/teacher`

    `cmtool train --preset digits-ct --set train.steps=500`

    `cmtool train --init runs/teacher --data drawings/ --out runs/tuned`

    `cmtool train --preset digits-edm --out runs/teacher --resume`

    Without --preset your own images get an EDM teacher that fits them. Prints the folder of the
    last checkpoint.
    """
    from cmtool.presets.build import needs_teacher
    from cmtool.presets.toml import is_method_preset

    start = _starting_model(options, init)
    name = preset or default_preset(options, start)
    resolved = options.resolve(name)
    if needs_teacher(resolved.preset):
        what = f"preset {name} needs a teacher, and cmtool train takes none"
        raise _of_other(options, "distill", name, what)
    if not options.stored and is_method_preset(name):
        data = resolved.preset.data
        if not data.path:
            raise UserError(f"preset {name} names no images", "add --data DIR: your images")
        resolved = fitted(options, name, data.path, images=data, start=start)
    _run(options, name, resolved, None, start)


TEACHERS = {"digits": "digits-edm", "emoji": "emoji-edm"}
STUDENTS = {"digits": "digits-cd", "emoji": "emoji-cmt"}
"""Presets that are taken for bundled data; others are fitted to the images."""
SHARE_OF_TIME = 0.85
"""What the steps of a fitted preset take of --max-time; samples and checkpoints take some too."""


def default_preset(options: RunOptions, start: Model | None) -> str:
    """Return the preset of a training for which none is named: by its images."""
    if start is not None:
        return "edm" if start.kind == "teacher" else "ict"
    return TEACHERS.get((options.data or "digits").partition(":")[0], "edm")


def _starting_model(options: RunOptions, init: str | None) -> Model | None:
    """Return the model of --init, None without it. Raises UserError where the run has its own."""
    if init is None or (options.resume and options.auto_resume):
        return None
    from cmtool.models import load_model

    if options.resume:
        raise UserError("--init with --resume", "leave --init out: the run has its own weights")
    model = load_model(init, device="cpu", otherwise="teacher")
    tell_notes(model)
    return model


def _of_other(options: RunOptions, command: str, preset: str, what: str) -> UserError:
    """Return the error for a preset, or a run that is resumed, of the other `command`."""
    more = " --dry-run" * options.dry_run
    if options.stored is None:
        more = "".join(f" --set {shlex.quote(each)}" for each in options.set_ or []) + more
        return UserError(what, f"cmtool {command} --preset {shlex.quote(preset)}{more}")
    out = shlex.quote(str(options.out))
    what = f"the run in {options.out} was made by cmtool {command}"
    return UserError(what, f"cmtool {command} --out {out} --resume{more}")


def fitted(
    options: RunOptions,
    name: str,
    to: str,
    *,
    images: DataSection | None = None,
    teacher: Model | None = None,
    start: Model | None = None,
) -> Resolved:
    """Return a method's preset, fitted to images or a teacher, and tell what it became."""
    from cmtool.training.planning import WISH, facts_of, planned

    most = parse_time(options.max_time)
    wish = WISH if most is None else WISH._replace(hours=most / 3600 * SHARE_OF_TIME)
    if processes()[1] > 1:
        what = f"preset {name} is fitted to {to} by one process"
        raise UserError(what, f"cmtool preset new --method {name} --data DIR, then --preset FILE")
    say(f"preset {name}, fitted to {to}")
    facts = None if images is None else facts_of(images.path, images.labels, images.column)
    resolved, _ = planned(
        name, pick_device(options.device), options.layers, facts=facts, teacher=teacher,
        start=start, wish=wish,
    )  # fmt: skip
    _tell_plan(resolved)
    return resolved


def _tell_plan(resolved: Resolved) -> None:
    """Print what a preset was fitted to, in a line."""
    preset, why = resolved.preset, resolved.origins["train.steps"]
    h, w = preset.model.image_size
    classes = f"{preset.model.num_classes} classes" if preset.model.num_classes else "no classes"
    say(f"{w}x{h}, {classes}, {preset.train.steps:,} steps of {preset.train.batch}: {why}")


def _distill(
    options: RunOptions,
    teacher: Annotated[
        str | None,
        Option(
            autocompletion=_completion.models,
            help="Teacher model. Default: the newest finished teacher in runs/, else digits-edm.",
        ),
    ] = None,
    preset: Preset = None,
    init: Init = None,
) -> None:
    """Distill a teacher into a consistency model that samples in one step.

    `cmtool distill`

    `cmtool distill --teacher runs/teacher --metric l1 --out runs/student`

    `cmtool distill --preset digits-cd --init runs/cmt --out runs/cd`

    The student has the teacher's architecture, starts from its weights, and learns from the same
    images unless --data or the preset names others. Without --preset it is digits-cd for digits,
    emoji-cmt for emoji and cmt for your own images. Prints the folder of the last checkpoint.
    """
    named = preset or "digits-cd"
    first = options.resolve(named)
    from cmtool.presets.build import needs_teacher
    from cmtool.presets.toml import is_method_preset

    if not needs_teacher(first.preset):
        raise _of_other(options, "train", named, f"preset {named} has no teacher")
    from cmtool.models import load_model
    from cmtool.training.start import with_teacher

    if teacher is None:
        teacher = _teacher_of(options.out) if options.resume else None
        teacher = teacher or newest_run("teacher") or "digits-edm"
        say(f"teacher: {teacher}")
    # a model that will be sharded is whole until then, in main memory
    is_sharded = first.preset.run.sharding == "fsdp" and processes()[1] > 1
    home = "cpu" if is_sharded else pick_device(options.device)
    model = load_model(teacher, device=home, otherwise="teacher")
    tell_notes(model)
    start = _starting_model(options, init)
    name = preset or _preset_for(options, model)
    if not options.stored and is_method_preset(name):
        resolved = fitted(options, name, f"the teacher {teacher}", teacher=model)
    else:
        resolved = with_teacher(_on_its_images(options, name, model), model)
    _run(options, name, resolved, model, start)


def _preset_for(options: RunOptions, teacher: Model) -> str:
    """Return the preset of a distillation for which none is named: by the teacher's images."""
    theirs = getattr(getattr(teacher.preset, "data", None), "path", "")
    images = (options.data or theirs or "digits").partition(":")[0]
    return STUDENTS.get(images, "cmt")


def _on_its_images(options: RunOptions, name: str, teacher: Model) -> Resolved:
    """Return the preset on the teacher's images, unless the user or a file of theirs names some."""
    from cmtool.presets.toml import packaged_value, resolve

    resolved = options.resolve(name)
    theirs, ours = getattr(teacher.preset, "data", None), resolved.preset.data
    is_told = resolved.origins["data.path"].startswith("--") or options.stored
    if theirs is None or is_told or ours.path != (packaged_value(name, "data.path") or ""):
        return resolved
    if theirs.path != ours.path:
        say(f"images: {theirs.path}, the teacher's")
    layer = {f"data.{key}": getattr(theirs, key) for key in ("path", "labels", "column", "fit")}
    return resolve(name, {f"teacher {teacher.source}": layer, **options.layers})


train = with_options(_train, RunOptions)
distill = with_options(_distill, RunOptions)


def _teacher_of(out: Path | None) -> str | None:
    """Return the teacher that the run in `out` was started with. Raises InputError if damaged."""
    from cmtool.system.records import read_facts
    from cmtool.training.records import Record

    record = read_facts(out / "run.json", Record) if out else None
    return record.teacher.source if record and record.teacher else None


def _run(
    options: RunOptions,
    preset: str,
    resolved: Resolved,
    teacher: Model | None,
    init: Model | None = None,
) -> None:
    """Run a training, or print its preset; then print where the last checkpoint is."""
    if options.dry_run:
        from cmtool.presets.toml import to_toml
        from cmtool.training.start import check_components

        check_components(resolved.preset)
        emit(to_toml(resolved.preset, resolved.origins).rstrip())
        return
    max_seconds = parse_time(options.max_time)
    if not options.resume:
        note_batch(resolved, preset)

    from cmtool.training import run
    from cmtool.training.folder import new_folder

    steps, start = resolved.preset.train.steps, time.monotonic()
    with nullcontext(options.out) if options.out else new_folder(Path(preset).stem) as folder:
        say(f"run folder: {folder}")
        with make_watcher(steps) as watcher:
            final = run.train(
                resolved.preset,
                folder,
                watcher,
                teacher=teacher,
                init=init,
                origins=resolved.origins,
                device=pick_device(options.device),
                resume=options.resume,
                overwrite=options.overwrite,
                max_seconds=max_seconds,
            )
    say(f"report: {folder / 'report.html'}")
    if options.as_json:
        about = {"run": str(folder), "checkpoint": str(final), "kind": resolved.preset.kind}
        emit_json({**about, "steps": steps, "seconds": round(time.monotonic() - start, 1)})
    else:
        emit(str(final))


def note_batch(resolved: Resolved, preset: str) -> None:
    """Print a note when the global batch is not the one that cmtool's preset was tuned for."""
    from cmtool.presets.toml import packaged_value

    train = resolved.preset.train
    batch, lr = (packaged_value(preset, f"train.{key}") for key in ("batch", "lr"))
    if batch is not None and train.batch != batch and train.lr == lr:
        say(
            f"note: the global batch is {train.batch}. The preset has {batch}, and its train.lr of"
            f" {lr:g} is tuned for that. If memory is short, keep {batch} and split it:"
            " --accumulate 2, or more"
        )
