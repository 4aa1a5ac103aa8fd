"""cmtool edit: zero-shot edits of a picture with a consistency model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli._options import (
    Checkpoint,
    ClassIndex,
    Device,
    ModelPreset,
    Sigmas,
    Steps,
    Weights,
    check_class,
    emit,
    emit_bytes,
    make_folder,
    parse_sigmas,
    pick_device,
    pick_model,
    say,
)
from cmtool.errors import InputError, UserError

app = typer.Typer(no_args_is_help=True, help="Edit a picture; the model was never trained to.")

STEPS = 10


@app.callback()
def _group() -> None:
    pass


@app.command("inpaint")
def inpaint(
    mask: Annotated[Path, typer.Option(help="Mask of the image's size: white is regenerated.")],
    image: Annotated[
        str, typer.Argument(help="The picture; - or nothing in a pipe is stdin.")
    ] = "-",
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another answer.")] = 0,
    out: Annotated[str, typer.Option("--out", "-o", help="A file, or - for stdout.")] = "-",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
) -> None:
    """Regenerate the white part of a mask; every other pixel stays as it is.

    `cmtool edit inpaint digit.png --mask mask.png --out mended.png`

    `cat digit.png | cmtool edit inpaint --mask mask.png --seed 3 > mended.png`

    A class-conditional model takes --class; without it, the class that explains the known pixels
    best is used.
    """
    levels = parse_sigmas(sigmas)
    content = _read_input(image)
    if out == "-" and sys.stdout.isatty():
        raise UserError("a picture would go to the terminal", "use --out FILE, or a pipe")
    if out != "-":
        if Path(out).exists() and not overwrite:
            raise UserError(f"{out} exists", "give another --out, or --overwrite it")
        make_folder(Path(out).parent)

    from cmtool.core import edits
    from cmtool.core.checkpoint import write_atomic
    from cmtool.core.images import from_uint8, png_bytes, read_image, to_uint8
    from cmtool.sampling import best_class, plan, run_edit

    picture = read_image(content, "the image on stdin" if image == "-" else image)
    known = read_image(mask, mode="L")[None] < 128
    where = pick_device(device)
    edit = edits.inpaint(from_uint8(picture)[None].to(where), known.to(where))
    model = pick_model(checkpoint, weights, where, kind="consistency", preset=preset)
    check_class(class_, model.preset.model.num_classes)
    if picture.shape[-2:] != model.preset.model.image_size:
        h, w = model.preset.model.image_size
        raise InputError(
            f"the image is {picture.shape[-1]}x{picture.shape[-2]}, the model makes {w}x{h}",
            f"resize the image and the mask to {w}x{h}",
        )
    chosen = plan(
        model.preset, steps=steps or (None if levels is not None else STEPS), sigmas=levels
    )
    if class_ is None and model.preset.model.num_classes:
        class_ = best_class(model, edit, chosen, seed)
        say(f"class {class_}: fits the known pixels best; choose with --class")
    result = to_uint8(run_edit(model, edit, chosen, seed, class_))[0].cpu()
    if out == "-":
        emit_bytes(png_bytes(result))
    else:
        write_atomic(Path(out), png_bytes(result))
        emit(out)


def _read_input(image: str) -> bytes:
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
