"""cmtool sample: seeds in, images out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    check_class,
    parse_seeds,
    pick_device,
    pick_model,
    pick_plan,
    pick_precision,
    precision_info,
)
from cmtool.cli._output import (
    check_free,
    emit,
    emit_bytes,
    emit_json,
    leads,
    make_folder,
    processes,
    refuse_terminal,
    say,
)
from cmtool.cli._startup import importing_torch
from cmtool.errors import ResourceError, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from cmtool.models import Model
    from cmtool.sampling import Plan
    from cmtool.system.dist import Group

TIMEOUT = 600.0
"""Seconds that one process waits for another."""


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
            help="Class of every image, or one per seed: 0,1,2. Default: drawn"
            " by each image's seed.",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A folder, a .zip or .npz of images, one .png for a grid,"
            " or - for the grid's bytes.",
        ),
    ] = "samples",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Draw existing files anew.")
    ] = False,
    batch: Batch = 256,
    rounding: Annotated[
        str, typer.Option(help="To 8 bits: nearest, or floor as the PyTorch release does.")
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

    An image is a function of its seed: the same in any batch, order and number of processes.
    Files that exist are skipped when they hold this very image, so a long job can be run again.
    """  # fmt: skip
    numbers = parse_seeds(seeds)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds!r} names a seed twice", "name each once")
    suffix = Path(out).suffix.lower()
    if out == "-":
        refuse_terminal()
    elif suffix in (".jpg", ".jpeg", ".webp", ".gif"):
        raise UserError(f"--out {out}: pictures are written as PNG", "give a folder or a .png file")
    elif suffix in (".png", ".zip", ".npz"):
        check_free(Path(out), overwrite)
        make_folder(Path(out).parent)
    else:
        make_folder(Path(out))

    with importing_torch():
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
    rank, world_size = processes()
    group = dist.join(rank, world_size, where, TIMEOUT)
    try:
        draw = _Draw(model, chosen, batch, where, ROUNDINGS[rounding])
        if suffix in (".zip", ".npz", ".png") or out == "-":
            facts = _one_file(out, suffix, draw, group, numbers, labels, no_metadata)
        else:
            facts = _folder(
                Path(out), draw, group, numbers, labels, overwrite, no_metadata, not as_json
            )
    except RuntimeError as error:
        raise dist.lost_contact(error, group, 0) or error from None
    finally:
        dist.leave()
    if as_json and out != "-":
        emit_json({**facts, "sigmas": chosen.sigmas, "precision": kept, "model": model.sha256})
    elif out != "-" and "path" in facts:
        emit(out)


def _labels(class_: str | None, seeds: list[int], model: Model) -> Tensor | None:
    """Return a class per image, (N,) int64; None for an unconditional model. Raises UserError."""
    import torch

    from cmtool.core.rng import seeded_labels

    count = model.preset.model.num_classes
    if class_ is None:
        return seeded_labels(seeds, count) if count else None
    try:
        given = [int(part) for part in class_.split(",")]
    except ValueError:
        raise UserError(f"--class {class_!r}", "a class index, or one per seed: 0,1,2") from None
    for index in given:
        check_class(index, count)
    if len(given) not in (1, len(seeds)):
        raise UserError(
            f"--class names {len(given)} classes for {len(seeds)} seeds",
            "give one, or one per seed",
        )
    return torch.tensor(given).expand(len(seeds))


class _Draw:
    """Draws the images (B, C, H, W) uint8 of some seeds, on the CPU."""

    def __init__(
        self, model: Model, chosen: Plan, batch: int, device: str,
        to_uint8: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.model, self.chosen, self.batch, self.device = model, chosen, batch, device
        self.to_uint8 = to_uint8

    def __call__(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """Return the images, in one batch."""
        import torch

        from cmtool.sampling import generate

        drawn = generate(
            self.model.f, self.model.preset, self.chosen, seeds, labels=labels, batch=self.batch,
            device=self.device,
        )  # fmt: skip
        return self.to_uint8(torch.cat(list(drawn))).cpu()

    def about(self) -> dict[str, str]:
        """Return what a PNG says of how it was made, but for its seed and class."""
        return {
            "cmtool:model": self.model.sha256,
            "cmtool:weights": self.model.weights,
            "cmtool:sampler": _sampler_name(self.chosen),
            "cmtool:sigmas": ",".join(map(repr, self.chosen.sigmas)),
            **precision_info(self.chosen),
        }

    def turns(self, indices: Sequence[int], group: Group) -> Iterator[Sequence[int]]:
        """Yield this process's part of each round: a batch of indices each, in order."""
        stride = self.batch * group.world_size
        for first in range(0, len(indices), stride):
            start = first + self.batch * group.rank
            yield indices[start : min(start + self.batch, first + stride)]


def _sampler_name(chosen: Plan) -> str:
    options = chosen.sampler.options
    shown = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{chosen.sampler.name}({shown})" if options else chosen.sampler.name


def _infos(draw: _Draw, seeds: list[int], labels: Tensor | None) -> list[dict[str, str]]:
    """Return what each PNG says of itself."""
    infos = [{**draw.about(), "cmtool:seed": str(seed)} for seed in seeds]
    if labels is not None:
        for info, label in zip(infos, labels.tolist(), strict=True):
            info["cmtool:class"] = str(label)
    return infos


def _one_file(
    out: str,
    suffix: str,
    draw: _Draw,
    group: Group,
    seeds: list[int],
    labels: Tensor | None,
    no_metadata: bool,
) -> dict[str, Any]:
    """Write all images into one grid, zip or npz; return what to say of it."""
    from math import ceil, sqrt

    import torch

    from cmtool.data.archives import write_npz, write_zip
    from cmtool.data.images import display_scale, grid, png_bytes
    from cmtool.system.files import write_atomic

    def parts() -> Iterator[Tensor]:
        """Yield the images of each round, of all processes, in order."""
        for turn in draw.turns(range(len(seeds)), group):
            some = None if labels is None else labels[list(turn)]
            drawn = draw([seeds[i] for i in turn], some) if turn else None
            yield torch.cat([part for part in group.gather(drawn) if part is not None])

    def images() -> Iterator[Tensor]:
        for part in parts():
            yield from part

    if not group.leads:
        for _ in parts():
            pass
        return {}
    infos = _infos(draw, seeds, labels)
    classes = None if labels is None else labels.tolist()
    if suffix == ".zip":
        pictures = (
            (f"seed{seed:06d}.png", png_bytes(image, {} if no_metadata else info), label)
            for seed, image, info, label in zip(
                seeds, images(), infos, classes or [None] * len(seeds), strict=True
            )
        )
        write_zip(Path(out), pictures)
    elif suffix == ".npz":
        write_npz(Path(out), images(), len(seeds), classes)
    else:
        every = torch.cat(list(parts()))
        columns = 10 if len(every) % 10 == 0 else ceil(sqrt(len(every)))
        picture = grid(every, columns, scale=display_scale(every.shape[-1]))
        about = {} if no_metadata else {**draw.about(), "cmtool:seeds": _ranges(seeds)}
        content = png_bytes(picture, about)
        if out == "-":
            emit_bytes(content)
        else:
            write_atomic(Path(out), content)
    return {"path": out, "seeds": seeds}


def _ranges(seeds: list[int]) -> str:
    """Return seeds as --seeds takes them: "0-15,99"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _folder(
    folder: Path,
    draw: _Draw,
    group: Group,
    seeds: list[int],
    labels: Tensor | None,
    overwrite: bool,
    no_metadata: bool,
    tell: bool,
) -> dict[str, Any]:
    """Write a PNG an image, and say so as each is there; return the records of all.

    Raises UserError, before any sampling, for a file that holds another image.
    """
    from cmtool.data.images import png_bytes, png_info
    from cmtool.system.files import write_atomic

    infos = _infos(draw, seeds, labels)
    paths = [folder / f"seed{seed:06d}.png" for seed in seeds]
    todo = []
    for index, path in enumerate(paths):
        if overwrite or not path.exists():
            todo.append(index)
        elif not no_metadata and png_info(path) != infos[index]:
            raise UserError(
                f"{path} holds another image than this command makes",
                "give another --out, or --overwrite",
            )
    if len(todo) < len(seeds):
        say(f"{len(seeds) - len(todo)} of {len(seeds)} images are there already")
    group.tell(None)  # all have looked before one of them writes
    records = []

    def done(indices: Sequence[int]) -> None:
        for index in indices:
            label = None if labels is None else int(labels[index])
            records.append({"path": str(paths[index]), "seed": seeds[index], "class": label})
            if tell:
                emit(str(paths[index]))

    done(sorted(set(range(len(seeds))) - set(todo)))
    for turn in draw.turns(todo, group):
        some = None if labels is None else labels[list(turn)]
        drawn: Sequence[Tensor] = list(draw([seeds[i] for i in turn], some)) if turn else []
        written = 0
        try:
            for index, image in zip(turn, drawn, strict=True):
                write_atomic(paths[index], png_bytes(image, {} if no_metadata else infos[index]))
                written += 1
        except ResourceError as error:
            done(turn[:written])
            raise ResourceError(
                f"{error.what}: {len(records)} of {len(seeds)} images are there",
                f"{error.hint}; the same command again makes the rest",
            ) from None
        for part in group.gather(turn):
            done(part)
    return {"images": records} if leads() else {}
