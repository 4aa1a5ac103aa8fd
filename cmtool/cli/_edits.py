"""What the edit commands share: pictures in, one edit of each, pictures out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cmtool.cli._options import (
    check_class,
    parse_sigmas,
    pick_device,
    pick_model,
    pick_precision,
    precision_info,
)
from cmtool.cli._output import (
    check_free,
    emit,
    emit_bytes,
    is_one_file,
    make_folder,
    refuse_terminal,
    say,
)
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.editing import Job
    from cmtool.models import Model


class Common(NamedTuple):
    """What every edit of pictures is told."""

    images: list[str] | None
    checkpoint: str | None
    steps: int | None
    sigmas: str | None
    class_: int | None
    seed: int
    variations: int
    fit: str
    compare: bool
    out: str
    overwrite: bool
    no_metadata: bool
    weights: str
    preset: str | None
    device: str
    precision: str


MakeJob = Callable[["Tensor", "Model", str], "Job"]
"""`(picture, model, name) -> Job`."""


def edit_all(name: str, make_job: MakeJob, common: Common) -> None:
    """Run one edit on every picture; everything is checked before the first is made."""
    levels = parse_sigmas(common.sigmas)
    sources = common.images or ["-"]
    contents = {source: read_input(source) for source in sources}
    target = target_of(common.out, common.overwrite, (".png",))
    if len(sources) > 1 and is_one_file(common.out):
        raise UserError(f"{len(sources)} pictures and --out {common.out}", "give a folder")
    seeds = [common.seed + i for i in range(common.variations)]
    names = {source: _names(source, len(seeds)) for source in sources}
    every = [n for group in names.values() for n in group]
    if len(set(every)) < len(every):
        raise UserError("two pictures of one name", "their answers would be one file: rename one")

    from cmtool.data.images import read_image
    from cmtool.editing import do
    from cmtool.sampling import edit_plan

    where = pick_device(common.device)
    precision = pick_precision(common.precision, where)
    pictures = {s: read_image(c, _shown(s)) for s, c in contents.items()}
    model = pick_model(
        common.checkpoint, common.weights, where, kind="consistency", preset=common.preset
    )
    check_class(common.class_, model.preset.model.num_classes)
    if model.preset.model.channels == 1:
        pictures = {s: read_image(c, _shown(s), mode="L") for s, c in contents.items()}
    jobs = {
        source: make_job(picture, model, _shown(source)) for source, picture in pictures.items()
    }
    if target is not None and not is_one_file(common.out):
        for group in names.values():
            for file in group:
                check_free(target / file, common.overwrite)
    for source, job in jobs.items():
        chosen = edit_plan(model.preset, steps=common.steps, sigmas=levels, default=job.levels)
        chosen = chosen._replace(precision=precision)
        answers, label = do(job, model, chosen, seeds, common.class_)
        if label is not None and common.class_ is None:
            say(f"{_shown(source)}: class {label} fits best; choose with --class")
        about = {} if common.no_metadata else {
            "cmtool:edit": name, "cmtool:model": model.sha256, "cmtool:weights": model.weights,
            "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)), "cmtool:seed": str(common.seed),
            **precision_info(chosen),
        }  # fmt: skip
        if label is not None and about:
            about["cmtool:class"] = str(label)
        before = [panel[0] for panel in job.panels] if common.compare else []
        write_answers(
            common.out, target, names[source], list(answers), about, common.overwrite, before
        )


def box_mask(box: str, h: int, w: int) -> Tensor:
    """Return the mask (1, h, w) uint8 of "LEFT,TOP,WIDTH,HEIGHT". Raises UserError."""
    import torch

    try:
        left, top, width, height = map(int, box.split(","))
    except ValueError:
        raise UserError(f"--box {box!r}", "LEFT,TOP,WIDTH,HEIGHT, for example 4,0,4,8") from None
    inside = 0 <= left < left + width <= w and 0 <= top < top + height <= h
    if not inside:
        raise UserError(f"--box {box} is not within {w}x{h}", "LEFT,TOP,WIDTH,HEIGHT in pixels")
    mask = torch.zeros(1, h, w, dtype=torch.uint8)
    mask[:, top : top + height, left : left + width] = 255
    return mask


def read_input(image: str) -> bytes:
    """Return the bytes of the picture. Raises InputError when there are none."""
    if image != "-":
        path = Path(image)
        if not path.is_file():
            raise InputError(f"no such image: {image}", "check the path")
        return path.read_bytes()
    if sys.stdin.isatty():
        raise UserError("no image given", "name a file, or pipe one in")
    content = sys.stdin.buffer.read()
    if not content:
        raise InputError("nothing on stdin", "pipe an image in, or name a file")
    return content


def _shown(source: str) -> str:
    return "the image on stdin" if source == "-" else source


def _names(source: str, answers: int) -> list[str]:
    """Return the file names of a picture's answers in a folder."""
    stem = "edited" if source == "-" else Path(source).stem
    return [f"{stem}.png"] if answers == 1 else [f"{stem}-{i}.png" for i in range(answers)]


def target_of(out: str, overwrite: bool, endings: tuple[str, ...]) -> Path | None:
    """Return where answers go, None for stdout; it is there, and may be written to."""
    if out == "-":
        refuse_terminal()
        return None
    target = Path(out)
    suffix = target.suffix.lower()
    if suffix in endings:
        check_free(target, overwrite)
        make_folder(target.parent)
    elif suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"):
        raise UserError(f"--out {out}", f"give a folder, or a file ending in {', '.join(endings)}")
    else:
        make_folder(target)
    return target


def write_answers(
    out: str,
    target: Path | None,
    names: list[str],
    answers: list[Tensor],
    about: dict[str, str],
    overwrite: bool,
    before: list[Tensor] | None = None,
) -> None:
    """Write answers (C, H, W) uint8 beside each other, or into a folder a file each.

    The pictures `before` stand to the left of the answers. Prints what was written.
    """
    from cmtool.data.images import png_bytes, row
    from cmtool.system.files import write_atomic

    if is_one_file(out):
        content = png_bytes(row([*(before or []), *answers]), about)
        if target is None:
            emit_bytes(content)
        else:
            write_atomic(target, content)
            emit(out)
        return
    assert target is not None
    for name, answer in zip(names, answers, strict=True):
        check_free(target / name, overwrite)
        write_atomic(target / name, png_bytes(row([*(before or []), answer]), about))
        emit(str(target / name))
