"""cmtool sample: seeds in, images out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli._options import (
    AsJson,
    Batch,
    Checkpoint,
    Device,
    Grid,
    Indices,
    KindOption,
    ModelPreset,
    NoMetadata,
    Precision,
    Sampler,
    SamplerOptions,
    Seeds,
    Sigmas,
    Steps,
    Weights,
    parse_seeds,
    pick_device,
    pick_model,
    pick_plan,
    pick_precision,
)
from cmtool.cli._output import (
    check_free,
    emit,
    emit_json,
    make_folder,
    processes,
    refuse_terminal,
    say,
)
from cmtool.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.models import Model

TIMEOUT = 600.0
"""Seconds that one process waits for another."""
ONE_FILE = (".png", ".zip", ".npz")
"""Endings of --out that put all images into one file."""


def sample(
    checkpoint: Checkpoint = None,
    seeds: Seeds = "0-15",
    steps: Steps = None,
    sigmas: Sigmas = None,
    ts: Indices = None,
    grid: Grid = None,
    sampler: Sampler = None,
    set_: SamplerOptions = None,
    class_: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Class of every image, or one per seed: 0,1,2. Default: each image's seed draws"
            " its class.",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A folder, a .zip or .npz of images, a .png for one grid, or - for the grid on"
            " stdout.",
        ),
    ] = "samples",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    batch: Batch = 256,
    rounding: Annotated[
        str, typer.Option(help="Rounding to 8 bits: nearest, or floor as the PyTorch release does.")
    ] = "nearest",
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    as_json: AsJson = False,
) -> None:
    """Draw images: one step by default, more for quality. Prints a path a line.

    `cmtool sample --seeds 0-15 --out grid.png`

    `cmtool sample -c runs/mine --seeds 0-2047 --steps 2 --out out/`

    `cmtool sample -c edm-cifar10-32x32-cond-vp.pkl --sampler dpmpp_2m --steps 10 --out grid.png`

    `cmtool sample -c cd_imagenet64_lpips.pt --ts 0,22,39 --grid 40 --seeds 0-49999 --out s.npz`

    `torchrun --nproc-per-node 8 -m cmtool sample --seeds 0-49999 --out samples.zip`

    An image is a function of its seed: it is the same in any batch, order and number of processes.
    A file that holds the image already is skipped, so that a stopped command can be run again.
    """  # fmt: skip
    numbers = parse_seeds(seeds)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds!r} names a seed twice", "name each seed once")
    _check_out(out, overwrite)

    from cmtool.cli._sample_files import Drawing, write_folder, write_one_file
    from cmtool.data.images import ROUNDINGS
    from cmtool.system import dist

    if rounding not in ROUNDINGS:
        raise UserError(f"--rounding {rounding!r}", nearest(rounding, ROUNDINGS))
    where = pick_device(device)
    kept = pick_precision(precision, where)
    model = pick_model(checkpoint, weights, where, said=kind, preset=preset)
    labels = _labels(class_, numbers, model)
    chosen = pick_plan(model, sampler, set_, steps, sigmas, ts, grid)._replace(precision=kept)
    shown = ",".join(f"{sigma:.4g}" for sigma in chosen.sigmas)
    say(
        f"{len(numbers)} images, {chosen.sampler.name} at sigma {shown}:"
        f" {chosen.evaluations} network calls each"
    )
    group = dist.join(*processes(), where, TIMEOUT)
    try:
        drawing = Drawing(
            model, chosen, numbers, labels, batch, where, ROUNDINGS[rounding], group,
            metadata=not no_metadata,
        )  # fmt: skip
        if out == "-" or Path(out).suffix.lower() in ONE_FILE:
            facts = write_one_file(out, drawing)
        else:
            facts = write_folder(Path(out), drawing, overwrite=overwrite, print_paths=not as_json)
    except RuntimeError as error:
        raise dist.lost_contact(error, group, 0) or error from None
    finally:
        dist.leave()
    if as_json and out != "-":
        emit_json({**facts, "sigmas": chosen.sigmas, "precision": kept, "model": model.sha256})
    elif out != "-" and "path" in facts:
        emit(out)


def _check_out(out: str, overwrite: bool) -> None:
    """Make the folder of the results. Raises UserError for an --out that cannot be written."""
    suffix = Path(out).suffix.lower()
    if out == "-":
        refuse_terminal()
    elif suffix in (".jpg", ".jpeg", ".webp", ".gif"):
        raise UserError(f"--out {out}: pictures are written as PNG", "give a folder or a .png file")
    elif suffix in ONE_FILE:
        check_free(Path(out), overwrite)
        make_folder(Path(out).parent)
    else:
        make_folder(Path(out))


def _labels(class_: str | None, seeds: list[int], model: Model) -> Tensor | None:
    """Return a class per image, (N,) int64; None for an unconditional model. Raises UserError."""
    import torch

    from cmtool.core.rng import SeededNoise
    from cmtool.sampling import check_classes

    count = model.preset.model.num_classes
    if class_ is None:
        return SeededNoise(seeds).labels(count) if count else None
    try:
        given = [int(part) for part in class_.split(",")]
    except ValueError:
        raise UserError(f"--class {class_!r}", "a class index, or one per seed: 0,1,2") from None
    check_classes(given, len(seeds), count)
    return torch.tensor(given).expand(len(seeds))
