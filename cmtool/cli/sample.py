"""cmtool sample: seeds in, images out: a PNG each in a folder, or all in one grid, zip or npz."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cmtool.cli import _completion
from cmtool.cli import _options as shared
from cmtool.cli._archive import ARCHIVES, image_name, told, write_archive
from cmtool.cli._devices import pick_device, pick_precision
from cmtool.cli._output import emit, emit_json, joined, prepare_output, say, write_bytes
from cmtool.cli._show import MOST, Show, show
from cmtool.cli._watching import showing
from cmtool.errors import InputError, ResourceError, Stopped, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from cmtool.cli._watching import OnProgress
    from cmtool.models import Model
    from cmtool.sampling import OnDrawn, Plan
    from cmtool.system.dist import Group

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
            model,
            self.sampler,
            self.set_,
            self.steps,
            self.sigmas,
            self.ts,
            self.grid,
            self.guidance,
        )._replace(precision=precision)
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
    given = shared.parse_classes(class_, model)
    check_classes(given, len(seeds), count)
    return torch.tensor(given).expand(len(seeds))


@dataclass(frozen=True)
class Drawing:
    """Images to draw, one a seed, by all processes together; uint8, on the CPU.

    `labels` (N,) are their classes, None for an unconditional model.
    """

    options: SampleOptions
    model: Model
    plan: Plan
    seeds: list[int]
    labels: Tensor | None
    device: str
    to_uint8: Callable[[Tensor], Tensor]
    group: Group
    progress: OnProgress | None = None
    drawn: list[Tensor] = field(default_factory=list)
    """The first images that this process drew, for --show."""

    def facts(self) -> dict[str, Any]:
        """Return what must be the same in all processes; other words may mean the same."""
        options, plan = self.options, self.plan
        return {
            "--out": str(Path(options.out)), "--batch": options.batch,
            "--seeds": _brief(self.seeds), "--rounding": options.rounding,
            "--json": options.as_json,
            "--overwrite": options.overwrite, "--no-metadata": options.no_metadata,
            "model": self.model.sha256, "kind": self.model.kind,
            "sampler": plan.sampler.model_dump(mode="json"), "sigmas": plan.sigmas,
            "precision": plan.precision, "classes": _brief(self.classes()),
        }  # fmt: skip

    def draw(self, indices: Sequence[int], on_drawn: OnDrawn | None = None) -> Tensor:
        """Return some of the images (n, C, H, W), at least one, in one batch."""
        import torch

        from cmtool.sampling import generate

        seeds = [self.seeds[index] for index in indices]
        labels = None if self.labels is None else self.labels[list(indices)]
        drawn = generate(
            self.model.f, self.model.preset, self.plan, seeds, labels=labels,
            batch=self.options.batch, device=self.device, on_drawn=on_drawn,
        )  # fmt: skip
        images = self.to_uint8(torch.cat(list(drawn))).cpu()
        if self.options.show:
            self.drawn.extend(images[: max(0, MOST - len(self.drawn))])
        return images

    def some(self) -> list[Tensor]:
        """Return the first images (C, H, W), drawn now if they all were files before."""
        return self.drawn or list(self.draw(range(min(MOST, len(self.seeds)))))

    def rounds(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield this process's part of each round: at most a batch of the indices, in order."""
        batch = self.options.batch
        stride = batch * self.group.world_size
        for first in range(0, len(indices), stride):
            start = first + batch * self.group.rank
            yield indices[start : min(start + batch, first + stride)]

    def drawn_rounds(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor | None]]:
        """Yield this process's part of each round with its images, None for none; tell of each."""
        mine, done = sum(map(len, self.rounds(indices))), 0

        def tell(images: float, _: int) -> None:
            if self.progress is not None:
                self.progress("drawn", done + images, mine)

        for part in self.rounds(indices):
            yield part, self.draw(part, tell) if part else None
            done += len(part)

    def everything(self, first: int = 0) -> Iterator[Tensor]:
        """Yield the images (C, H, W) of all processes, in order from `first`, round by round."""
        import torch

        for _, drawn in self.drawn_rounds(range(first, len(self.seeds))):
            yield from torch.cat([part for part in self.group.gather(drawn) if part is not None])

    def classes(self) -> list[int] | list[None]:
        """Return the class of each image."""
        return [None] * len(self.seeds) if self.labels is None else self.labels.tolist()

    def key(self) -> str:
        """Return a hash of all that the pixels of the images depend on."""
        facts = [self.about(), self.options.rounding]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def about(self) -> list[dict[str, str]]:
        """Return what the PNG of each image says of how it was made."""
        from cmtool.sampling import provenance

        same = provenance(self.model, self.plan)
        infos = [{**same, "cmtool:seed": str(seed)} for seed in self.seeds]
        for info, label in zip(infos, self.classes(), strict=True):
            if label is not None:
                info["cmtool:class"] = str(label)
        return infos


def write_one_file(drawing: Drawing) -> dict[str, Any]:
    """Write all images into one zip, npz or grid; return what to say of it."""
    out = drawing.options.out
    if Path(out).suffix.lower() in ARCHIVES:
        write_archive(drawing)
    elif drawing.group.leads:
        _write_grid(out, drawing)
    else:
        for _ in drawing.everything():
            pass
    return {"path": out, "seeds": drawing.seeds} if drawing.group.leads else {}


def _write_grid(out: str, drawing: Drawing) -> None:
    import torch

    from cmtool.data.drawing import contact_sheet, png_bytes
    from cmtool.sampling import provenance

    picture = contact_sheet(torch.stack(list(drawing.everything())))
    about = provenance(drawing.model, drawing.plan) | {"cmtool:seeds": seed_ranges(drawing.seeds)}
    write_bytes(out, png_bytes(picture, {} if drawing.options.no_metadata else about))


def _brief(numbers: Sequence[int | None]) -> str:
    """Return a text that is another for other numbers: all of them, or their count and a hash."""
    if None in numbers:
        return "none"
    text = seed_ranges([number for number in numbers if number is not None])
    many = f"{len(numbers)} from {text[:20]}..., {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text if len(text) < 60 else many


def seed_ranges(seeds: list[int]) -> str:
    """Return seeds as --seeds takes them: "0-15,99"."""
    groups = groupby(enumerate(seeds), key=lambda pair: pair[1] - pair[0])  # equal in a range
    ranges = [[seed for _, seed in group] for _, group in groups]
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def write_folder(drawing: Drawing) -> dict[str, Any]:
    """Write a PNG for each image, and print its path when it is there; return records of all.

    Images that are there already are not drawn. Raises UserError, before any is drawn, for a file
    that holds another image.
    """
    from cmtool.data.drawing import png_bytes
    from cmtool.system.files import write_atomic

    options, infos = drawing.options, drawing.about()
    paths = [Path(options.out) / image_name(seed) for seed in drawing.seeds]
    missing = _missing(drawing, paths, infos)
    drawing.group.tell(None)  # all processes have looked before one of them writes
    records: list[dict[str, Any]] = []
    classes = drawing.classes()

    def record(indices: Sequence[int]) -> None:
        for index in indices:
            path, seed = str(paths[index]), drawing.seeds[index]
            records.append({"path": path, "seed": seed, "class": classes[index]})
            if not options.as_json:
                emit(path)

    record(sorted(set(range(len(paths))) - set(missing)))
    with told(lambda: len(records), len(paths), options.out):
        for indices, images in drawing.drawn_rounds(missing):
            written = 0
            try:
                for index, image in zip(indices, () if images is None else images, strict=True):
                    info = {} if options.no_metadata else infos[index]
                    write_atomic(paths[index], png_bytes(image, info))
                    written += 1
            except (ResourceError, Stopped):
                record(indices[:written])
                raise
            for part in drawing.group.gather(indices):
                record(part)
    return {"images": records} if drawing.group.leads else {}


def _missing(drawing: Drawing, paths: list[Path], infos: list[dict[str, str]]) -> list[int]:
    """Return the indices of the images to draw. Raises UserError for another image in a file.

    A file without metadata does not say what it holds: the first such image is drawn to compare.
    """
    from cmtool.data.decoding import png_info

    options, missing, is_compared = drawing.options, [], False
    for index, path in enumerate(paths):
        if options.overwrite or not path.exists():
            missing.append(index)
            continue
        info = png_info(path)
        is_same = info == infos[index]
        if not info and options.no_metadata:
            is_same = is_compared or _holds(path, drawing.draw([index])[0])
            is_compared = True
        if not is_same:
            what = f"{path} holds another image than this command makes"
            raise UserError(what, "give another --out, or --overwrite")
    if len(missing) < len(paths):
        say(f"{len(paths) - len(missing)} of {len(paths)} images are there already")
    return missing


def _holds(path: Path, image: Tensor) -> bool:
    """Tell whether a file holds this image (C, H, W)."""
    import torch

    from cmtool.data.decoding import read_image

    try:
        return torch.equal(read_image(path, mode="RGB" if len(image) == 3 else "L"), image)
    except InputError:
        return False
