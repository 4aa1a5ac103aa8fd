"""cmtool sample: seeds in, images out."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    with_options,
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

    from cmtool.cli._sample_files import Drawing
    from cmtool.models import Model

TIMEOUT = 600.0
"""Seconds that one process waits for another."""
ONE_FILE = (".png", ".zip", ".npz")
"""Endings of --out that put all images into one file."""


@dataclass(frozen=True)
class SampleOptions:
    """Options of cmtool sample."""

    checkpoint: Checkpoint = None
    seeds: Seeds = "0-15"
    steps: Steps = None
    sigmas: Sigmas = None
    ts: Indices = None
    grid: Grid = None
    sampler: Sampler = None
    set_: SamplerOptions = None
    class_: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Class of every image, or one per seed: 0,1,2. Default: each image's seed draws"
            " its class.",
        ),
    ] = None
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A folder, a .zip or .npz of images, a .png for one grid, or - for the grid on"
            " stdout.",
        ),
    ] = "samples"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False
    batch: Batch = 256
    rounding: Annotated[
        str, typer.Option(help="Rounding to 8 bits: nearest, or floor as the PyTorch release does.")
    ] = "nearest"
    no_metadata: NoMetadata = False
    weights: Weights = "ema"
    preset: ModelPreset = None
    kind: KindOption = None
    device: Device = "auto"
    precision: Precision = "fp32"
    as_json: AsJson = False

    def drawing(self, seeds: list[int]) -> Drawing:
        """Return what is to be drawn, by this process alone. Raises UserError, InputError."""
        from cmtool.cli._sample_files import Drawing
        from cmtool.data.images import ROUNDINGS
        from cmtool.system.dist import ALONE

        if self.rounding not in ROUNDINGS:
            raise UserError(f"--rounding {self.rounding!r}", nearest(self.rounding, ROUNDINGS))
        where = pick_device(self.device)
        precision = pick_precision(self.precision, where)
        model = pick_model(self.checkpoint, self.weights, where, said=self.kind, preset=self.preset)
        labels = _labels(self.class_, seeds, model)
        chosen = pick_plan(
            model, self.sampler, self.set_, self.steps, self.sigmas, self.ts, self.grid
        )._replace(precision=precision)
        shown = ",".join(f"{sigma:.4g}" for sigma in chosen.sigmas)
        say(
            f"{len(seeds)} images, {chosen.sampler.name} at sigma {shown}:"
            f" {chosen.evaluations} network calls each"
        )
        to_uint8 = ROUNDINGS[self.rounding]
        return Drawing(
            model, chosen, seeds, labels, self.batch, where, to_uint8, not self.no_metadata, ALONE
        )


def _sample(options: SampleOptions) -> None:
    """Draw images: one step by default, more for quality. Prints a path a line.

    `cmtool sample --seeds 0-15 --out grid.png`

    `cmtool sample -c runs/mine --seeds 0-2047 --steps 2 --out out/`

    `cmtool sample -c edm-cifar10-32x32-cond-vp.pkl --sampler dpmpp_2m --steps 10 --out grid.png`

    `cmtool sample -c cd_imagenet64_lpips.pt --ts 0,22,39 --grid 40 --seeds 0-49999 --out s.npz`

    `torchrun --nproc-per-node 8 -m cmtool sample --seeds 0-49999 --out samples.zip`

    An image is a function of its seed: it is the same in any batch, order and number of processes.
    A file that holds the image already is skipped, so that a stopped command can be run again.
    """  # fmt: skip
    seeds = parse_seeds(options.seeds)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {options.seeds!r} names a seed twice", "name each seed once")
    out = options.out
    _check_out(out, options.overwrite)

    from cmtool.cli._sample_files import write_folder, write_one_file
    from cmtool.system import dist

    drawing = options.drawing(seeds)
    try:
        drawing = replace(drawing, group=dist.join(*processes(), drawing.device, TIMEOUT))
        if out == "-" or Path(out).suffix.lower() in ONE_FILE:
            facts = write_one_file(out, drawing)
        else:
            facts = write_folder(
                Path(out), drawing, overwrite=options.overwrite, print_paths=not options.as_json
            )
    except RuntimeError as error:
        raise dist.lost_contact(error, drawing.group, 0) or error from None
    finally:
        dist.leave()
    if options.as_json and out != "-":
        chosen = drawing.plan
        about = {"sigmas": chosen.sigmas, "precision": chosen.precision}
        emit_json({**facts, **about, "model": drawing.model.sha256})
    elif out != "-" and "path" in facts:
        emit(out)


sample = with_options(_sample, SampleOptions)


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

    from cmtool.core.rng import seeded_labels
    from cmtool.sampling import check_classes

    count = model.preset.model.num_classes
    if class_ is None:
        return seeded_labels(seeds, count) if count else None
    try:
        given = [int(part) for part in class_.split(",")]
    except ValueError:
        raise UserError(f"--class {class_!r}", "a class index, or one per seed: 0,1,2") from None
    check_classes(given, len(seeds), count)
    return torch.tensor(given).expand(len(seeds))
