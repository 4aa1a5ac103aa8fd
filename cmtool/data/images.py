"""Image files, and images as uint8. The only importer of Pillow."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from cmtool.errors import InputError, UserError, nearest
from cmtool.system.files import read_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000
MAX_FILE = 256 << 20
"""Bytes that the file of an image may have."""
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a damaged file."""
T = TypeVar("T")


def to_uint8(images: Tensor) -> Tensor:
    """Return images (..., C, H, W) in [-1, 1] as uint8, rounded to the nearest level and clamped.

    Level v is v / 127.5 - 1, so that uint8 -> float -> uint8 is the identity.
    """
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def floored(images: Tensor) -> Tensor:
    """Return images (..., C, H, W) in [-1, 1] as uint8, truncated as the PyTorch release does.

    On average half a level darker than `to_uint8`; uint8 -> float -> uint8 is not the identity.
    """
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"nearest": to_uint8, "floor": floored}


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def read_image(source: Path | bytes, name: str = "", mode: str = "RGB") -> Tensor:
    """Return one image file as (C, H, W) uint8, in RGB or (mode "L") grey.

    EXIF rotation is applied, transparent parts become white, 16-bit grey is scaled to 8 bits.
    Raises InputError naming a file that is missing, not an image, truncated, or over 64 megapixels.
    """
    return _use_image(source, name, lambda image: _tensor(_flat(_upright(image), mode)))


def read_mask(path: Path) -> Tensor:
    """Return a mask (1, H, W) bool of a picture: True where the picture is white.

    A picture with transparent parts is one of two: white paint on nothing, where the mask is the
    paint, or any other picture with holes, where the mask is the holes. Raises InputError as
    `read_image` does, and where black and white paint on nothing may mean either.
    """

    def mask(image: Image.Image) -> Tensor:
        image = _upright(image)
        white = _tensor(_flat(image, "L")) >= 128
        if not image.has_transparency_data:
            return white
        rgba = _tensor(image.convert("RGBA"))
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


def _tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C"))


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


def recoloured(image: Tensor, channels: int) -> Tensor:
    """Return an image (C, H, W) uint8 with 1 or 3 channels, grey by the luma of ITU-R 601."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1).clone()
    return _tensor(_picture(image).convert("L"))


def check_fit_rule(how: str) -> None:
    """Raise UserError unless the rule is one of FITS."""
    if how not in FITS:
        raise UserError(f"data.fit = {how!r}", nearest(how, FITS))


def fitted(image: Tensor, size: tuple[int, int], how: str, name: str = "the image") -> Tensor:
    """Return the image (C, H, W) uint8 at `size` (H, W), by one of FITS.

    Raises InputError for a size that does not fit, or an unknown rule.
    """
    check_fit_rule(how)
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
    return _tensor(FITS[how](_picture(image), size[0]))


def _picture(image: Tensor) -> Image.Image:
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    """Return the centre of the image with its shorter side of `side` pixels."""
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return _centre(image.resize(size, how), side)


def _fit_edm(image: Image.Image, side: int) -> Image.Image:
    """EDM's dataset tool: the largest centred square, then Lanczos."""
    return _centre(image, min(image.size)).resize((side, side), Image.Resampling.LANCZOS)


def _fit_adm(image: Image.Image, side: int) -> Image.Image:
    """ADM's loader: box-halve while at least twice too large, bicubic, then the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _resized(image, side, Image.Resampling.BICUBIC)


def _fit_box(image: Image.Image, side: int) -> Image.Image:
    """The release's LSUN script: box to the shorter side, then the centre."""
    return _resized(image, side, Image.Resampling.BOX)


FITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "exact": lambda image, side: image,
    "edm": _fit_edm,
    "adm": _fit_adm,
    "box": _fit_box,
}


class Canvas(NamedTuple):
    """How a picture is brought to a size that a model can edit.

    `crop` (top, left, height, width) is the part that is used, `pad` (bottom, right) is added.
    """

    crop: tuple[int, int, int, int]
    pad: tuple[int, int]

    def place(self, image: Tensor) -> Tensor:
        """Return the image (B, C, H, W) cropped and padded; the padding repeats its edge."""
        top, left, h, w = self.crop
        part = image[..., top : top + h, left : left + w]
        rows = torch.arange(h + self.pad[0]).clamp(max=h - 1)
        columns = torch.arange(w + self.pad[1]).clamp(max=w - 1)
        return part[..., rows, :][..., columns]

    def unpad(self, result: Tensor) -> Tensor:
        """Return the part (B, C, h, w) of a result that is not padding."""
        return result[..., : self.crop[2], : self.crop[3]]

    def scaled(self, factor: int) -> Canvas:
        """Return the canvas of the picture `factor` times as large."""
        top, left, h, w = (factor * side for side in self.crop)
        return Canvas((top, left, h, w), (factor * self.pad[0], factor * self.pad[1]))


def canvas(h: int, w: int, size: tuple[int, int], how: str, name: str = "the image") -> Canvas:
    """Return how a picture of h x w becomes one that a model of `size` (H, W) can edit.

    The rule `how` is "exact": the picture has this size; "crop": use its centre; "pad": fill up a
    smaller picture; "tile": work in overlapping tiles, and fill up if need be. Raises InputError
    for a picture that the rule does not suit, UserError for an unknown rule.
    """
    if how not in CANVASES:
        raise UserError(f"--fit {how!r}", nearest(how, CANVASES))
    is_large = h >= size[0] and w >= size[1]
    is_small = h <= size[0] and w <= size[1]
    if (h, w) == size or how == "tile" or (how == "pad" and is_small):
        return Canvas((0, 0, h, w), (max(size[0] - h, 0), max(size[1] - w, 0)))
    if how == "crop" and is_large:
        return Canvas(((h - size[0]) // 2, (w - size[1]) // 2, *size), (0, 0))
    good = ["tile", *["crop"] * is_large, *["pad"] * is_small]
    raise InputError(
        f"{name} is {w}x{h}, the model makes {size[1]}x{size[0]}",
        f"resize it to {size[1]}x{size[0]}, or choose --fit {' or '.join(good)}",
    )


CANVASES = ("exact", "crop", "pad", "tile")


def text_mask(text: str, h: int, w: int) -> Tensor:
    """Return a mask (1, h, w) uint8 with `text` in white, as large as fits. Raises UserError."""
    if not text.strip():
        raise UserError("--text is empty", "give a letter or a word")
    mask = Image.new("L", (w, h))
    draw = ImageDraw.Draw(mask)
    for size in range(2 * h, 3, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        if right - left <= w and bottom - top <= h:
            at = ((w - right - left) / 2, (h - bottom - top) / 2)
            draw.text(at, text, fill=255, font=font)
            return torch.from_numpy(np.array(mask)[None])
    raise UserError(f"--text {text!r} does not fit into {w}x{h}", "give fewer letters")


def animation_bytes(frames: Tensor, suffix: str) -> bytes:
    """Return frames (n, C, H, W) uint8 as an endless animated .gif or .webp, 12 a second."""
    pictures = [_picture(frame) for frame in frames]
    buffer = io.BytesIO()
    exact = {"lossless": True} if suffix == ".webp" else {}
    pictures[0].save(
        buffer, ANIMATIONS[suffix], save_all=True, append_images=pictures[1:], loop=0,
        duration=round(1000 / 12), **exact,
    )  # fmt: skip
    return buffer.getvalue()


ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


def png_bytes(image: Tensor, info: dict[str, str] | None = None) -> bytes:
    """Return one image (C, H, W) uint8, C = 1 or 3, as PNG bytes with `info` as text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (info or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    _picture(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def png_info(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for a file that is not one."""
    try:
        content = io.BytesIO(read_regular(path, MAX_FILE))
        with Image.open(content, formats=("PNG",)) as opened:
            return {str(k): str(v) for k, v in opened.info.items() if isinstance(v, str)}
    except (InputError, *DAMAGE):
        return {}


def grid(images: Tensor, columns: int, *, scale: int = 1, gap: int = 1) -> Tensor:
    """Return images (B, C, H, W) uint8 as one picture, row by row, each pixel `scale` wide.

    The gaps are white, `gap` pixels before scaling.
    """
    b, c, h, w = images.shape
    columns = min(columns, b)
    rows = -(-b // columns)
    size = rows * (h + gap) + gap, columns * (w + gap) + gap
    canvas = torch.full((c, *size), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def row(images: Sequence[Tensor]) -> Tensor:
    """Return images (C, H, W) uint8 of one size beside each other; one alone as it is."""
    return images[0] if len(images) == 1 else torch.cat(list(images), dim=2)


def contact_sheet(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) uint8 as a grid for people: ten in a row, or about a square."""
    columns = 10 if len(images) % 10 == 0 else math.ceil(math.sqrt(len(images)))
    return grid(images, columns, scale=display_scale(images.shape[-1]))


def display_scale(size: int) -> int:
    """Return how many screen pixels one image pixel takes in pictures for people."""
    return max(1, 48 // size)
