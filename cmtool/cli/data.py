"""cmtool data: what a set of images holds, and to one archive that trains fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli._options import AsJson, emit, emit_json, make_folder, say
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cmtool.core.data import Dataset

app = typer.Typer(no_args_is_help=True, help="Look into a set of images, or prepare one.")

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Folder, zip, npz, CIFAR-10 tarball, LSUN database, or digits."
    ),
]


@app.command("info")
def info(source: Source, as_json: AsJson = False) -> None:
    """Say what a set holds: count, sizes, classes, mean, and which files cannot be read.

    `cmtool data info images/`

    `cmtool data info cifar-10-python.tar.gz --json`

    Exits with 3 if some images cannot be read; it names them all.
    """
    from collections import Counter

    import torch

    from cmtool.core.data import load_dataset
    from cmtool.core.images import from_uint8
    from cmtool.core.sources import LazyImages

    data = load_dataset(source, in_memory=False)
    images = data.images
    sizes: Counter[str] = Counter()
    bad: list[str] = []
    means, squares = [], []
    for index in _counted(len(data)):
        try:
            if isinstance(images, LazyImages):
                image = images.image(index)
            else:
                image = images[torch.tensor([index])][0]
        except InputError as error:
            bad.append(error.what)
            continue
        sizes[f"{image.shape[2]}x{image.shape[1]}"] += 1
        x = from_uint8(image)
        means.append(x.mean((1, 2)))
        squares.append(float(x.square().mean()))
    mean = torch.stack(means).double().mean(0) if means else torch.zeros(0)
    variance = sum(squares) / max(len(squares), 1) - float((mean**2).mean() if means else 0)
    classes = None if data.labels is None else torch.bincount(data.labels).tolist()
    facts: dict[str, Any] = {
        "source": source,
        "images": len(data),
        "channels": len(mean),
        "sizes": dict(sizes.most_common()),
        "classes": data.num_classes,
        "images_per_class": classes,
        "mean": [round(m, 4) for m in mean.tolist()],
        "sigma_data": round(max(variance, 0.0) ** 0.5, 4),
        "unreadable": bad,
        "fingerprint": data.fingerprint(),
    }
    if as_json:
        emit_json(facts)
    else:
        _tell(facts)
    if bad:
        raise InputError(f"{len(bad)} of {len(data)} images cannot be read", "replace them")


def _tell(facts: dict[str, Any]) -> None:
    """Print the facts, a line each; long lists by their ends."""
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} ({count})" for name, count in list(value.items())[:10])
        if key == "images_per_class" and value:
            value = f"{min(value)} to {max(value)}"
        if key == "unreadable":
            value = "; ".join(value[:20]) or "none"
        emit(f"{key.replace('_', ' '):<17} {'none' if value is None else value}")


@app.command("prepare")
def prepare(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="DST.zip", help="The archive to write.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square images. Default: as they are.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="edm (crop, Lanczos), adm (box, bicubic, crop), box, or exact.")
    ] = "exact",
    grey: Annotated[bool, typer.Option("--grey", help="One channel.")] = False,
    skip_bad: Annotated[
        int, typer.Option(min=0, help="Leave out up to so many images that cannot be read.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the archive.")] = False,
) -> None:
    """Write the images and classes into a zip as EDM's tool lays it out. Prints its path.

    `cmtool data prepare imagenet/train imagenet64.zip --size 64 --fit adm`

    `cmtool data prepare cifar-10-python.tar.gz cifar10.zip`

    PNG, uncompressed, with the classes in dataset.json: what `--data` streams fastest.
    """
    import os
    import zipfile

    from cmtool.core.data import load_dataset
    from cmtool.core.images import png_bytes
    from cmtool.errors import ResourceError, is_full

    if out.suffix != ".zip":
        raise UserError(f"{out} is not a .zip", "give the archive a name that ends in .zip")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists", "give another name, or --overwrite it")
    if fit != "exact" and size is None:
        raise UserError(f"--fit {fit} without --size", "give the side to fit to")
    make_folder(out.parent)
    data = load_dataset(
        source, size=None if size is None else (size, size), channels=1 if grey else 3, fit=fit,
        in_memory=False,
    )  # fmt: skip
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    labels: list[tuple[str, int]] = []
    written = 0
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for index, image in _readable(data, skip_bad):
                name = f"{written // 1000:05d}/img{written:08d}.png"
                archive.writestr(name, png_bytes(image))
                if data.labels is not None:
                    labels.append((name, int(data.labels[index])))
                written += 1
            table = {"labels": labels if data.labels is not None else None}
            archive.writestr("dataset.json", json.dumps(table))
        temporary.replace(out)
    except OSError as error:
        if is_full(error):
            raise ResourceError(f"no room on the disk for {out}", "free some") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    say(f"{written} images of {image.shape[2]}x{image.shape[1]}")
    emit(str(out))


def _readable(data: Dataset, skip_bad: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, image), leaving out up to `skip_bad` that cannot be read, and naming them."""
    import torch

    skipped = 0
    for index in _counted(len(data)):
        try:
            image = data.images[torch.tensor([index])][0]
        except InputError as error:
            if skipped >= skip_bad:
                raise
            skipped += 1
            say(f"left out: {error.what}")
            continue
        yield index, image


def _counted(count: int) -> Iterator[int]:
    """Yield 0 to count - 1, with a bar on a terminal, a line every tenth in a pipe."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(range(count), console=console, transient=True)
        return
    for index in range(count):
        if index and count >= 1000 and index % (count // 10) == 0:
            say(f"{index} of {count} images")
        yield index
