"""cmtool edit: zero-shot edits of pictures with a consistency model.

Each edit is a function here, and a row of EDITS. Its docstring is the help text, its parameters
are its own options, and it returns what prepares the edit of a picture.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from typer import Argument, Option

from cmtool.cli._edits import EditOptions, ModelOptions, Prepare, edit_pictures, interpolate_between
from cmtool.cli._options import parse_seeds, with_options
from cmtool.cli._output import say
from cmtool.cli.page import page
from cmtool.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cmtool.models import Model
    from cmtool.prepared import PreparedEdit

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Edit pictures with a consistency model that was never trained for it.

    cmtool edit inpaint face.png --mask m.png > fixed.png

    cmtool edit superres small.png --factor 4 --compare --out both.png

    cat grey.png | cmtool edit colorize --variations 5 > five.png""",
)

Noise = Annotated[
    float,
    Option(
        help="Standard deviation of the noise to remove. Pixels are from -1 to 1: 0.2 is about 25"
        " grey levels."
    ),
]


def inpaint(
    mask: Annotated[
        Path | None,
        Option(help="Mask of the picture's size. Its white, or its hole, is regenerated."),
    ] = None,
    box: Annotated[
        str | None, Option(help="Rectangle as the mask: LEFT,TOP,WIDTH,HEIGHT in pixels.")
    ] = None,
    text: Annotated[str | None, Option(help="Letters as the mask, as large as they fit.")] = None,
) -> Prepare:
    """Regenerate the white part of a mask; every other pixel stays as it is.

    `cmtool edit inpaint face.png --mask mask.png --out mended.png`

    `cat face.png | cmtool edit inpaint --box 16,0,16,32 --seed 3 > mended.png`

    `cmtool edit inpaint face.png --text S --variations 4 --compare > all.png`

    A class-conditional model takes --class. Without it, the model uses the class that explains the
    known pixels best.
    """
    if sum(given is not None for given in (mask, box, text)) != 1:
        what = "edit inpaint needs one option that says which part to regenerate"
        raise UserError(what, "add --mask FILE, --box X,Y,WIDTH,HEIGHT or --text LETTERS")

    def prepare(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
        from cmtool.data.decoding import read_mask
        from cmtool.data.drawing import text_mask
        from cmtool.prepared import prepare_inpaint

        h, w = images.shape[2:]
        if mask is not None:
            white = read_mask(mask)
        else:
            painted = text_mask(text, h, w) if text is not None else box_mask(box or "", h, w)
            white = painted >= 128
        if not white.any():
            say(f"note: nothing in the mask is white (128 to 255): {name} stays as it is")
        return prepare_inpaint(model, images, white[None], fit=fit, name=name)

    return prepare


def superres(
    factor: Annotated[
        int, Option(help="How many times larger. It must divide the model's size.")
    ] = 2,
    noise: Noise = 0.0,
) -> Prepare:
    """Enlarge a picture; the means of the answer's blocks are its pixels.

    `cmtool edit superres small.png --factor 2 --out large.png`

    `cmtool edit superres photo.png --factor 4 --fit tile -c cd_bedroom256_lpips.pt > large.png`

    `cmtool edit superres noisy.png --noise 0.2 --out large.png`

    A picture of the model's own size counts as one that was enlarged by repeating pixels: it is
    sharpened, and the means of its blocks are kept.
    """

    def prepare(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
        from cmtool.prepared import prepare_superres

        most = min(model.preset.model.image_size)
        if factor > most and fit != "exact":  # exact allows fewer, and says which
            what = f"--factor {factor}: the model's pictures have {most} pixels a side"
            raise UserError(what, f"give 2 to {most}")
        return prepare_superres(model, images, factor, noise, fit=fit, name=name)

    return prepare


def colorize() -> Prepare:
    """Give a picture new colours; its luma stays.

    `cmtool edit colorize grey.png --variations 4 --compare --out colours.png`

    A picture in colour loses its colours first.
    """
    from cmtool.prepared import prepare_colorize

    return prepare_colorize


def stroke() -> Prepare:
    """Make a picture of a rough painting.

    `cmtool edit stroke painting.png --out picture.png`

    `cmtool edit stroke painting.png --sigmas 9.7,2.5 --variations 4 > four.png`

    The edit starts from the painting with noise of the first level. A higher level leaves less of
    the painting.
    """
    from cmtool.prepared import prepare_stroke

    return prepare_stroke


def denoise(
    sigma: Annotated[
        float | None,
        Option(
            help="Deviation of the noise. Half of the range is 1, so that 0.2 is 25 grey levels."
            " Default: estimated."
        ),
    ] = None,
) -> Prepare:
    """Take white noise out of a picture, in one network call.

    `cmtool edit denoise noisy.png --sigma 0.25 --out clean.png`

    `cmtool edit denoise scans/*.png --out clean/`
    """  # fmt: skip

    def prepare(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
        from cmtool.prepared import prepare_denoise

        prepared = prepare_denoise(model, images, sigma, fit=fit, name=name)
        if sigma is None and prepared.levels:
            level = prepared.levels[0]
            say(f"{name}: sigma {level:.3g} ({127.5 * level:.0f} grey levels) by estimate")
        return prepared

    return prepare


def deblur(
    gaussian: Annotated[
        float | None, Option("--gaussian", help="The blur is a Gaussian of so many pixels.")
    ] = None,
    motion: Annotated[
        str | None,
        Option(help="The blur is a straight motion: LENGTH,ANGLE, in pixels and degrees."),
    ] = None,
    kernel: Annotated[
        Path | None,
        Option(
            help="Blur kernel: a grey picture of odd width and height, white where the weight is"
            " largest."
        ),
    ] = None,
    noise: Noise = 0.0,
) -> Prepare:
    """Take a known blur out of a picture; what the blur left of it stays.

    `cmtool edit deblur photo.png --gaussian 1.5 --out sharp.png`

    `cmtool edit deblur photo.png --motion 5,30 --out sharp.png`

    The blur wraps around: the left edge continues at the right edge. Pictures with a plain border
    work best.
    """
    if sum(given is not None for given in (gaussian, motion, kernel)) != 1:
        what = "edit deblur needs one option that says what the blur is"
        raise UserError(what, "add --gaussian PIXELS, --motion LENGTH,ANGLE or --kernel FILE")

    def prepare(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
        from cmtool.core.edits import gaussian_kernel
        from cmtool.data.decoding import read_kernel
        from cmtool.prepared import prepare_deblur

        if kernel is not None:
            weights = read_kernel(kernel)
        else:
            weights = motion_of(motion) if motion is not None else gaussian_kernel(gaussian or 0)
        return prepare_deblur(model, images, weights, noise, fit=fit, name=name)

    if gaussian is not None and not 0 < gaussian <= 100:
        raise UserError(f"--gaussian {gaussian:g}", "give pixels: more than 0, at most 100")
    return prepare


def motion_of(motion: str) -> Tensor:
    """Return the kernel of "LENGTH,ANGLE". Raises UserError."""
    from cmtool.core.edits import motion_kernel

    try:
        length, angle = map(float, motion.split(","))
    except ValueError:
        what = f"--motion {motion!r} is not two numbers"
        raise UserError(what, "give LENGTH,ANGLE, for example 5,30") from None
    if not (0 < length <= 1000 and -360 <= angle <= 360):
        what = f"--motion {motion!r} is out of range"
        raise UserError(what, "give 1 to 1000 pixels and -360 to 360 degrees, for example 5,30")
    return motion_kernel(length, angle)


def outpaint(
    by: Annotated[
        str, Option(help="Pixels on every side; or LEFT,TOP,RIGHT,BOTTOM, where 0 is none.")
    ] = "",
) -> Prepare:
    """Make a picture larger by new pixels around it; the picture itself stays.

    `cmtool edit outpaint photo.png --by 8 --out larger.png`

    `cmtool edit outpaint photo.png --by 0,0,16,0 --variations 4 --out four/`

    The larger picture is made in overlapping tiles of the model's size.
    """
    from cmtool.prepared import prepare_outpaint

    hint = "add --by PIXELS or --by LEFT,TOP,RIGHT,BOTTOM, for example --by 8"
    try:
        given = [int(part) for part in by.split(",")]
    except ValueError:
        raise UserError(f"--by {by!r} is not one or four whole numbers", hint) from None
    sides = given * 4 if len(given) == 1 else given
    if len(sides) != 4 or not 0 < max(sides) <= 4096 or min(sides) < 0:
        raise UserError(f"--by {by!r} is not one or four numbers of pixels", hint)
    return partial(prepare_outpaint, margins=(sides[0], sides[1], sides[2], sides[3]))


def variations(
    sigma: Annotated[
        float,
        Option(help="The noise level from which the picture is drawn again: higher changes more."),
    ] = 1.5,
) -> Prepare:
    """Draw other pictures like one: noised to a level, and back.

    `cmtool edit variations photo.png --variations 5 --out five.png`

    `cmtool edit variations photo.png --sigma 5 --seed 3 --out other.png`
    """
    from cmtool.prepared import prepare_variations

    return partial(prepare_variations, sigma=sigma)


def box_mask(box: str, h: int, w: int) -> Tensor:
    """Return the mask (1, h, w) uint8 of "LEFT,TOP,WIDTH,HEIGHT". Raises UserError."""
    import torch

    try:
        left, top, width, height = map(int, box.split(","))
    except ValueError:
        what = f"--box {box!r} is not four whole numbers"
        raise UserError(what, "give LEFT,TOP,WIDTH,HEIGHT, for example 4,0,4,8") from None
    if not (0 <= left < left + width <= w and 0 <= top < top + height <= h):
        raise UserError(
            f"--box {box} is not within {w}x{h}", "give LEFT,TOP,WIDTH,HEIGHT in pixels"
        )
    mask = torch.zeros(1, h, w, dtype=torch.uint8)
    mask[:, top : top + height, left : left + width] = 255
    return mask


class EditRow(NamedTuple):
    """An edit of single pictures, and the shared options that it has no use for."""

    prepare: Callable[..., Prepare]
    without: tuple[str, ...] = ()


EDITS: dict[str, EditRow] = {
    "inpaint": EditRow(inpaint),
    "superres": EditRow(superres),
    "colorize": EditRow(colorize),
    "stroke": EditRow(stroke),
    "denoise": EditRow(denoise, without=("steps", "sigmas", "variations")),
    "deblur": EditRow(deblur),
    "outpaint": EditRow(outpaint, without=("fit",)),
    "variations": EditRow(variations, without=("steps", "sigmas")),
}

for _name, _row in EDITS.items():
    _run = partial(edit_pictures, _name, _row.prepare)
    app.command(_name)(with_options(_run, EditOptions, _row.prepare, _row.without))


def interpolate(
    options: ModelOptions,
    images: Annotated[
        list[str] | None, Argument(help="Two pictures; or none, and --seeds.")
    ] = None,
    seeds: Annotated[str | None, Option(help="Two seeds: 3,7.")] = None,
    frames: Annotated[int, Option(min=2, help="Pictures on the way, both ends included.")] = 8,
    seed: Annotated[
        int, Option(min=0, help="Seed of the noise under which pictures are mixed.")
    ] = 0,
    out: Annotated[
        str,
        Option(
            "--out",
            "-o",
            help="A .png strip, an animated .gif or .webp, a folder, or - for the strip on stdout.",
        ),
    ] = "-",
) -> None:
    """Go from one picture to another, or from one seed to another.

    `cmtool edit interpolate --seeds 3,7 --frames 12 --out strip.png`

    `cmtool edit interpolate --seeds 3,7 --frames 48 --out morph.gif`

    `cmtool edit interpolate a.png b.png --sigmas 5.1,2.5 > strip.png`

    Between seeds the noise travels a great circle. Pictures are mixed under noise of the first
    level: a high level mixes what they show, a low level mixes their pixels.
    """  # fmt: skip
    given, ends = images or [], parse_seeds(seeds) if seeds is not None else []
    if (len(given), len(ends)) not in ((2, 0), (0, 2)):
        what = f"{len(given)} pictures and {len(ends)} seeds"
        raise UserError(what, "give two of one of them")
    interpolate_between(options, given, ends, frames, seed, out)


app.command("interpolate")(with_options(interpolate, ModelOptions))
app.command("page")(page)
