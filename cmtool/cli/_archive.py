"""Archives of cmtool sample: until one is whole, its images are kept in a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cmtool.cli._output import say
from cmtool.errors import ResourceError, Stopped

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.cli._drawing import Drawing
    from cmtool.data.kept import KeptImages


def write_archive(drawing: Drawing) -> None:
    """Write all images into an archive. Until it is whole they are kept in a file beside it.

    The same command goes on with them. Raises UserError where the file holds other images.
    """
    from cmtool.data.kept import KeptImages

    write = ARCHIVES[Path(drawing.options.out).suffix.lower()]
    options, model, total = drawing.options, drawing.model.preset.model, len(drawing.seeds)
    part, shape = Path(f"{options.out}.part"), (model.channels, *model.image_size)
    kept: list[KeptImages] = []  # of the leading process

    def start() -> int:
        kept.append(KeptImages(part, drawing.key(), shape, options.overwrite))
        return len(kept[0])

    first = drawing.group.agreed(start, "images that are kept")
    if not kept:
        for _ in drawing.everything(first):
            pass
        return
    if first:
        say(f"{first} of {total} images are there already, in {part}")
    done = False
    try:
        with told(lambda: len(kept[0]), total, str(part)):
            write(drawing, kept[0].all(drawing.everything(first)))
        done = True
    finally:
        kept[0].close(done)


@contextmanager
def told(count: Callable[[], int], total: int, where: str) -> Iterator[None]:
    """Let the error of a signal, or of a full disk, say how many images there are and go on."""
    try:
        yield
    except (Stopped, ResourceError) as error:
        if count():
            error.what = f"{error.what}: {count()} of {total} images are there, in {where}"
            go_on = "the same command draws the rest"
            error.hint = f"{error.hint}; then {go_on}" if error.hint else go_on
        raise


def _write_zip(drawing: Drawing, images: Iterator[Tensor]) -> None:
    from cmtool.data.archives import write_zip
    from cmtool.data.drawing import png_bytes

    names = map(image_name, drawing.seeds)
    infos = [{}] * len(drawing.seeds) if drawing.options.no_metadata else drawing.about()
    files = map(png_bytes, images, infos)
    write_zip(Path(drawing.options.out), zip(names, files, drawing.classes(), strict=True))


def _write_npz(drawing: Drawing, images: Iterator[Tensor]) -> None:
    from cmtool.data.archives import write_npz

    classes = None if drawing.labels is None else drawing.classes()
    write_npz(Path(drawing.options.out), images, len(drawing.seeds), classes)


ARCHIVES = {".zip": _write_zip, ".npz": _write_npz}


def image_name(seed: int) -> str:
    """Return the file name of a seed's image."""
    return f"seed{seed:06d}.png"
