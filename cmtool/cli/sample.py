"""cmtool sample: seeds in, images out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cmtool.cli import _options as shared
from cmtool.cli._measurement import joined
from cmtool.cli._output import emit, emit_json, prepare_output, say
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
            help="Class of every image, or one per seed: 0,1,2. Default: each image's seed draws"
            " its class.",
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
        from cmtool.cli._sample_files import Drawing
        from cmtool.data.images import ROUNDINGS
        from cmtool.system.dist import ALONE

        if self.rounding not in ROUNDINGS:
            raise UserError(f"--rounding {self.rounding!r}", nearest(self.rounding, ROUNDINGS))
        where = shared.pick_device(self.device)
        precision = shared.pick_precision(self.precision, where)
        model = shared.pick_model(
            self.checkpoint, self.weights, where, said=self.kind, preset=self.preset
        )
        labels = _labels(self.class_, seeds, model)
        chosen = shared.pick_plan(
            model, self.sampler, self.set_, self.steps, self.sigmas, self.ts, self.grid
        )._replace(precision=precision)
        how = f"{chosen.sampler.name} at sigma {','.join(f'{s:.4g}' for s in chosen.sigmas)}"
        say(f"{len(seeds)} images, {how}: {chosen.evaluations} network calls each")
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
    seeds = shared.parse_seeds(options.seeds)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {options.seeds!r} names a seed twice", "name each seed once")
    out = options.out
    prepare_output(out, options.overwrite, ONE_FILE)

    from cmtool.cli._sample_files import write_folder, write_one_file

    drawing = options.drawing(seeds)
    with joined(drawing.device, TIMEOUT) as group:
        drawing = replace(drawing, group=group)
        if out == "-" or Path(out).suffix.lower() in ONE_FILE:
            facts = write_one_file(out, drawing)
        else:
            facts = write_folder(
                Path(out), drawing, overwrite=options.overwrite, print_paths=not options.as_json
            )
    if options.as_json and out != "-":
        chosen = drawing.plan
        about = {"sigmas": chosen.sigmas, "precision": chosen.precision}
        emit_json({**facts, **about, "model": drawing.model.sha256})
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
    hint = "a class index, or one per seed: 0,1,2"
    given = shared.parse_list(class_, int, f"--class {class_!r}", hint)
    check_classes(given, len(seeds), count)
    return torch.tensor(given).expand(len(seeds))
