"""Pictures that cmtool makes: PNG files, grids, strips, animations and masks of letters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from cmtool.data.images import picture_of
from cmtool.errors import UserError


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
    pictures = [picture_of(frame) for frame in frames]
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
    picture_of(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def grid(images: Tensor, columns: int, *, scale: int = 1) -> Tensor:
    """Return images (B, C, H, W) uint8 as one picture, row by row, each pixel `scale` wide.

    White gaps lie between and around them, one pixel wide before scaling.
    """
    b, c, h, w = images.shape
    columns = min(columns, b)
    rows = -(-b // columns)
    size = rows * (h + 1) + 1, columns * (w + 1) + 1
    canvas = torch.full((c, *size), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = 1 + i // columns * (h + 1), 1 + i % columns * (w + 1)
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


def narrowed(picture: np.ndarray, columns: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 of at most so many columns, by means of its pixels."""
    h, w, _ = picture.shape
    if w <= columns:
        return picture
    size = columns, max(1, round(h * columns / w))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
