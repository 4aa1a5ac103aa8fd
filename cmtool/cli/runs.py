"""cmtool runs: a table of the runs in a folder, and a comparison of some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli._devices import importing_torch
from cmtool.cli._options import AsJson
from cmtool.cli._output import check_free, emit_json, make_folder, say
from cmtool.cli._table import show_table
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from cmtool.training.history import History

app = typer.Typer(no_args_is_help=True, help="List runs, or compare some.")
COLUMNS = ("name", "kind", "method", "data", "steps", "state", "loss or best", "age", "size")
AGES = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


@app.command("list")
def list_(
    folder: Annotated[
        Path, Argument(metavar="[DIR]", help="The folder that holds the runs, or one run.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, the newest first.

    `cmtool runs list`

    `cmtool runs list experiments/ --json`

    The columns are name, kind, method, data, steps done of all, state, best metric or last loss,
    age and size on the disk. In a pipe, tabs separate the columns. A run whose process is gone from
    this machine is `killed`. Folders without a run are passed over with a note.
    """
    with importing_torch():
        from cmtool.training.history import histories

    if folder == Path("runs") and not folder.exists():
        say("no runs yet: cmtool distill starts one")
        found = []
    else:
        found = kept(histories(folder))
    facts = [run.facts() for run in sorted(found, key=lambda run: run.updated, reverse=True)]
    if as_json:
        emit_json({"runs": facts})
    else:
        show_table(COLUMNS, map(row_of, facts), with_head=False)


def kept(runs: Iterable[History | InputError]) -> list[History]:
    """Return the runs, and note why others are none."""
    found = []
    for run in runs:
        if isinstance(run, InputError):
            say(f"passed over: {run.what}")
        else:
            found.append(run)
    return found


def row_of(facts: dict[str, Any]) -> list[str]:
    """Return the cells of a run's row."""
    best = [f"{name} {value:.4g}" for name, value in facts["best"].items()]
    last = [] if facts["loss"] is None else [f"{facts['loss']:.4g}"]
    return [
        facts["name"],
        facts["kind"] or "-",
        (facts["method"] or "-").replace("_", " "),
        facts["data"] or "-",
        f"{facts['step']}/{facts['steps'] or '?'}",
        facts["state"],
        ", ".join(best or last) or "-",
        rounded(facts["age_seconds"], AGES),
        rounded(facts["bytes"], SIZES),
    ]


def rounded(number: float, units: Sequence[tuple[int, str]]) -> str:
    """Return a number in the largest of the units that it has one of: 90 s are 1.5 min."""
    size, unit = next((row for row in units if number >= row[0]), units[-1])
    return f"{number / size:.1f}".removesuffix(".0") + f" {unit}"


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path],
        Argument(
            metavar="RUN RUN...",
            help="Run folders, two or more.",
            autocompletion=_completion.runs,
        ),
    ],
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="A .png to draw the curves into: the loss, and each metric."),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the picture.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print in what the presets of runs differ, and what became of them.

    `cmtool runs compare runs/digits-cd runs/digits-cd-2 --out curves.png`

    One line a key, one column a run. In a pipe, tabs separate the columns. Folders without a run
    are passed over with a note.
    """
    with importing_torch():
        from cmtool.training import history
        from cmtool.training.plots import write_plots

    if out is not None:
        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: the curves are a PNG", "end it with .png")
        check_free(out, overwrite)
    found = kept(read(path) for path in runs)
    if len(found) < 2:
        hint = "give two run folders or more: cmtool runs list shows them"
        raise InputError(f"{len(found)} run{'s' * (len(found) != 1)} to compare", hint)
    differing, numbers = history.differing(found), history.numbers(found)
    plots = history.compared_plots(found) if out is not None else []
    if out is not None and plots:
        make_folder(out.parent)
        write_plots(out, plots)
        say(f"curves: {out}")
    elif out is not None:
        say("no curves: nothing was logged")
    if as_json:
        paths = [str(run.path) for run in found]
        emit_json({"runs": paths, "presets": differing, "numbers": numbers})
    else:
        rows = [[key, *map(cell, values)] for key, values in {**differing, **numbers}.items()]
        show_table(["", *history.labels(found)], rows)


def read(path: Path) -> History | InputError:
    """Return a run, or why there is none."""
    from cmtool.training.history import read_history

    try:
        return read_history(path)
    except InputError as error:
        return error


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
