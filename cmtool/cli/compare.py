"""cmtool compare: several methods on the same images for the same time; a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli._devices import importing_torch, pick_device
from cmtool.cli._options import AsJson, Device, newest_run, parse_seeds, tell_notes
from cmtool.cli._output import emit_json, processes, say
from cmtool.cli._run_options import parse_time
from cmtool.cli._table import show_table
from cmtool.cli._watching import make_watcher, showing
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.training.comparison import Comparison, Row

HEAD = ("method", "steps", "images", "seconds", "CPU seconds", "1 step", "2 steps", "to teacher")


Presets = Annotated[
    list[str] | None,
    Argument(
        metavar="[PRESET]...",
        help="Presets, by name or TOML file. Default: all that name no data and make a"
        " consistency model.",
        autocompletion=_completion.presets,
    ),
]
Teacher = Annotated[
    str | None,
    Option(
        autocompletion=_completion.models,
        help="Teacher: its network and images are those of all methods, also of those that"
        " learn without it. Default: the newest finished teacher in runs/, else digits-edm.",
    ),
]
Data = Annotated[
    str | None,
    Option(
        autocompletion=_completion.data_sets,
        help="Data set: its name, or a path of images. Default: the teacher's.",
    ),
]
MaxTime = Annotated[
    str,
    Option(
        help="Time that each run trains: 3600, 90m, 11h30m. Checkpoints and measurements come"
        " on top."
    ),
]
Seeds = Annotated[
    str, Option(help="Seeds of training: 0, or 0,1,2. Each method has a run for each.")
]
Num = Annotated[int, Option("--num-images", "--num", min=2, help="Images to measure.")]
Protocol = Annotated[
    str | None,
    Option(
        autocompletion=_completion.protocols,
        help="Protocol of the Frechet distance. Default: digits for the bundled digits, else"
        " pixels.",
    ),
]
Set = Annotated[list[str] | None, Option("--set", help="KEY=VALUE over all presets; repeatable.")]
Out = Annotated[
    Path, Option("--out", "-o", help="Folder for the runs, compare.json and compare.png.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the comparison in --out.")]


def compare(
    presets: Presets = None,
    teacher: Teacher = None,
    data: Data = None,
    max_time: MaxTime = "3m",
    seeds: Seeds = "0",
    num: Num = 2048,
    protocol: Protocol = None,
    set_: Set = None,
    out: Out = Path("compare"),
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train several methods for the same time on the same images, and print which is best.

    `cmtool compare cd ect ict --teacher digits-edm --max-time 3m --out compare/`

    `cmtool compare --teacher runs/teacher --max-time 1h`

    `cmtool compare digits-cd ./mine.toml --seeds 0,1,2 --set train.batch=128`

    Network, images, batch and seeds are the same for all; the steps are those that the time allows,
    by steps that are timed first. The distance to the data is measured at six points of each run,
    in one step and in two. Prints a table, the best method in one step first; compare.png has the
    curves, and samples from the same noise. The same command goes on where it was stopped.
    """
    if processes()[1] > 1:
        raise UserError("compare runs in one process", "start it without torchrun")
    with importing_torch():
        from cmtool.models import load_model
        from cmtool.presets.toml import parse_override
        from cmtool.training import compare as comparing
        from cmtool.training.comparison import Asked, content_of
        from cmtool.training.fair import Terms
    seconds = parse_time(max_time)
    if not seconds:
        raise UserError(f"--max-time {max_time} leaves no time to train", "for example 3m")
    asked = Asked(
        presets=presets or comparing.default_presets(), teacher=teacher, data=data,
        seeds=parse_seeds(seeds), seconds=seconds, num=num, protocol=protocol,
        values=dict(map(parse_override, set_ or [])),
    )  # fmt: skip
    comparing.check_presets(asked)
    if "train.seed" in asked.values:
        raise UserError("--set train.seed: a comparison has its own option for it", "give --seeds")
    where = pick_device(device)
    chosen = teacher or find_teacher(out, overwrite=overwrite)
    model = load_model(chosen, device=where, otherwise="teacher")
    tell_notes(model)
    bench = comparing.Bench(
        out=out, terms=Terms(asked, model, where), note=say, watching=make_watcher,
        showing=showing,
    )  # fmt: skip
    comparison = comparing.compare(bench, overwrite=overwrite)
    say(f"picture: {out / 'compare.png'}")
    if as_json:
        emit_json(content_of(comparison))
    else:
        print_table(comparison)


def find_teacher(out: Path, *, overwrite: bool) -> str:
    """Return the teacher of a comparison that goes on, or the newest of runs/, and say so."""
    from cmtool.training.comparison import teacher_of

    kept = None if overwrite else teacher_of(out)
    teacher = kept or newest_run("teacher") or "digits-edm"
    say(f"teacher: {teacher}")
    return teacher


def print_table(comparison: Comparison) -> None:
    """Print a row for each method, and one for the teacher."""
    from cmtool.training.comparison import table

    reference = comparison.teacher
    name = f"teacher, {reference.calls} calls"
    last = [name, "-", "-", "-", "-", f"{reference.value:.4g}", "-", "1"]
    say(f"{comparison.metric} of {comparison.asked.num:,} images, lower is better")
    show_table(HEAD, [*map(cells, table(comparison)), last])


def cells(row: Row) -> list[str]:
    """Return the cells of a method's row."""
    values = [number(value, row.spread[n]) for n, value in row.values.items()]
    calls = [f" ({count} calls)" if int(n) != count else "" for n, count in row.calls.items()]
    values = [value + more for value, more in zip(values, calls, strict=True)]
    if row.state != "done":
        values[0] = row.state
    times = [number(row.seconds), number(row.cpu_seconds)]
    return [row.name, str(row.steps), str(row.images), *times, *values, number(row.ratio)]


def number(value: float | None, spread: float | None = None) -> str:
    """Return a number as the table shows it, with its spread over seeds if it has one."""
    if value is None:
        return "-"
    return f"{value:.4g}" + ("" if spread is None else f" +- {spread:.2g}")
