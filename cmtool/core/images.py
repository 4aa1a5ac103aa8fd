"""Image files and uint8. The only importer of Pillow; everything else sees floats in [-1, 1]."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from cmtool.errors import InputError, UserError, nearest

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000


def to_uint8(images: Tensor) -> Tensor:
    """Return images (..., C, H, W) in [-1, 1] as uint8, rounded to the nearest level and clamped.

    Level v is v / 127.5 - 1, so that uint8 -> float -> uint8 is the identity.
    """
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def read_image(source: Path | bytes, name: str = "", mode: str = "RGB") -> Tensor:
    """Return one image file as (C, H, W) uint8, in RGB or (mode "L") grey.

    EXIF rotation is applied, alpha is laid on white, 16-bit grey is scaled to 8 bits. Raises
    InputError naming the file when it is missing, not an image, truncated, or over 64 megapixels.
    """
    shown = name or str(source if isinstance(source, Path) else "the image on stdin")
    if isinstance(source, Path) and not source.is_file():
        raise InputError(f"no such image: {shown}", "check the path")
    try:
        with Image.open(
            source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS
        ) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{shown} has {opened.width}x{opened.height} pixels", "the limit is 64 million"
                )
            opened.load()
            image = _flat(ImageOps.exif_transpose(opened), mode)
    except UnidentifiedImageError:
        raise InputError(
            f"{shown} is not an image cmtool reads", f"use one of {', '.join(FORMATS)}"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{shown} cannot be decoded: {error}", "replace the file") from None
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Return the image without alpha or palette, 8 bits a channel, in `mode`."""
    if image.mode.startswith("I"):  # Pillow clips 16-bit grey to white when asked for RGB
        return Image.fromarray(
            (np.asarray(image, np.float64) / 257).round().astype(np.uint8)
        ).convert(mode)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB").convert(mode)
    return image.convert(mode)


def fitted(image: Tensor, size: tuple[int, int], how: str, name: str = "the image") -> Tensor:
    """Return the image (C, H, W) uint8 at `size` (H, W), by one of FITS.

    Raises InputError for a size that does not fit, or an unknown rule.
    """
    if how not in FITS:
        raise UserError(f"data.fit = {how!r}", nearest(how, FITS))
    h, w = image.shape[1:]
    if (h, w) == size:
        return image
    if how == "exact":
        raise InputError(
            f"{name} is {w}x{h}, not {size[1]}x{size[0]}",
            "choose how to fit it: data.fit = edm, adm or box, or cmtool data prepare",
        )
    if size[0] != size[1]:
        raise InputError(f"data.fit = {how} to {size[1]}x{size[0]}", "it makes squares only")
    array = image.numpy()
    picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
    result = np.array(FITS[how](picture, size[0]))
    return torch.from_numpy(result[None] if result.ndim == 2 else result.transpose(2, 0, 1).copy())


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _fit_edm(image: Image.Image, side: int) -> Image.Image:
    """EDM's dataset tool: the largest centred square, then Lanczos."""
    square = min(image.size)
    return _crop(image, square, square).resize((side, side), Image.Resampling.LANCZOS)


def _fit_adm(image: Image.Image, side: int) -> Image.Image:
    """ADM's loader: box-halve while at least twice too large, bicubic, then the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return _crop(image.resize(size, Image.Resampling.BICUBIC), side, side)


def _fit_box(image: Image.Image, side: int) -> Image.Image:
    """The release's LSUN script: box to the shorter side, then the centre."""
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return _crop(image.resize(size, Image.Resampling.BOX), side, side)


FITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "exact": lambda image, side: image,
    "edm": _fit_edm,
    "adm": _fit_adm,
    "box": _fit_box,
}


def png_bytes(image: Tensor, info: dict[str, str] | None = None) -> bytes:
    """Return one image (C, H, W) uint8, C = 1 or 3, as PNG bytes with `info` as text chunks."""
    array = image.cpu().numpy()
    picture = Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    chunks = PngImagePlugin.PngInfo()
    for key, value in (info or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def png_info(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for a file that is not one."""
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            return {str(k): str(v) for k, v in opened.info.items() if isinstance(v, str)}
    except (OSError, SyntaxError, ValueError):
        return {}


def grid(images: Tensor, columns: int, *, scale: int = 1, gap: int = 1) -> Tensor:
    """Return images (B, C, H, W) uint8 as one picture, row by row, each pixel `scale` wide.

    The gaps are white, `gap` pixels before scaling.
    """
    b, c, h, w = images.shape
    columns = min(columns, b)
    rows = -(-b // columns)
    canvas = torch.full(
        (c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images.cpu()):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def display_scale(size: int) -> int:
    """Return how many screen pixels one image pixel takes in pictures for people."""
    return max(1, 48 // size)
