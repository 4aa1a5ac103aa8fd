"""cmtool eval consistency: how far a model is from its teacher's paths, by noise level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli._options import (
    AsJson,
    Checkpoint,
    Device,
    FirstSeed,
    ModelPreset,
    Weights,
    pick_device,
    pick_model,
)
from cmtool.cli._output import check_free, emit_json, make_folder, processes, say
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.core.consistency import Deviation


def consistency(
    checkpoint: Checkpoint = None,
    teacher: Annotated[
        str, typer.Option(help="The teacher of the model: its paths are followed.")
    ] = "digits-edm",
    num: Annotated[int, typer.Option("--num-images", "--num", min=1, help="Paths to follow.")] = 64,
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
        if plot.suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--plot {plot}", "end it with .png or .svg")
        check_free(plot, overwrite)
        make_folder(plot.parent)

    from cmtool.evaluation.consistency import consistency as deviations
    from cmtool.evaluation.consistency import describe_consistency
    from cmtool.training.plots import write_curves

    where = pick_device(device)
    model = pick_model(checkpoint, weights, where, "consistency", preset=preset)
    guide = pick_model(teacher, "ema", where, "teacher", preset=preset)
    seeds = range(first_seed, first_seed + num)
    found = deviations(model, guide, seeds, levels, substeps, where)
    _show_table(found)
    if plot is not None:
        curves = {
            "f to the end of the path": [(each.sigma, each.end) for each in found],
            "f to f at the next level": [(each.sigma, each.next) for each in found],
            "teacher's D to the end": [(each.sigma, each.teacher) for each in found],
        }
        write_curves(plot, curves, "noise level sigma", "root mean square")
        say(f"plot: {plot}")
    emit_json(describe_consistency(found, model, guide, seeds, substeps), compact=as_json)


def _show_table(found: list[Deviation]) -> None:
    """Show the deviations on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table("sigma", "f to end", "f to next f", "teacher to end", box=None)
    for each in found:
        numbers = (f"{number:.4f}" for number in (each.end, each.next, each.teacher))
        table.add_row(f"{each.sigma:.4g}", *numbers)
    Console(stderr=True).print(table)
