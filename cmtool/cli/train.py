"""cmtool train and cmtool distill: a preset, some overrides, one run folder."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cmtool.cli._options import AsJson, Device, newest_run, pick_device, tell_notes, with_options
from cmtool.cli._output import emit, emit_json, processes, say
from cmtool.cli._watching import make_watcher
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.models import Model
    from cmtool.presets.toml import Resolved

Preset = Annotated[str, Option("--preset", help="A preset's name or a TOML file.")]
DistanceOption = Annotated[
    str | None,
    Option(
        help="Distance d(x, y) of the loss, loss.distance in a preset:"
        " l1, l2, l2_32, linf, lpips, pseudo_huber."
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """Options that train and distill share."""

    set_: Annotated[
        list[str] | None, Option("--set", help="KEY=VALUE over the preset; repeatable.")
    ] = None
    data: Annotated[str | None, Option(help="Data set: its name, or a path of images.")] = None
    metric: DistanceOption = None
    out: Annotated[
        Path | None, Option(help="Run folder. Default: runs/PRESET, numbered if taken.")
    ] = None
    seed: Annotated[int | None, Option(help="Seed of the run.")] = None
    accumulate: Annotated[
        int | None,
        Option(min=1, help="Parts that each batch is split into, to save memory. Same result."),
    ] = None
    precision: Annotated[
        str | None,
        Option(
            help="Precision of the networks: fp32, bf16, fp16, or auto, which is bf16 where the"
            " device computes in it."
        ),
    ] = None
    compile_: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="Run the networks by torch.compile. For GPUs: on a CPU it takes minutes and gains"
            " nothing.",
        ),
    ] = None
    max_time: Annotated[
        str | None,
        Option(help="Save and stop after this time, with exit code 75: 3600, 90m, 11h30m."),
    ] = None
    eval_every: Annotated[
        int | None,
        Option(
            min=0, help="Measure the EMA weights every so many steps (fd-digits: 8x8 RGB only)."
        ),
    ] = None
    device: Device = "auto"
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False
    dry_run: Annotated[
        bool, Option("--dry-run", "-n", help="Print the resolved preset and stop.")
    ] = False
    as_json: AsJson = False

    def resolve(self, preset: str) -> Resolved:
        """Return the preset with what the command line changes; a resumed run has its own."""
        from cmtool.presets.toml import parse_override, resolve

        flags: dict[str, dict[str, Any]] = {
            "--data": {"data.path": self.data}, "--metric": {"loss.distance": self.metric},
            "--seed": {"train.seed": self.seed}, "--compile": {"train.compile": self.compile_},
            "--accumulate": {"train.accumulate": self.accumulate},
            "--precision": {"train.precision": self.precision},
            "--eval-every": {"run.eval_every": self.eval_every},
        }  # fmt: skip
        layers = {flag: given for flag, given in flags.items() if None not in given.values()}
        layers["--set"] = dict(map(parse_override, self.set_ or []))
        if self.resume and self.out is None:
            raise UserError("--resume without a run folder", "name it with --out runs/NAME")
        if not self.resume or self.out is None:
            return resolve(preset, layers)
        from cmtool.training.folder import refuse_special

        refuse_special(self.out)
        stored = self.out / "preset.toml"
        return resolve(str(stored) if stored.is_file() else preset, layers)


def _train(options: RunOptions, preset: Preset = "digits-edm") -> None:
    """Train an EDM teacher, or a consistency model from scratch.

    `cmtool train --preset digits-edm --out runs/teacher`

    `cmtool train --preset digits-ct --set train.steps=500`

    `cmtool train --preset digits-edm --out runs/teacher --resume`

    Prints the folder of the last checkpoint.
    """
    resolved = options.resolve(preset)
    from cmtool.presets.build import needs_teacher

    if needs_teacher(resolved.preset):
        what = f"preset {preset} distills a teacher, or starts from one"
        raise UserError(what, f"cmtool distill --preset {preset}")
    _run(options, preset, resolved, None)


def _distill(
    options: RunOptions,
    teacher: Annotated[
        str | None,
        Option(
            help="Teacher model. Default: the newest finished teacher under runs/, else digits-edm."
        ),
    ] = None,
    preset: Preset = "digits-cd",
) -> None:
    """Distill a teacher into a consistency model that samples in one step.

    `cmtool distill`

    `cmtool distill --teacher runs/teacher --metric l1 --out runs/student`

    The student has the teacher's architecture and starts from its weights. Prints the folder of
    the last checkpoint.
    """
    resolved = options.resolve(preset)
    from cmtool.presets.build import needs_teacher

    if not needs_teacher(resolved.preset):
        raise UserError(f"preset {preset} has no teacher", f"cmtool train --preset {preset}")
    from cmtool.models import load_model
    from cmtool.training.start import with_teacher

    if teacher is None:
        teacher = _teacher_of(options.out) if options.resume else None
        teacher = teacher or newest_run("teacher") or "digits-edm"
        say(f"teacher: {teacher}")
    # a model that will be sharded is whole until then, in main memory
    is_sharded = resolved.preset.run.sharding == "fsdp" and processes()[1] > 1
    home = "cpu" if is_sharded else pick_device(options.device)
    model = load_model(teacher, device=home, otherwise="teacher")
    tell_notes(model)
    _run(options, preset, with_teacher(resolved, model), model)


train = with_options(_train, RunOptions)
distill = with_options(_distill, RunOptions)


def _teacher_of(out: Path | None) -> str | None:
    """Return the teacher that the run in `out` was started with. Raises InputError if damaged."""
    from cmtool.system.records import read_facts
    from cmtool.training.records import Record

    record = read_facts(out / "run.json", Record) if out else None
    return record.teacher.source if record and record.teacher else None


def _run(options: RunOptions, preset: str, resolved: Resolved, teacher: Model | None) -> None:
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


def parse_time(text: str | None) -> float | None:
    """Return the seconds of "3600", "90m" or "11h30m". Raises UserError."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or match is None:
        raise UserError(f"--max-time {text!r} is not a time", "for example 3600, 90m or 11h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + seconds
