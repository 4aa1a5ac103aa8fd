"""cmtool data: what a set of images holds, and to one archive that trains fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cmtool.cli._options import AsJson
from cmtool.cli._output import emit, emit_json, make_folder, say
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cmtool.data.datasets import Dataset

T = TypeVar("T")
app = typer.Typer(no_args_is_help=True, help="Look into a set of images, or prepare one.")

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Folder, zip, npz, CIFAR-10 tarball, LSUN database, or digits."
    ),
]


@app.command("info")
def info(source: Source, as_json: AsJson = False) -> None:
    """Say what a set holds: count, sizes, modes, classes, mean, and which cannot be read.

    `cmtool data info images/`

    `cmtool data info cifar-10-python.tar.gz --json`

    Exits with 3 if some images cannot be read; it names them all.
    """
    import torch

    from cmtool.data.datasets import load_dataset
    from cmtool.data.survey import Survey, surveys

    data = load_dataset(source, in_memory=False)
    found = Survey()
    for part in _told(surveys(data, _workers(len(data))), len(data)):
        found.add(part)
    mean = found.mean / found.good if isinstance(found.mean, torch.Tensor) else torch.zeros(0)
    variance = found.square / max(found.good, 1) - float(mean.square().mean() if len(mean) else 0)
    facts: dict[str, Any] = {
        "source": source,
        "images": len(data),
        "channels": len(mean),
        "sizes": dict(found.sizes.most_common()),
        "modes": dict(found.modes.most_common()),
        "classes": data.num_classes,
        "images_per_class": None if data.labels is None else torch.bincount(data.labels).tolist(),
        "mean": [round(m, 4) for m in mean.tolist()],
        "sigma_data": round(max(variance, 0.0) ** 0.5, 4),
        "unreadable": found.bad,
        "fingerprint": data.fingerprint(),
    }
    if as_json:
        emit_json(facts)
    else:
        _tell(facts)
    if found.bad:
        raise InputError(
            f"{len(found.bad)} of {len(data)} images cannot be read",
            "replace them, or leave them out: cmtool data prepare --skip-bad",
        )


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
    from cmtool.data.archives import write_zip
    from cmtool.data.datasets import load_dataset

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
    classes = [None] * len(data) if data.labels is None else data.labels.tolist()
    pictures = (
        (f"{number // 1000:05d}/img{number:08d}.png", content, classes[index])
        for number, (index, content) in enumerate(_readable(data, skip_bad))
    )
    count = write_zip(out, pictures)
    h, w = data.images.shape[2:]
    say(f"{count} images of {w}x{h}")
    emit(str(out))


def _readable(data: Dataset, skip_bad: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, PNG), leaving out up to `skip_bad` that cannot be used, and naming them."""
    from cmtool.data.survey import pngs

    skipped = 0
    parts = _told(pngs(data, _workers(len(data))), len(data))
    for index, content in enumerate(content for part in parts for content in part):
        if not isinstance(content, InputError):
            yield index, content
        elif skipped < skip_bad:
            skipped += 1
            say(f"left out: {content.what}")
        else:
            raise content
    if skipped == len(data):
        raise InputError(f"none of the images of {data.name} can be read", "give others")


def _workers(count: int) -> int:
    """Return how many processes decode: none where starting them takes longer."""
    import os

    return 0 if count < 1000 else min(os.cpu_count() or 1, 16)


def _told(parts: Iterator[T], count: int) -> Iterator[T]:
    """Yield the parts, with a bar on a terminal, a line every tenth in a pipe."""
    from rich.console import Console
    from rich.progress import track

    from cmtool.data.survey import PART

    console = Console(stderr=True)
    total = -(-count // PART)
    if console.is_terminal:
        yield from track(parts, total=total, console=console, transient=True)
        return
    for number, part in enumerate(parts, 1):
        if count >= 1000 and number % max(total // 10, 1) == 0:
            say(f"{min(number * PART, count)} of {count} images")
        yield part
