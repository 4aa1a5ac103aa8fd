"""cmtool data: say what a set of images holds, or pack one into an archive that trains fast."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from cmtool.cli._options import AsJson, LabelRule
from cmtool.cli._output import emit, emit_json, make_folder, say
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cmtool.data.datasets import Dataset

ALL = 1 << 60
"""More images than there can be."""
T = TypeVar("T")
app = typer.Typer(no_args_is_help=True, help="Inspect a set of images, or prepare one.")

Source = Annotated[
    str,
    Argument(
        metavar="SRC",
        help="Folder, zip, npz, tar, parquet, datasets folder, CIFAR-10 archive, LSUN database, or"
        " digits. FOLDER:train is one split of its archives.",
    ),
]
ColumnName = Annotated[
    str,
    Option(
        "--column", show_default=False,
        help="Column of the images, where a table has several. In training: --set data.column.",
    ),
]  # fmt: skip


@app.command("info")
def info(
    source: Source, labels: LabelRule = "auto", column: ColumnName = "", as_json: AsJson = False
) -> None:
    """Print what a set holds: number, sizes, modes, classes and mean of its images, and bad files.

    `cmtool data info images/`

    `cmtool data info shards/ --labels prefix`

    `cmtool data info cifar-10-python.tar.gz --json`

    The exit code is 3 if some images cannot be read; all of them are named.
    """
    import torch

    from cmtool.data.datasets import load_dataset
    from cmtool.data.decoding import WITH_ALPHA
    from cmtool.data.survey import Survey, surveys

    data = load_dataset(source, in_memory=False, labels=labels, column=column)
    _tell(data)
    found = Survey()
    for part in _with_progress(surveys(data, _workers(len(data))), len(data)):
        found.add(part)
    mean = found.mean / found.good if isinstance(found.mean, torch.Tensor) else torch.zeros(0)
    facts: dict[str, Any] = {
        "source": source,
        "images": len(data),
        "channels": len(mean),
        "sizes": dict(found.sizes.most_common()),
        "modes": dict(found.modes.most_common()),
        "background": "white" if found.modes.keys() & {*WITH_ALPHA} else None,
        "classes": data.num_classes,
        "class_names": list(data.class_names) or None,
        "images_per_class": None if data.labels is None else _per_class(data),
        "mean": [round(m, 4) for m in mean.tolist()],
        "sigma_data": round(found.sigma_data, 4),
        "unreadable": found.bad,
        "fingerprint": data.fingerprint(),
    }
    if facts["background"]:
        say("note: transparent parts are laid on white; --set data.background=black changes it")
    if as_json:
        emit_json(facts)
    else:
        _print_facts(facts)
    if bad := len(found.bad):
        command = f"cmtool data prepare {shlex.quote(source)} readable.zip --skip-bad"
        command += f" --labels {shlex.quote(labels)}" * (labels != "auto")
        command += f" --column {shlex.quote(column)}" * bool(column)
        hint = f"replace them, or leave them out: {command}"
        raise InputError(f"{bad} of {len(data)} images cannot be read", hint)


def _per_class(data: Dataset) -> list[int]:
    import torch

    assert data.labels is not None
    counts: list[int] = torch.bincount(data.labels, minlength=data.num_classes).tolist()
    return counts


def _tell(data: Dataset) -> None:
    for note in data.notes:
        say(f"note: {note}")


def _print_facts(facts: dict[str, Any]) -> None:
    """Print the facts, a line each; of long lists only the ends."""
    from cmtool.system.text import printable

    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} ({count})" for name, count in list(value.items())[:10])
        if key == "images_per_class" and value:
            value = f"{min(value)} to {max(value)}"
        if key == "class_names" and value:
            value = ", ".join(map(printable, value[:20])) + ", ..." * (len(value) > 20)
        if key == "unreadable":
            value = "; ".join(map(printable, value[:20])) or "none"
        emit(f"{key.replace('_', ' '):<17} {'none' if value is None else value}")


class SkipsBad(TyperCommand):
    """A command whose --skip-bad needs no number: without one, all may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return what is left of the arguments after they were read."""
        for at, (word, value) in enumerate(zip(args, [*args[1:], ""], strict=False)):
            if word == "--skip-bad" and not value.lstrip("-").isdecimal():
                args[at] = f"{word}={ALL}"
        return super().parse_args(ctx, args)


@app.command("prepare", cls=SkipsBad)
def prepare(
    source: Source,
    out: Annotated[Path, Argument(metavar="DST.zip", help="The archive to write.")],
    size: Annotated[
        int | None, Option(min=1, help="Side of the square images in pixels. Default: unchanged.")
    ] = None,
    fit: Annotated[
        str,
        Option(
            help="How to bring images to --size: edm (crop, Lanczos), adm (box, bicubic, crop),"
            " box, or exact, which refuses other sizes."
        ),
    ] = "exact",
    background: Annotated[
        str, Option(help="Colour under transparent parts: a name, or #rrggbb.")
    ] = "white",
    grey: Annotated[bool, Option("--grey", help="Write images of one channel.")] = False,
    skip_bad: Annotated[
        int,
        Option(
            min=0,
            metavar="[N]",
            show_default=False,
            help="Leave out images that cannot be read: all of them, or at most N.",
        ),
    ] = 0,
    labels: LabelRule = "auto",
    column: ColumnName = "",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the archive.")] = False,
) -> None:
    """Write images and classes into a zip in the layout of EDM's tool. Prints its path.

    `cmtool data prepare imagenet/train imagenet64.zip --size 64 --fit adm`

    `cmtool data prepare cifar-10-python.tar.gz cifar10.zip`

    `cmtool data prepare photos/ photos.zip --size 64 --fit adm --skip-bad`

    The zip holds uncompressed PNG files, and the classes in dataset.json. Training reads it
    fastest.
    """
    from cmtool.data.archives import write_zip
    from cmtool.data.datasets import load_dataset

    if fit != "exact" and size is None:
        raise UserError(f"--fit {fit} without --size", "give the side to fit to")
    _make_place(out, overwrite=overwrite)
    data = load_dataset(
        source, size=None if size is None else (size, size), channels=1 if grey else 3, fit=fit,
        background=background, in_memory=False, labels=labels, column=column,
    )  # fmt: skip
    _tell(data)
    classes = [None] * len(data) if data.labels is None else data.labels.tolist()
    pictures = (
        (f"{number // 1000:05d}/img{number:08d}.png", content, classes[index])
        for number, (index, content) in enumerate(_readable(data, skip_bad))
    )
    count = write_zip(out, pictures)
    say(f"{count} images of {data.images.shape[3]}x{data.images.shape[2]}")
    emit(str(out))


def _make_place(out: Path, *, overwrite: bool) -> None:
    """Make the folder of an archive that is to be written. Raises UserError for a bad name."""
    if out.suffix != ".zip":
        raise UserError(f"{out} is not a .zip", "give the archive a name that ends in .zip")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists", "give another name, or --overwrite")
    make_folder(out.parent)


def _readable(data: Dataset, skip_bad: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, PNG); leave out, and name, up to `skip_bad` images that cannot be used."""
    from cmtool.data.survey import pngs

    skipped = 0
    parts = _with_progress(pngs(data, _workers(len(data))), len(data))
    for index, content in enumerate(content for part in parts for content in part):
        if not isinstance(content, InputError):
            yield index, content
        elif skipped < skip_bad:
            skipped += 1
            say(f"left out: {content.what}")
        else:
            content.hint = f"{content.hint}. To leave such images out, add --skip-bad"
            raise content
    if skipped == len(data):
        raise InputError(f"none of the images of {data.name} can be read", "give other images")


def _workers(count: int) -> int:
    """Return how many processes decode: none for few images, where starting them takes longer."""
    return 0 if count < 1000 else min(os.cpu_count() or 1, 16)


def _with_progress(parts: Iterator[T], count: int) -> Iterator[T]:
    """Yield the parts; show a bar on a terminal, and in a pipe a line every tenth."""
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
