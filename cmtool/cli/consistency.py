"""cmtool eval consistency: how far a model is from its teacher's paths, by noise level."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer

from cmtool import __version__
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


def consistency(
    checkpoint: Checkpoint = None,
    teacher: Annotated[
        str, typer.Option(help="The teacher whose paths the model maps to their ends.")
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

    At each level: the distance of the model's answer from the end of the path, from its answer at
    the next lower level, and of the teacher's denoised image from the end, for comparison; all are
    root mean squares over pixels in [-1, 1]. JSON on stdout, a table on stderr.
    """
    if processes()[1] > 1:
        raise UserError("eval consistency is the work of one process", "leave torchrun out")
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--plot {plot}", "end it with .png or .svg")
        check_free(plot, overwrite)
        make_folder(plot.parent)

    from cmtool.evaluation.measure import consistency as deviations
    from cmtool.training.plots import write_curves

    where = pick_device(device)
    model = pick_model(checkpoint, weights, where, "consistency", preset=preset)
    guide = pick_model(teacher, "ema", where, "teacher", preset=preset)
    seeds = range(first_seed, first_seed + num)
    rows = deviations(model, guide, seeds, levels, substeps, where)
    _table(rows)
    if plot is not None:
        curves = {
            "f to the end of the path": [(row["sigma"], row["end"]) for row in rows],
            "f to f at the next level": [(row["sigma"], row["next"]) for row in rows],
            "teacher's D to the end": [(row["sigma"], row["teacher"]) for row in rows],
        }
        write_curves(plot, curves, "noise level sigma", "root mean square")
        say(f"plot: {plot}")
    emit_json(
        {
            "metric": "consistency",
            "value": statistics.fmean(row["end"] for row in rows),
            "value_is": "mean over levels of the distance from the end of the path",
            "levels": rows,
            "num_images": num,
            "seeds": f"{seeds[0]}-{seeds[-1]}",
            "model": {"source": model.source, "sha256": model.sha256, "weights": model.weights},
            "teacher": {"source": guide.source, "sha256": guide.sha256, "weights": guide.weights},
            "solver": f"heun, {substeps} steps between levels",
            "cmtool": __version__,
        },
        compact=as_json,
    )


def _table(rows: list[dict[str, float]]) -> None:
    """Show the deviations on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table("sigma", "f to end", "f to next f", "teacher to end", box=None)
    for row in rows:
        shown = (f"{row[key]:.4f}" for key in ("end", "next", "teacher"))
        table.add_row(f"{row['sigma']:.4g}", *shown)
    Console(stderr=True).print(table)
