"""Images as uint8: their levels, colours, and how they are brought to a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cmtool.errors import InputError, UserError, nearest


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


MAX_RESIZED = 64_000_000
"""Pixels that a whole image may have when its shorter side is resized."""
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"nearest": to_uint8, "floor": floored}


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def tensor_of(image: Image.Image) -> Tensor:
    """Return a picture of 8 bits a channel as (C, H, W) uint8."""
    array = np.asarray(image)
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C"))


def recoloured(image: Tensor, channels: int) -> Tensor:
    """Return an image (C, H, W) uint8 with 1 or 3 channels, grey by the luma of ITU-R 601."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1).clone()
    return tensor_of(picture_of(image).convert("L"))


def brought(image: Tensor, size: tuple[int, int], *, is_whole: bool = False) -> Tensor:
    """Return an image (C, H, W) uint8 at `size` (H, W): its largest centre of that shape, resized.

    The `is_whole` image is resized to fit in, and lies on white.
    """
    h, w = image.shape[1:]
    if (h, w) == size:
        return image
    picture, (high, wide) = picture_of(image), size
    bicubic = Image.Resampling.BICUBIC
    if not is_whole:
        scale = min(h / high, w / wide)
        left, top = (w - scale * wide) / 2, (h - scale * high) / 2
        box = (left, top, left + scale * wide, top + scale * high)
        return tensor_of(picture.resize((wide, high), bicubic, box))
    scale = max(h / high, w / wide)
    inner = max(1, round(w / scale)), max(1, round(h / scale))
    paper = Image.new(picture.mode, (wide, high), "white")
    paper.paste(picture.resize(inner, bicubic), ((wide - inner[0]) // 2, (high - inner[1]) // 2))
    return tensor_of(paper)


def check_fit_rule(how: str) -> None:
    """Raise UserError unless the rule is one of FITS."""
    if how not in FITS:
        raise UserError(f"unknown rule of fit for the data: {how!r}", nearest(how, FITS))


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
            "choose a rule: --fit adm in cmtool data prepare, --set data.fit=adm in training",
        )
    if size[0] != size[1]:
        raise InputError(
            f"the rule {how} makes squares, not {size[1]}x{size[0]}",
            "give a square size, or the rule exact",
        )
    if how != "edm" and max(h, w) * size[0] ** 2 > MAX_RESIZED * min(h, w):
        raise InputError(
            f"{name} is {w}x{h}, too long and thin for the rule {how}, which resizes all of it",
            "crop it, or choose the rule edm, which resizes its centre",
        )
    return tensor_of(FITS[how](picture_of(image), size[0]))


def picture_of(image: Tensor) -> Image.Image:
    """Return an image (C, H, W) uint8, C = 1 or 3, as Pillow's picture."""
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

    `crop` (top, left, height, width) is the part that is used, `pad` (bottom, right) is added to
    it. With a `size` (H, W) it is resized to that instead.
    """

    crop: tuple[int, int, int, int]
    pad: tuple[int, int]
    size: tuple[int, int] | None = None

    def place(self, image: Tensor) -> Tensor:
        """Return the image (B, C, H, W), or a mask, cropped, and padded or resized.

        The padding repeats its edge. What is half covered by a mask is in it.
        """
        top, left, h, w = self.crop
        part = image[..., top : top + h, left : left + w]
        if self.size is not None:
            how: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
            resized = F.interpolate(part.float(), self.size, **how)
            return resized >= 0.5 if image.dtype == torch.bool else resized
        rows = torch.arange(h + self.pad[0]).clamp(max=h - 1)
        columns = torch.arange(w + self.pad[1]).clamp(max=w - 1)
        return part[..., rows, :][..., columns]

    def unpad(self, result: Tensor) -> Tensor:
        """Return the part (B, C, h, w) of a result that is not padding."""
        return result if self.size else result[..., : self.crop[2], : self.crop[3]]

    def scaled(self, factor: int) -> Canvas:
        """Return the canvas of the picture `factor` times as large."""
        top, left, h, w = (factor * side for side in self.crop)
        size = (factor * self.size[0], factor * self.size[1]) if self.size else None
        return Canvas((top, left, h, w), (factor * self.pad[0], factor * self.pad[1]), size)


def canvas(h: int, w: int, size: tuple[int, int], how: str, name: str = "the image") -> Canvas:
    """Return how a picture of h x w becomes one that a model of `size` (H, W) can edit.

    The rule `how` is "exact": the picture has this size; "resize": its largest centre of the
    model's shape, resized; "crop": use its centre; "pad": fill up a smaller picture; "tile": work
    in overlapping tiles, and fill up if need be. Raises InputError for a picture that the rule does
    not suit, UserError for an unknown rule.
    """
    if how not in CANVASES:
        raise UserError(f"unknown --fit {how!r}", nearest(how, CANVASES))
    is_large = h >= size[0] and w >= size[1]
    is_small = h <= size[0] and w <= size[1]
    if (h, w) == size or how == "tile" or (how == "pad" and is_small):
        return Canvas((0, 0, h, w), (max(size[0] - h, 0), max(size[1] - w, 0)))
    if how == "resize":
        scale = min(h / size[0], w / size[1])
        ch, cw = min(max(round(size[0] * scale), 1), h), min(max(round(size[1] * scale), 1), w)
        return Canvas(((h - ch) // 2, (w - cw) // 2, ch, cw), (0, 0), size)
    if how == "crop" and is_large:
        return Canvas(((h - size[0]) // 2, (w - size[1]) // 2, *size), (0, 0))
    good = ["tile", *["crop"] * is_large, *["pad"] * is_small]
    raise InputError(
        f"{name} is {w}x{h}, the model makes {size[1]}x{size[0]}",
        f"resize it to {size[1]}x{size[0]} by --fit resize, or choose --fit {' or '.join(good)}",
    )


CANVASES = ("exact", "resize", "crop", "pad", "tile")
