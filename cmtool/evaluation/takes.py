"""What a feature network takes: how images are resized for it, and in which range they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmtool.errors import UserError, nearest

MAX_SIDE = 4096
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return images (B, 3, H, W) of 0 to 255, divided by 255, less a mean, over a deviation."""
    shift, scale = (x.new_tensor(each)[:, None, None] for each in (mean, std))
    return (x / 255 - shift) / scale


def as_bytes(x: Tensor) -> Tensor:
    """Return images of 0 to 255 as uint8, rounded."""
    return x.round().clamp(0, 255).to(torch.uint8)


RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "-1..1": lambda x: x / 127.5 - 1,
    "0..1": lambda x: x / 255,
    "0..255": lambda x: x,
    "uint8": as_bytes,
    "imagenet": lambda x: normalised(x, *IMAGENET),
    "clip": lambda x: normalised(x, *CLIP),
}
"""From images (B, 3, H, W), float of 0 to 255, to what a network takes."""


def interpolated(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Return images (B, C, H, W) at a size (H, W), antialiased where they shrink, not clamped."""
    return F.interpolate(x, size, mode=mode, antialias=True)


def cropped(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of images of 0 to 255 whose shorter side was resized, as CLIP sees them.

    Bicubic, as Pillow resizes bytes: columns first, then rows, and rounded after each.
    """
    height, width = x.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    h, w = max(int(height * scale + 1e-6), size[0]), max(int(width * scale + 1e-6), size[1])
    for sides in ((height, w), (h, w)):
        if sides != tuple(x.shape[2:]):
            x = interpolated(x.double(), sides, "bicubic").round().clamp(0, 255)
    top, left = round((h - size[0]) / 2), round((w - size[1]) / 2)
    return x[:, :, top : top + size[0], left : left + size[1]].float()


RESIZES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "bicubic": lambda x, size: interpolated(x, size, "bicubic"),
    "bilinear": lambda x, size: interpolated(x, size, "bilinear"),
    "crop": cropped,
    "nearest": lambda x, size: F.interpolate(x, size, mode="nearest-exact"),
}
"""From images (B, 3, H, W), float of 0 to 255, and a size (H, W) to images of this size."""


class Takes(NamedTuple):
    """What a network takes: images of a size (H, W), None for their own, in a range."""

    size: tuple[int, int] | None = None
    range: str = "-1..1"
    resize: str = "bicubic"

    def __str__(self) -> str:
        """Return it as it is typed."""
        if self.size is None:
            return self.range
        return f"{self.size[1]}x{self.size[0]},{self.range},{self.resize}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the network takes of images (B, 3, H, W) uint8."""
        x = images.float()
        if self.size is not None:
            x = RESIZES[self.resize](x, self.size)
        return RANGES[self.range](x)


def parsed(text: str, before: Takes, where: str) -> Takes:
    """Return what a text such as "224,imagenet,bicubic" says a network takes.

    What it does not say is as `before`. A size is a side, or WIDTHxHEIGHT. Raises UserError, which
    names `where` the text stands.
    """
    found = before
    for word in filter(None, map(str.strip, text.split(","))):
        if match := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", word):
            size = int(match[2] or match[1]), int(match[1])
            if not all(0 < side <= MAX_SIDE for side in size):
                what = f"{where}: the size {word} is out of range"
                raise UserError(what, f"give 1 to {MAX_SIDE} pixels")
            found = found._replace(size=size)
        elif word in RANGES:
            found = found._replace(range=word)
        elif word in RESIZES:
            found = found._replace(resize=word)
        else:
            hint = f"{nearest(word, [*RANGES, *RESIZES])}, or a size, as in 224,imagenet,bicubic"
            raise UserError(f"{where}: {word!r} is no size, range or resize rule", hint)
    if found.size is None and found.resize != Takes().resize:
        hint = f"give one, for example 224,{found.range},{found.resize}"
        raise UserError(f"{where}: {found.resize} needs a size to resize to", hint)
    return found
