"""cmtool sample: seeds in, images out: a PNG each in a folder, or all in one grid, zip or npz."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cmtool.cli import _completion
from cmtool.cli import _options as shared
from cmtool.cli._devices import pick_device, pick_precision
from cmtool.cli._drawing import Drawing, write_folder, write_one_file
from cmtool.cli._output import emit, emit_json, joined, prepare_output, say
from cmtool.cli._show import Show, show
from cmtool.cli._watching import showing
from cmtool.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.models import Model

TIMEOUT = 600.0
"""Seconds that one process waits for another."""
ONE_FILE = (".png", ".zip", ".npz")
"""Endings of --out that put all images into one file."""


@dataclass(frozen=True)
class SampleOptions:
    """Options of cmtool sample."""

    checkpoint: shared.Checkpoint = None
    seeds: shared.Seeds = "0-15"
    steps: shared.Steps = None
    sigmas: shared.Sigmas = None
    ts: shared.Indices = None
    grid: shared.Grid = None
    sampler: shared.Sampler = None
    set_: shared.SamplerOptions = None
    class_: Annotated[
        str | None,
        Option(
            "--class",
            help="Class of every image, or one per seed: 0,1,2. A class is a number, or a name that"
            " the training images gave it: cat. Default: each image's seed draws its class.",
            autocompletion=_completion.classes,
        ),
    ] = None
    out: Annotated[
        str,
        Option(
            "--out",
            "-o",
            help="A folder, a .zip or .npz of images, a .png for one grid, or - for the grid on"
            " stdout.",
        ),
    ] = "samples"
    overwrite: shared.Overwrite = False
    show: Show = False
    guidance: shared.Guidance = 1.0
    batch: shared.Batch = 256
    rounding: Annotated[
        str, Option(help="Rounding to 8 bits: nearest, or floor as the PyTorch release does.")
    ] = "nearest"
    no_metadata: shared.NoMetadata = False
    weights: shared.Weights = "ema"
    preset: shared.ModelPreset = None
    kind: shared.KindOption = None
    device: shared.Device = "auto"
    precision: shared.Precision = "fp32"
    as_json: shared.AsJson = False

    def drawing(self, seeds: list[int]) -> Drawing:
        """Return what is to be drawn, by this process alone. Raises UserError, InputError."""
        from cmtool.data.images import ROUNDINGS
        from cmtool.system.dist import ALONE

        if self.rounding not in ROUNDINGS:
            raise UserError(
                f"unknown --rounding {self.rounding!r}", nearest(self.rounding, ROUNDINGS)
            )
        where = pick_device(self.device)
        precision = pick_precision(self.precision, where)
        model = shared.pick_model(
            self.checkpoint, self.weights, where, said=self.kind, preset=self.preset
        )
        labels = _labels(self.class_, seeds, model)
        chosen = shared.pick_plan(
            model, self.sampler, self.set_, self.steps, self.sigmas, self.ts, self.grid,
            self.guidance,
        )._replace(precision=precision)  # fmt: skip
        how = f"{chosen.sampler.name} at sigma {','.join(f'{s:.4g}' for s in chosen.sigmas)}"
        say(f"{len(seeds)} images, {how}: {chosen.evaluations} network calls each")
        to_uint8 = ROUNDINGS[self.rounding]
        return Drawing(self, model, chosen, seeds, labels, where, to_uint8, ALONE)


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
    seeds = shared.parse_seeds(options.seeds)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {options.seeds!r} names a seed twice", "name each seed once")
    out = options.out
    prepare_output(out, options.overwrite, ONE_FILE)

    drawing = options.drawing(seeds)
    with joined(drawing.device, TIMEOUT, drawing.facts()) as group, showing() as progress:
        drawing = replace(drawing, group=group, progress=progress)
        if out == "-" or Path(out).suffix.lower() in ONE_FILE:
            facts = write_one_file(drawing)
        else:
            facts = write_folder(drawing)
    if options.show:
        show(drawing.some())
    if options.as_json and out != "-":
        chosen = drawing.plan
        about = {
            "sigmas": chosen.sigmas, "guidance": chosen.guidance, "precision": chosen.precision,
        }  # fmt: skip
        emit_json({
            **facts, **about, "model": drawing.model.sha256, "source": drawing.model.source
        })  # fmt: skip
    elif out != "-" and "path" in facts:
        emit(out)


sample = shared.with_options(_sample, SampleOptions)


def _labels(class_: str | None, seeds: list[int], model: Model) -> Tensor | None:
    """Return a class per image, (N,) int64; None for an unconditional model. Raises UserError."""
    import torch

    from cmtool.core.rng import seeded_labels
    from cmtool.sampling import check_classes

    count = model.preset.model.num_classes
    if class_ is None:
        return seeded_labels(seeds, count) if count else None
    given = shared.parse_classes(class_, model)
    check_classes(given, len(seeds), count)
    return torch.tensor(given).expand(len(seeds))
