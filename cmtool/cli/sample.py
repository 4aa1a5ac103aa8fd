"""cmtool sample: seeds in, images out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli._options import (
    AsJson,
    Batch,
    Checkpoint,
    ClassIndex,
    Device,
    KindOption,
    ModelPreset,
    Sampler,
    Seeds,
    Sigmas,
    Steps,
    Weights,
    check_class,
    emit,
    emit_bytes,
    emit_json,
    make_folder,
    parse_seeds,
    parse_sigmas,
    pick_device,
    pick_model,
    say,
)
from cmtool.errors import ResourceError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cmtool.build import Model
    from cmtool.sampling import Plan


def sample(
    checkpoint: Checkpoint = None,
    seeds: Seeds = "0-15",
    steps: Steps = None,
    sigmas: Sigmas = None,
    sampler: Sampler = None,
    class_: ClassIndex = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="A folder, one .png for a grid, or - for its bytes.")
    ] = "samples",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Draw existing files anew.")
    ] = False,
    batch: Batch = 256,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw images: one step by default, more for quality. Prints a path a line.

    `cmtool sample --seeds 0-15 --out grid.png`

    `cmtool sample -c runs/mine --seeds 0-2047 --steps 2 --out out/`

    `cmtool sample -c edm-cifar10-32x32-cond-vp.pkl --seeds 0-63 --out grid.png`

    `cmtool sample --seeds 0-63 --class 7 --out - > sevens.png`

    An image is a function of its seed: the same in any batch and order. Files that exist are
    skipped when they hold this very image, so a long job can be run again.
    """
    numbers = parse_seeds(seeds)
    levels = parse_sigmas(sigmas)
    if out == "-" and sys.stdout.isatty():
        raise UserError("a picture would go to the terminal", "use --out FILE, or a pipe")
    target = Path(out)
    is_grid = out == "-" or target.suffix.lower() == ".png"
    if is_grid and out != "-" and target.exists() and not overwrite:
        raise UserError(f"{out} exists", "give another --out, or --overwrite it")
    if not is_grid and target.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
        raise UserError(f"--out {out}: pictures are written as PNG", "give a folder or a .png file")
    if out != "-":
        make_folder(target.parent if is_grid else target)

    import torch

    from cmtool.core.rng import SeededNoise
    from cmtool.sampling import plan

    where = pick_device(device)
    model = pick_model(checkpoint, weights, where, said=kind, preset=preset)
    check_class(class_, model.preset.model.num_classes)
    chosen = plan(model.preset, sampler=sampler, steps=steps, sigmas=levels)
    shown = ",".join(f"{sigma:.4g}" for sigma in chosen.sigmas)
    say(
        f"{len(numbers)} images, {chosen.sampler.name} at sigma {shown}:"
        f" {chosen.evaluations} network calls each"
    )
    labels = None
    if model.preset.model.num_classes:
        labels = SeededNoise(numbers).labels(model.preset.model.num_classes)
        if class_ is not None:
            labels = labels.new_full(labels.shape, class_)

    if is_grid:
        _write_grid(out, torch.cat(list(draw(model, chosen, numbers, labels, batch, where))))
        if as_json and out != "-":
            emit_json({"path": out, "seeds": numbers, "sigmas": chosen.sigmas})
        elif out != "-":
            emit(out)
        return
    records = []
    try:
        for path, index in _write_folder(
            target, model, chosen, numbers, labels, overwrite, batch, where
        ):
            label = None if labels is None else int(labels[index])
            records.append({"path": str(path), "seed": numbers[index], "class": label})
            if not as_json:
                emit(str(path))
    except ResourceError as error:
        raise ResourceError(
            f"{error.what}: {len(records)} of {len(numbers)} images are there",
            f"{error.hint}; the same command again makes the rest",
        ) from None
    if as_json:
        emit_json({"images": records, "sigmas": chosen.sigmas, "model": model.sha256})


def draw(
    model: Model,
    chosen: Plan,
    seeds: list[int],
    labels: Tensor | None,
    batch: int,
    device: str,
) -> Iterator[Tensor]:
    """Yield images (B, C, H, W) uint8 on the CPU, batch by batch."""
    from cmtool.core.images import to_uint8
    from cmtool.sampling import generate

    for part in generate(
        model.f, model.preset, chosen, seeds, labels=labels, batch=batch, device=device
    ):
        yield to_uint8(part).cpu()


def _write_grid(out: str, images: Tensor) -> None:
    """Write the images as one picture, ten in a row if that comes out even, else near a square."""
    from math import ceil, sqrt

    from cmtool.core.checkpoint import write_atomic
    from cmtool.core.images import display_scale, grid, png_bytes

    columns = 10 if len(images) % 10 == 0 else ceil(sqrt(len(images)))
    content = png_bytes(grid(images, columns, scale=display_scale(images.shape[-1])))
    if out == "-":
        emit_bytes(content)
    else:
        write_atomic(Path(out), content)


def _write_folder(
    folder: Path,
    model: Model,
    chosen: Plan,
    seeds: list[int],
    labels: Tensor | None,
    overwrite: bool,
    batch: int,
    device: str,
) -> Iterator[tuple[Path, int]]:
    """Yield (path, index) of each image as it is written, or found to be there already.

    Raises UserError, before any sampling, for a file that holds another image.
    """
    from cmtool.core.checkpoint import write_atomic
    from cmtool.core.images import png_bytes, png_info

    about = {
        "cmtool:model": model.sha256,
        "cmtool:weights": model.weights,
        "cmtool:sampler": chosen.sampler.name,
        "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)),
    }
    infos = [{**about, "cmtool:seed": str(seed)} for seed in seeds]
    if labels is not None:
        for info, label in zip(infos, labels.tolist(), strict=True):
            info["cmtool:class"] = str(label)
    paths = [folder / f"seed{seed:06d}.png" for seed in seeds]
    todo = []
    for index, path in enumerate(paths):
        if overwrite or not path.exists():
            todo.append(index)
        elif png_info(path) != infos[index]:
            raise UserError(
                f"{path} holds another image than this command makes",
                "give another --out, or --overwrite",
            )
    skipped = sorted(set(range(len(seeds))) - set(todo))
    if skipped:
        say(f"{len(skipped)} of {len(seeds)} images are there already")
    yield from ((paths[index], index) for index in skipped)
    waiting = iter(todo)
    some = None if labels is None else labels[todo]
    for images in draw(model, chosen, [seeds[i] for i in todo], some, batch, device):
        for image in images:
            index = next(waiting)
            write_atomic(paths[index], png_bytes(image, infos[index]))
            yield paths[index], index
