"""cmtool search: the noise levels that a consistency model samples best at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli._devices import pick_device
from cmtool.cli._options import (
    NUM,
    AsJson,
    Batch,
    Checkpoint,
    Device,
    Features,
    FeaturesInput,
    KindOption,
    ModelPreset,
    Trust,
    Weights,
    pick_model,
)
from cmtool.cli._output import emit, emit_json, make_folder, say
from cmtool.cli._watching import showing
from cmtool.errors import UserError, nearest

if TYPE_CHECKING:
    from cmtool.evaluation.own import Own


Metric = Annotated[
    str | None,
    typer.Option(
        help="The number to minimise: fd-digits, fd-emoji, fid, kid, fd-dinov2, fd-clip or"
        " fd-pixels. Default: that of the bundled data; fid with --features."
    ),
]

Reference = Annotated[
    str | None,
    typer.Option(
        help="Data set or folder that the images are compared with. Default: the bundled data that"
        " the model was trained on, else digits."
    ),
]


def search(
    checkpoint: Checkpoint = None,
    steps: Annotated[int, typer.Option(min=2, help="Network calls per image.")] = 2,
    num: Annotated[int, typer.Option(*NUM, min=2, help="Images per evaluation.")] = 2048,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    grid: Annotated[
        int | None,
        typer.Option(min=3, help="Points of the grid of levels. Default: the model's own grid."),
    ] = None,
    metric: Metric = None,
    reference: Reference = None,
    features: Features = None,
    features_input: FeaturesInput = "",
    trust: Trust = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: beside the weights.")
    ] = None,
    batch: Batch = 256,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the best noise levels for n steps; `--steps n` of sample and edit then uses them.

    `cmtool search -c runs/mine --steps 2`

    `cmtool search -c runs/mine --steps 3 --num 10000`

    `cmtool search -c runs/mine --reference photos/ --features net.pt --trust`

    Levels are added one at a time, each by ternary search on the metric (Song et al. 2023). Every
    evaluation is kept: the same command goes on where it was stopped. Prints the levels.
    """
    from cmtool.evaluation.search import Search
    from cmtool.sampling import grid_size

    own = _checked(metric or "fid", features, features_input, trust)
    where = pick_device(device)
    model = pick_model(checkpoint, weights, where, "consistency", said=kind, preset=preset)
    metric = metric or ("fid" if features else f"fd-{model.bundled_data}")
    reference = reference or model.bundled_data
    points = grid or grid_size(model.preset)
    if points - 1 < steps:
        raise UserError(f"--steps {steps} on a grid of {points}", f"give at most {points - 1}")
    file = out or model.levels_file
    if file is None:
        raise UserError(f"{model.source} comes with cmtool and is not changed", "give an --out")
    make_folder(file.parent)
    wanted = Search(model, metric, reference, num, first_seed, points, file, batch, where, own)
    with showing() as progress:
        sigmas, value = wanted.levels(steps, say, progress)
    say(f"written to {file}: --steps {steps} takes them from there")
    if as_json:
        emit_json({"sigmas": sigmas, "metric": metric, "value": value, "file": str(file)})
    else:
        emit(",".join(f"{sigma:.6g}" for sigma in sigmas))


def _checked(metric: str, features: Path | None, features_input: str, trust: bool) -> Own | None:
    """Return the user's own features, if any. Raises UserError where options do not fit."""
    from cmtool.evaluation.during_training import check_own, score_names
    from cmtool.evaluation.own import Own

    if metric not in score_names():
        raise UserError(f"unknown --metric {metric!r}", nearest(metric, score_names()))
    if features is None and (features_input or trust):
        what = "--features-input or --trust without --features"
        raise UserError(what, "name the file: --features FILE.pt")
    own = None if features is None else Own(features, features_input, trust)
    check_own(metric, own)
    return own
