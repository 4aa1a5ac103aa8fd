"""cmtool search: the noise levels that a consistency model samples best at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli._options import (
    AsJson,
    Batch,
    Checkpoint,
    Device,
    KindOption,
    ModelPreset,
    Weights,
    pick_device,
    pick_model,
)
from cmtool.cli._output import emit, emit_json, say
from cmtool.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from cmtool.models import Model


def search(
    checkpoint: Checkpoint = None,
    steps: Annotated[int, typer.Option(min=2, help="Network calls an image.")] = 2,
    num: Annotated[int, typer.Option(min=2, help="Images an evaluation.")] = 2048,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first of them.")] = 0,
    grid: Annotated[
        int | None, typer.Option(min=3, help="Points of the grid searched on; the model's own.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What to make least.")] = "fd-digits",
    reference: Annotated[str, typer.Option(help="Data set or folder to be near to.")] = "digits",
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
    """Find the best noise levels for n steps, where `--steps n` then finds them.

    `cmtool search -c runs/mine --steps 2`

    `cmtool search -c runs/mine --steps 3 --num 10000`

    Levels are added one at a time, each by ternary search on the metric (Song et al. 2023). Every
    evaluation is kept: the same command goes on where it was stopped. Prints the levels.
    """
    from cmtool.evaluation.during_training import EVALUATORS
    from cmtool.evaluation.search import search_indices
    from cmtool.sampling import indexed_levels, plan
    from cmtool.system.files import write_json

    if metric not in EVALUATORS:
        raise UserError(f"--metric {metric!r}", nearest(metric, EVALUATORS))
    where = pick_device(device)
    model = pick_model(checkpoint, weights, where, "consistency", said=kind, preset=preset)
    points = grid or _grid(model)
    if points - 1 < steps:
        raise UserError(f"--steps {steps} on a grid of {points}", f"at most {points - 1}")
    file = out or model.levels_file
    if file is None:
        raise UserError(f"{model.source} comes with cmtool and is not changed", "give an --out")
    about = {"model": model.sha256, "metric": metric, "reference": reference, "num": num,
             "first_seed": first_seed}  # fmt: skip
    kept = _kept(file, about)
    measure = _measure(model, metric, reference, num, first_seed, batch, where)

    def score(indices: tuple[int, ...]) -> float:
        sigmas = indexed_levels(model.preset, (*indices, points - 1), points)
        key = ",".join(f"{sigma:.6g}" for sigma in sigmas)
        known = key in kept["evaluations"]
        if not known:
            kept["evaluations"][key] = measure(sigmas)
            write_json(file, kept)
        value = float(kept["evaluations"][key])
        say(f"sigma {key}: {metric} {value:.4f}{' (known)' if known else ''}")
        return value

    best = search_indices(score, steps, points)
    sigmas = indexed_levels(model.preset, (*best, points - 1), points)
    kept["levels"][str(steps)] = sigmas
    write_json(file, kept)
    plan(model.preset, sigmas=sigmas)
    say(f"written to {file}: --steps {steps} takes them from there")
    if as_json:
        emit_json({"sigmas": sigmas, "metric": metric, "value": score(best), "file": str(file)})
    else:
        emit(",".join(f"{sigma:.6g}" for sigma in sigmas))


def _grid(model: Model) -> int:
    from cmtool.sampling import grid_size

    return grid_size(model.preset)


def _kept(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier search left in a file, if it was the same search; else a start."""
    start: dict[str, Any] = {**about, "evaluations": {}, "levels": {}}
    if not file.exists():
        return start
    try:
        found = json.loads(file.read_text())
        levels, evaluations = dict(found["levels"]), dict(found["evaluations"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} holds no earlier search", "give another --out") from None
    if found.get("model") != about["model"]:
        raise UserError(f"{file} is of another model", "give another --out, or remove it")
    same = all(found.get(key) == value for key, value in about.items())
    return {**start, "levels": levels, "evaluations": evaluations if same else {}}


def _measure(
    model: Model, metric: str, reference: str, num: int, first_seed: int, batch: int, device: str
) -> Callable[[list[float]], float]:
    """Return the function from levels to the metric of the same `num` seeds."""
    import torch

    from cmtool.data.datasets import load_dataset
    from cmtool.data.images import to_uint8
    from cmtool.evaluation.during_training import EVALUATORS
    from cmtool.sampling import generate, plan

    value = EVALUATORS[metric](load_dataset(reference), device)

    def measure(sigmas: list[float]) -> float:
        drawn = generate(
            model.f, model.preset, plan(model.preset, sigmas=sigmas),
            range(first_seed, first_seed + num), batch=batch, device=device,
        )  # fmt: skip
        return value(torch.cat([to_uint8(part).cpu() for part in drawn]))

    return measure
