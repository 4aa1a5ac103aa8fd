"""cmtool eval consistency: how far a consistency model is from its teacher's paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli import _completion
from cmtool.cli._devices import pick_device
from cmtool.cli._options import (
    NUM,
    AsJson,
    Checkpoint,
    Device,
    FirstSeed,
    ModelPreset,
    Weights,
    pick_model,
)
from cmtool.cli._output import check_free, emit_json, make_folder, processes, say
from cmtool.cli._watching import showing
from cmtool.errors import UserError


def check_plot(plot: Path, overwrite: bool) -> None:
    """Raise UserError for a file that no plot can be written to."""
    if plot.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--plot {plot}: the plot is a picture", "end its name with .png or .svg")
    check_free(plot, overwrite)
    make_folder(plot.parent)


def consistency(
    checkpoint: Checkpoint = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The teacher of the model: its paths are followed. Default: the bundled one of the"
            " model's bundled data, else digits-edm.",
            autocompletion=_completion.models,
        ),
    ] = None,
    num: Annotated[int, typer.Option(*NUM, min=1, help="Paths to follow.")] = 64,
    first_seed: FirstSeed = 0,
    levels: Annotated[
        int, typer.Option(min=2, help="Noise levels to report, evenly spaced in rho's scale.")
    ] = 12,
    substeps: Annotated[
        int, typer.Option(min=1, help="Heun steps of the teacher between two levels.")
    ] = 8,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the errors by noise level: a .png or .svg.")
    ] = None,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    as_json: AsJson = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plot.")] = False,
) -> None:
    """Print how far a consistency model is from the end of its teacher's paths, by noise level.

    `cmtool eval consistency -c digits-cd --teacher digits-edm --plot consistency.png`

    Each level has three distances: of the model's answer from the end of the path; of the model's
    answer from its answer at the next lower level; and, for comparison, of the teacher's denoised
    image from the end. They are root mean squares over pixels in [-1, 1]. JSON goes to stdout, a
    table to stderr.
    """
    if processes()[1] > 1:
        raise UserError("eval consistency runs in one process", "start it without torchrun")
    if plot is not None:
        check_plot(plot, overwrite)
    from cmtool.evaluation import consistency as measured
    from cmtool.training.plots import write_curves

    where, seeds = pick_device(device), range(first_seed, first_seed + num)
    model = pick_model(checkpoint, weights, where, "consistency", preset=preset)
    teacher = teacher or f"{model.bundled_data}-edm"
    guide = pick_model(teacher, "ema", where, "teacher", preset=preset)
    with showing("network calls") as progress:
        found = measured.consistency(model, guide, seeds, levels, substeps, where, progress)
    _tell_levels(found)
    if plot is not None:
        names = ("f to the end of the path", "f to f at the next level", "teacher's D to the end")
        curves = {n: [(each[0], each[i]) for each in found] for i, n in enumerate(names, 1)}
        write_curves(plot, curves, "noise level sigma", "root mean square")
        say(f"plot: {plot}")
    content = measured.describe_consistency(found, model, guide, seeds, substeps)
    emit_json(content, compact=as_json)


def _tell_levels(found: Sequence[tuple[float, ...]]) -> None:
    """Write a row of three distances for each noise level."""
    from rich.console import Console
    from rich.table import Table

    table = Table("sigma", "f to end", "f to next f", "teacher to end", box=None)
    for sigma, *distances in found:
        table.add_row(f"{sigma:.4g}", *(f"{distance:.4f}" for distance in distances))
    Console(stderr=True).print(table)
