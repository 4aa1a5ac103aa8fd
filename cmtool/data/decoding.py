"""Image files: how they are recognised, bounded and decoded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cmtool.data.images import tensor_of
from cmtool.errors import InputError
from cmtool.system.files import read_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000
MAX_FILE = 256 << 20
"""Bytes that the file of an image may have."""
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a damaged file."""
T = TypeVar("T")


def read_image(source: Path | bytes, name: str = "", mode: str = "RGB") -> Tensor:
    """Return one image file as (C, H, W) uint8, in RGB or (mode "L") grey.

    EXIF rotation is applied, transparent parts become white, 16-bit grey is scaled to 8 bits.
    Raises InputError naming a file that is missing, not an image, truncated, or over 64 megapixels.
    """
    return _use_image(source, name, lambda image: tensor_of(_flat(_upright(image), mode)))


def read_mask(path: Path) -> Tensor:
    """Return a mask (1, H, W) bool of a picture: True where the picture is white.

    A picture with transparent parts is one of two: white paint on nothing, where the mask is the
    paint, or any other picture with holes, where the mask is the holes. Raises InputError as
    `read_image` does, and where black and white paint on nothing may mean either.
    """

    def mask(image: Image.Image) -> Tensor:
        image = _upright(image)
        white = tensor_of(_flat(image, "L")) >= 128
        if not image.has_transparency_data:
            return white
        rgba = tensor_of(image.convert("RGBA"))
        opaque = rgba[3:] >= 128
        paint = rgba[:3, opaque[0]]
        is_light, is_dark = paint > 239, paint < 16
        if bool(opaque.all()):
            return white
        if bool((is_light | is_dark).all()) and bool(is_light.any()):
            if bool(is_light.all()):
                return opaque
            hint = "save it without transparency: white is regenerated, black is kept"
            raise InputError(f"the mask {path} has black, white and transparent parts", hint)
        return ~opaque

    return _use_image(path, "", mask)


def image_mode(source: Path | bytes, name: str = "") -> str:
    """Return how an image file stores its pixels: RGB, L, P, CMYK, I;16 ..., "rotated" by EXIF."""
    return _use_image(
        source, name, lambda image: image.mode + " rotated" * (_orientation(image) in TURNS)
    )


def _use_image(source: Path | bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    shown = name or str(source if isinstance(source, Path) else "the image on stdin")
    if isinstance(source, Path) and not source.exists():
        raise InputError(f"no such image: {shown}", "check the path")
    content = source if isinstance(source, bytes) else read_regular(source, MAX_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large sizes are refused here; odd EXIF does no harm
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    what = f"{shown} has {image.width}x{image.height} pixels"
                    raise InputError(what, "the limit is 64 million")
                return use(image)
    except UnidentifiedImageError:
        hint = f"use one of {', '.join(FORMATS)}"
        raise InputError(f"{shown} is not an image cmtool reads", hint) from None
    except DAMAGE as error:
        raise InputError(f"{shown} cannot be decoded: {error}", "replace the file") from None


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(0x0112, 1))


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to make an image upright, by EXIF's orientation."""


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF data say. Raises ValueError for an animation.

    A phone's picture may hold others beside itself, such as a map of depths: they are left out.
    """
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames: give a single picture")
    image.load()
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Return the image without alpha or palette, 8 bits a channel, in `mode`."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range")
    if image.mode.startswith("I"):  # Pillow clips 16-bit grey to white when asked for RGB
        levels = np.asarray(image, np.float64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray((levels / 257).round().astype(np.uint8)).convert(mode)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB").convert(mode)
    return image.convert(mode)


def png_info(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for a file that is not one."""
    try:
        content = io.BytesIO(read_regular(path, MAX_FILE))
        with Image.open(content, formats=("PNG",)) as opened:
            return {str(k): str(v) for k, v in opened.info.items() if isinstance(v, str)}
    except (InputError, *DAMAGE):
        return {}
