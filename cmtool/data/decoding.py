"""Image files: how they are recognised, bounded and decoded."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from cmtool.data.images import tensor_of
from cmtool.data.parts import check_parts
from cmtool.errors import InputError, UserError
from cmtool.system.files import read_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000
MAX_FILE = 256 << 20
"""Bytes that the file of an image may have."""
MAX_DECODED = 3 * MAX_PIXELS
"""Bytes that the pixels of an image may take: 64 million in RGB, 48 million in RGBA."""
MAX_RUNS = 4_000_000
"""Numbers in a BMP of run lengths or a PPM of text, which Pillow decodes in Python."""
MAX_EXIF = 4 << 20
"""Bytes of EXIF. Pillow makes an object of each number in it."""
STRIP = 1 << 20
"""Pixels that are converted at a time: a whole copy in each mode would take gigabytes."""
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    AttributeError, AssertionError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for a damaged file."""
WITH_ALPHA = ("RGBA", "LA", "PA")
WHITE = "white"
"""What lies under transparent parts, unless a preset says another colour."""
T = TypeVar("T")
Turn = Callable[[Tensor], Tensor]


def read_image(
    source: Path | bytes, name: str = "", mode: str = "RGB", background: str = WHITE
) -> Tensor:
    """Return one image file as (C, H, W) uint8, in RGB or (mode "L") grey.

    EXIF rotation is applied, alpha is laid on the `background`, 16-bit grey is scaled to 8 bits.
    Raises InputError naming a file that is missing, not an image, truncated, or over 64 megapixels.
    """
    pixels, turn = _use_image(source, name, lambda image: _read(image, mode, background))
    return turn(pixels).contiguous()  # here, where Pillow's copy is gone


def check_background(colour: str) -> None:
    """Raise UserError unless Pillow knows the colour, and nothing shines through it."""
    try:
        known = len(ImageColor.getrgb(colour)) == 3
    except ValueError:
        known = False
    if not known:
        hint = "give a colour such as white, black, grey or #ffeedd"
        raise UserError(f"{colour!r} is no colour", hint)


def read_mask(path: Path) -> Tensor:
    """Return a mask (1, H, W) bool of a picture: True where the picture is white.

    A picture with transparent parts is one of two: white paint on nothing, where the mask is the
    paint, or any other picture with holes, where the mask is the holes. Raises InputError as
    `read_image` does, and where black and white paint on nothing may mean either.
    """

    def mask(image: Image.Image) -> tuple[Tensor, Turn]:
        grey, turn = _read(image, "L", WHITE)
        white = grey >= 128
        if not image.has_transparency_data:
            return white, turn
        rgba = _by_strips(image, "RGBA", lambda strip: strip.convert("RGBA"))
        opaque = rgba[3:] >= 128
        paint = rgba[:3, opaque[0]]
        is_light, is_dark = paint > 239, paint < 16
        if bool(opaque.all()):
            return white, turn
        if bool((is_light | is_dark).all()) and bool(is_light.any()):
            if bool(is_light.all()):
                return opaque, turn
            hint = "save it without transparency: white is regenerated, black is kept"
            raise InputError(f"the mask {path} has black, white and transparent parts", hint)
        return ~opaque, turn

    found, turn = _use_image(path, "", mask)
    return turn(found).contiguous()


def read_kernel(path: Path) -> Tensor:
    """Return the kernel (h, w) float64 of a blur, a grey picture of odd sides, of sum 1.

    Raises InputError as `read_image` does, and for a picture that is no kernel.
    """
    weights = read_image(path, mode="L", background="black")[0].double()
    h, w = weights.shape
    if not (h % 2 and w % 2 and weights.any()):
        what = f"{path} is no kernel of a blur"
        raise InputError(what, "give a picture of odd width and height, white on black")
    return weights / weights.sum()


def image_mode(source: Path | bytes, name: str = "") -> str:
    """Return how an image file stores its pixels: RGB, L, P, CMYK, I;16 ..., "rotated" by EXIF."""
    return _use_image(
        source, name, lambda image: image.mode + " rotated" * (_orientation(image) > 1)
    )


def _use_image(source: Path | bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    shown = name or str(source if isinstance(source, Path) else "the image on stdin")
    if isinstance(source, Path) and not source.exists():
        raise InputError(f"no such image: {shown}", "check the path")
    content = source if isinstance(source, bytes) else read_regular(source, MAX_FILE)
    try:
        check_parts(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large sizes are refused here; odd EXIF does no harm
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, shown)
                return use(image)
    except UnidentifiedImageError:
        hint = f"use one of {', '.join(FORMATS)}"
        raise InputError(f"{shown} is not an image cmtool reads", hint) from None
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{shown} cannot be decoded: {reason}", "replace the file") from None


def _check_size(image: Image.Image, shown: str) -> None:
    """Raise InputError for an image of more pixels, or bytes of pixels, than cmtool decodes."""
    w, h = image.size
    decoders = {tile[0] for tile in getattr(image, "tile", ())}
    is_slow = bool(decoders & {"bmp_rle", "ppm_plain"})
    most = MAX_RUNS // len(image.getbands()) if is_slow else MAX_PIXELS
    if w * h > most:
        what = f"{shown} has {w}x{h} pixels"
        raise InputError(what, f"the limit is {most:,}: make it smaller, or save it as PNG")
    tags = getattr(image, "tag_v2", {})
    sides = [side for side in map(tags.get, TILE) if type(side) is int]
    area = max(w * h, math.prod(sides) if len(sides) == 2 else 0)
    each = len(image.getbands()) * {"I": 4, "F": 4}.get(image.mode, 2 if ";16" in image.mode else 1)
    if image.format == "WEBP":
        each = WEBP_BYTES
    if area * each > MAX_DECODED:
        what = f"{shown}, {w}x{h} pixels of {each} bytes, takes {area * each:,} bytes to decode"
        raise InputError(what, f"the limit is {MAX_DECODED:,}: make it smaller, or save it as RGB")


TILE = (322, 323)
"""TIFF's tags of the sides of a tile, which is decoded whole, however small the image."""
WEBP_BYTES = 8
"""A pixel of WebP while it is decoded: two canvases of RGBA."""


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation of an image, 1 to 8; 1 where it says none of them."""
    if (size := len(image.info.get("exif", b""))) > MAX_EXIF:
        raise ValueError(f"its EXIF has {size:,} bytes")
    said = image.getexif().get(0x0112, 1)  # any number, or several
    return next((number for number in TURNS if number == said), 1)


TURNS: dict[int, Turn] = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}
"""How to make an image (C, H, W) upright, by EXIF's orientation."""


def _read(image: Image.Image, mode: str, background: str) -> tuple[Tensor, Turn]:
    """Return an image (C, H, W) as it is stored, and how to turn it. Raises ValueError for several.

    A phone's picture may hold others beside itself, such as a map of depths: they are left out.
    """
    if image.format != "MPO" and (frames := _frames(image)) > 1:
        raise ValueError(f"it has {frames} frames: give a single picture")
    pixels = _by_strips(image, mode, lambda strip: _flat(strip, mode, image, background))
    return pixels, TURNS[_orientation(image)]


def _frames(image: Image.Image) -> int:
    """Return the number of frames of an image, 2 for any more in a TIFF: it does not say it."""
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    return 2 if getattr(image, "is_animated", False) else 1


def _by_strips(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Tensor:
    """Return what `convert` makes of an image, pixel by pixel, as (C, H, W) uint8."""
    image.load()
    w, h = image.size
    pixels = torch.empty(len(mode), h, w, dtype=torch.uint8)
    rows = max(STRIP // max(w, 1), 1)
    for top in range(0, h, rows):
        strip = image.crop((0, top, w, min(top + rows, h)))
        pixels[:, top : top + rows] = tensor_of(convert(strip))
    return pixels


def _flat(strip: Image.Image, mode: str, image: Image.Image, background: str) -> Image.Image:
    """Return a strip of the image without alpha or palette, 8 bits a channel, in `mode`."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range")
    if image.mode.startswith("I"):
        return _eight_bits(strip, image).convert(mode)
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        rgba = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
        return strip.convert("RGB").convert(mode)
    return strip.convert(mode)


def _eight_bits(strip: Image.Image, image: Image.Image) -> Image.Image:
    """Return grey of up to 16 bits as 8 bits, which Pillow clips to white, or leaves black."""
    if image.mode == "I" and image.format == "TIFF":
        raise ValueError("its pixels have more than 16 bits or a sign: their range is not known")
    tags = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    levels = np.asarray(strip, np.float64)
    if levels.min() < 0 or levels.max() > top:
        raise ValueError(f"its pixels are beyond 0 to {top:,}")
    if tags.get(TIFF_WHITE) == 0:  # Pillow inverts 8 bits only
        levels = top - levels
    return Image.fromarray((levels / (top / 255)).round().astype(np.uint8))


TIFF_BITS, TIFF_WHITE = 258, 262
"""TIFF's tags of the bits of a pixel, and of the meaning of 0: 0 is white, 1 is black."""


def png_info(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for a file that is not one."""
    try:
        content = io.BytesIO(read_regular(path, MAX_FILE))
        with Image.open(content, formats=("PNG",)) as opened:
            return {str(k): str(v) for k, v in opened.info.items() if isinstance(v, str)}
    except (InputError, *DAMAGE):
        return {}
