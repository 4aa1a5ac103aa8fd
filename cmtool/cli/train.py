"""cmtool train and cmtool distill: a preset, some overrides, one run folder."""

from __future__ import annotations

import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli._options import AsJson, Device, newest_run, pick_device, tell_notes
from cmtool.cli._output import emit, emit_json, leads, processes, say
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.models import Model
    from cmtool.presets.toml import Resolved
    from cmtool.training.log import Progress

Preset = Annotated[str, typer.Option("--preset", help="A preset's name or a TOML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE; repeatable.")]
Data = Annotated[str | None, typer.Option(help="Data set's name or a folder of images.")]
Out = Annotated[
    Path | None, typer.Option(help="Run folder. Default: runs/PRESET, numbered if taken.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
Accumulate = Annotated[
    int | None,
    typer.Option(min=1, help="Parts each batch is split into, to fit into memory; same result."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Of the networks: fp32, bf16, fp16, or auto: bf16 where the device computes in it."
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="torch.compile the networks. For GPUs: on a CPU it takes minutes and gains nothing.",
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option(help="Stop in good order after so long, with exit code 75: 3600, 90m, 11h30m."),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        min=0, help="Measure the kept weights every so many steps (fd-digits: 8x8 RGB only)."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Print the resolved preset and stop.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Distance d(x, y) of the loss, loss.distance in a preset:"
        " l1, l2, l2_32, linf, lpips, pseudo_huber."
    ),
]


def train(
    preset: Preset = "digits-edm",
    set_: Set = None,
    data: Data = None,
    metric: Metric = None,
    out: Out = None,
    seed: Seed = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    compile_: Compile = None,
    max_time: MaxTime = None,
    eval_every: EvalEvery = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train an EDM teacher, or a consistency model from scratch.

    `cmtool train --preset digits-edm --out runs/teacher`

    `cmtool train --preset digits-ct --set train.steps=500`

    `cmtool train --preset digits-edm --out runs/teacher --resume`

    Prints the folder of the last checkpoint.
    """
    flags = {"--data": ("data.path", data), "--metric": ("loss.distance", metric),
             "--seed": ("train.seed", seed),
             "--accumulate": ("train.accumulate", accumulate),
             "--precision": ("train.precision", precision),
             "--compile": ("train.compile", compile_),
             "--eval-every": ("run.eval_every", eval_every)}  # fmt: skip
    resolved = _resolve(preset, set_, flags, out, resume)
    from cmtool.presets.build import needs_teacher

    if needs_teacher(resolved.preset):
        raise UserError(
            f"preset {preset} distills a teacher, or starts from one",
            f"cmtool distill --preset {preset}",
        )
    if dry_run:
        _show(resolved)
        return
    seconds = parse_time(max_time)
    if not resume:
        tell_batch(resolved, preset)
    with _folder(out, preset) as folder:
        _run(resolved, None, folder, device, resume, overwrite, seconds, as_json)


def distill(
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Teacher. Default: the newest finished one under runs/, else digits-edm."
        ),
    ] = None,
    preset: Preset = "digits-cd",
    set_: Set = None,
    data: Data = None,
    metric: Metric = None,
    out: Out = None,
    seed: Seed = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    compile_: Compile = None,
    max_time: MaxTime = None,
    eval_every: EvalEvery = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Distill a teacher into a consistency model that samples in one step.

    `cmtool distill`

    `cmtool distill --teacher runs/teacher --metric l1 --out runs/student`

    The student has the teacher's architecture and starts from its weights. Prints the folder of
    the last checkpoint.
    """
    flags = {"--data": ("data.path", data), "--metric": ("loss.distance", metric),
             "--seed": ("train.seed", seed),
             "--accumulate": ("train.accumulate", accumulate),
             "--precision": ("train.precision", precision),
             "--compile": ("train.compile", compile_),
             "--eval-every": ("run.eval_every", eval_every)}  # fmt: skip
    resolved = _resolve(preset, set_, flags, out, resume)
    from cmtool.presets.build import needs_teacher

    if not needs_teacher(resolved.preset):
        raise UserError(f"preset {preset} has no teacher", f"cmtool train --preset {preset}")
    from cmtool.models import load_model
    from cmtool.training.start import with_teacher

    if teacher is None:
        teacher = _teacher_of(out) if resume else None
        teacher = teacher or newest_run("teacher") or "digits-edm"
        say(f"teacher: {teacher}")
    home = "cpu" if is_sharded(resolved) else pick_device(device)
    model = load_model(teacher, device=home, otherwise="teacher")
    tell_notes(model)
    resolved = with_teacher(resolved, model)
    if dry_run:
        _show(resolved)
        return
    seconds = parse_time(max_time)
    if not resume:
        tell_batch(resolved, preset)
    with _folder(out, preset) as folder:
        _run(resolved, model, folder, device, resume, overwrite, seconds, as_json)


def is_sharded(resolved: Resolved) -> bool:
    """Tell whether models are to be sharded; they start whole, in main memory."""
    return resolved.preset.run.sharding == "fsdp" and processes()[1] > 1


def _teacher_of(out: Path | None) -> str | None:
    """Return the teacher the run in `out` was started with."""
    import json

    try:
        return str(json.loads((out / "run.json").read_text())["teacher"]["source"]) if out else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resolve(
    preset: str,
    set_: list[str] | None,
    flags: dict[str, tuple[str, Any]],
    out: Path | None,
    resume: bool,
) -> Resolved:
    """Return the preset of the command line; of the run itself when resuming one."""
    from cmtool.presets.toml import parse_override, resolve

    layers: dict[str, dict[str, Any]] = {}
    for flag, (key, value) in flags.items():
        if value is not None:
            layers[flag] = {key: value}
    layers["--set"] = dict(map(parse_override, set_ or []))
    if resume and out is None:
        raise UserError("--resume without a run folder", "name it with --out runs/NAME")
    stored = out / "preset.toml" if resume and out is not None else None
    return resolve(str(stored) if stored is not None and stored.is_file() else preset, layers)


def _folder(out: Path | None, preset: str) -> AbstractContextManager[Path]:
    """Return a block that has the run folder: the one named, else a new one."""
    if out is not None:
        return nullcontext(out)
    from cmtool.training.folder import new_folder

    return new_folder(Path(preset).stem)


def _show(resolved: Resolved) -> None:
    from cmtool.presets.toml import to_toml

    emit(to_toml(resolved.preset, resolved.origins).rstrip())


def _run(
    resolved: Resolved,
    teacher: Model | None,
    out: Path,
    device: str,
    resume: bool,
    overwrite: bool,
    max_seconds: float | None,
    as_json: bool,
) -> None:
    from cmtool.training import run

    start = time.monotonic()
    say(f"run folder: {out}")
    with make_watcher(resolved.preset.train.steps) as watcher:
        final = run.train(
            resolved.preset,
            out,
            watcher,
            teacher=teacher,
            origins=resolved.origins,
            device=pick_device(device),
            resume=resume,
            overwrite=overwrite,
            max_seconds=max_seconds,
        )
    say(f"report: {out / 'report.html'}")
    if as_json:
        seconds = round(time.monotonic() - start, 1)
        emit_json(
            {"run": str(out), "checkpoint": str(final), "kind": resolved.preset.kind,
             "steps": resolved.preset.train.steps, "seconds": seconds}
        )  # fmt: skip
    else:
        emit(str(final))


def tell_batch(resolved: Resolved, preset: str) -> None:
    """Say so when the global batch is not the one that cmtool's preset was tuned for."""
    from cmtool.presets.toml import packaged_value

    train = resolved.preset.train
    batch, lr = (packaged_value(preset, f"train.{key}") for key in ("batch", "lr"))
    if batch is not None and train.batch != batch and train.lr == lr:
        say(
            f"note: a global batch of {train.batch}, where the preset has {batch}, and a train.lr"
            f" of {lr:g} tuned for that; if memory is short, keep {batch} and split it:"
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


def told(news: Progress) -> dict[str, str]:
    """Return the figures of a log line for people, by name; none before the first line."""
    line = news.line
    if not line:
        return {}
    bands = "/".join(_figure(loss, 2) for loss in line["loss_by_sigma"].values())
    skipped = {"skipped": str(line["skipped"])} if line["skipped"] else {}
    mfu = {"mfu": f"{line['mfu']:.1%}"} if "mfu" in line else {}
    found = line.get("eval")
    value = {found["metric"]: f"{found['value']:.4g}"} if found else {}
    return {
        "loss": _figure(line["loss"]),
        "by_sigma": bands,
        **skipped,
        "images/s": f"{line['images_per_second']:.0f}",
        "Mimg": f"{line['images'] / 1e6:.4g}",
        "data_wait": f"{line['data_wait']:.1%}",
        "mem": f"{line['memory_gib']:.2f}GiB",
        **mfu,
        **value,
    }


class LineWatcher:
    """News as plain lines, for pipes and logs."""

    def __enter__(self) -> LineWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def progress(self, news: Progress) -> None:
        """Write a line at each log interval."""
        if news.is_log_line:
            figures = {
                "step": f"{news.step}/{news.steps}",
                **told(news),
                "left": _clock(news.seconds_left),
            }
            say(" ".join(f"{key}={value}" for key, value in figures.items()))

    def note(self, text: str) -> None:
        """Write a remark."""
        say(text)


class BarWatcher:
    """News as a progress bar with the last log line under it, for terminals."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[left]} left"),
        )
        self.task = self.bar.add_task("", total=steps, left="-")
        self.figures = Text()
        self.live = Live(Group(self.bar, self.figures), console=Console(stderr=True))

    def __enter__(self) -> BarWatcher:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def progress(self, news: Progress) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=news.step, left=_clock(news.seconds_left))
        self.figures.plain = "  ".join(f"{key} {value}" for key, value in told(news).items())

    def note(self, text: str) -> None:
        """Write a remark above the bar."""
        self.live.console.print(text, markup=False)


def make_watcher(steps: int) -> LineWatcher | BarWatcher:
    """Return a bar on a terminal, lines in a pipe; `say` keeps all processes but one quiet."""
    return BarWatcher(steps) if sys.stderr.isatty() and leads() else LineWatcher()


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
