"""EDM's augmentation: training images warped at random, and labels that tell the network how.

Karras et al. (2022), Appendix F.2 and Table 6. The network is told nothing when it is sampled,
which means "not warped", so that warps do not leak into what it makes. For teachers only: the
published consistency models saw mirrored images and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from cmtool.core.tensors import to_device

Augment = Callable[[Tensor, Generator], tuple[Tensor, Tensor]]
"""`(x0, generator) -> (x0, labels)`: the images warped, and how, (B, LABELS)."""

LABELS = 9
MULTIPLIERS = (1e8, 1.0, 1.0, 1.0, 1.0, 1.0)
"""What `p` is multiplied by: flips along x and y, scale, rotation, anisotropy, translation."""
OCTAVES = 0.2
"""Standard deviation of log2 of the isotropic scale, and of the anisotropic one."""
SHIFT = 0.125
"""Standard deviation of a translation, as a share of the side."""
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""The low-pass of the wavelet sym6 (Daubechies 1992): filtering up and down again is identity."""
CENTRE = 5
"""The tap of SYM6 about which it is nearly symmetric."""


class Warps(NamedTuple):
    """How each of B images is warped, in this order; everything (B,) on the CPU.

    All but the flips is float64, and zero where nothing is done.
    """

    flip_x: Tensor
    flip_y: Tensor
    octaves: Tensor
    angle: Tensor
    stretch: Tensor
    """Octaves along an axis at `axis` from x; as many the other way across it."""
    axis: Tensor
    shift_x: Tensor
    """In SHIFT of the width, to the right."""
    shift_y: Tensor


def augmented(x: Tensor, generator: Generator, *, p: float) -> tuple[Tensor, Tensor]:
    """Return images x (B, C, H, W) warped at random, and their labels (B, 9) in x's dtype.

    Each kind of warp is drawn with probability min(multiplier p, 1), from the CPU `generator`
    alone; half of the images are mirrored whatever p > 0 is.
    """
    warps = draw_warps(len(x), p, generator)
    return warped(x, warps), to_device(warp_labels(warps).to(x.dtype), x.device)


def draw_warps(count: int, p: float, generator: Generator) -> Warps:
    """Return the warps of `count` images; the same number of draws whatever p is."""
    uniform = torch.rand(11, count, generator=generator, dtype=torch.float64)
    normal = torch.randn(4, count, generator=generator, dtype=torch.float64)
    chance = torch.tensor(MULTIPLIERS, dtype=torch.float64)[:, None] * p
    flip_x, flip_y, scale, rotate, stretch, shift = uniform[:6] < chance
    angle, axis = (2 * uniform[6:8] - 1) * math.pi
    turned = uniform[8] < 0.5
    return Warps(
        flip_x=flip_x & (uniform[9] < 0.5),
        flip_y=flip_y & (uniform[10] < 0.5),
        octaves=normal[0] * scale,
        angle=angle * rotate,
        stretch=normal[1] * stretch,
        axis=axis * (stretch & turned),
        shift_x=normal[2] * shift,
        shift_y=normal[3] * shift,
    )


def warp_labels(warps: Warps) -> Tensor:
    """Return what the network is told, (B, 9) float64; zeros for an image as it was."""
    w = warps
    labels = [
        w.flip_x, w.flip_y, w.octaves, w.angle.cos() - 1, w.angle.sin(),
        w.stretch * w.axis.cos(), w.stretch * w.axis.sin(), w.shift_x, w.shift_y,
    ]  # fmt: skip
    return torch.stack([label.double() for label in labels], dim=1)


def warped(x: Tensor, warps: Warps) -> Tensor:
    """Return images x (B, C, H, W) warped. Flips are exact; the rest is resampled once.

    An image for which nothing is drawn stays bit-equal.
    """
    for flip, dim in ((warps.flip_x, 3), (warps.flip_y, 2)):
        x = torch.where(to_device(flip, x.device)[:, None, None, None], x.flip(dim), x)
    moved = torch.stack(warps[2:]).any(0).nonzero().flatten()
    if not len(moved):
        return x
    inverse, shift = affine(Warps(*(w[moved] for w in warps)), x.shape[3], x.shape[2])
    where, inverse, shift = (
        to_device(t, x.device) for t in (moved, inverse.to(x.dtype), shift.to(x.dtype))
    )
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # meta has none
        return x.index_copy(0, where, resampled(x[where], inverse, shift))


def affine(warps: Warps, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return the inverse (B, 2, 2) of the warps' linear part, and the shift (B, 2) in pixels.

    Coordinates are (x, y) from the centre, y downwards. The image is scaled, rotated by -angle,
    stretched along the axis, and shifted.
    """
    grow = 2.0 ** (OCTAVES * warps.octaves)
    along = 2.0 ** (OCTAVES * warps.stretch)
    stretched = torch.diag_embed(torch.stack([1 / along, along], dim=1))  # inverse
    undo = rotation(warps.angle) / grow[:, None, None]
    inverse = undo @ rotation(warps.axis) @ stretched @ rotation(-warps.axis)
    shift = torch.stack([warps.shift_x * width, warps.shift_y * height], dim=1) * SHIFT
    return inverse, shift


def rotation(angle: Tensor) -> Tensor:
    """Return the matrices (B, 2, 2) that take the x axis to the y axis at a right angle."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


def resampled(x: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Return images x (B, C, H, W) through the maps q -> inverse (q - shift) from output to input.

    At twice the resolution, between SYM6 up and down; around the image lies its mirror image,
    without end. Exact for whole pixels: SYM6 is orthogonal to its even shifts.
    """
    (height, width), device = x.shape[2:], x.device
    fine = up(height, device) @ x @ up(width, device).T
    qx = places(width, device) - shift[:, 0, None, None]  # (B, 1, 2 W + 10)
    qy = places(height, device)[:, None] - shift[:, 1, None, None]  # (B, 2 H + 10, 1)
    (a, b), (c, d) = (row.unbind(1) for row in inverse[..., None, None].unbind(1))
    grid = torch.stack([on_period(a * qx + b * qy, width), on_period(c * qx + d * qy, height)], -1)
    fine = F.grid_sample(fine, grid, align_corners=True)
    return down(height, device) @ fine @ down(width, device).T


def places(side: int, device: torch.device) -> Tensor:
    """Return where the values lie that `down` takes, in pixels from the centre."""
    fine = torch.arange(2 * side + len(SYM6) - 2, device=device)
    return (fine - CENTRE) / 2 - (side - 1) / 2


def on_period(place: Tensor, side: int) -> Tensor:
    """Return pixels from the centre as places on what `up` makes, whose ends are -1 and 1."""
    period = mirror_period(side)
    row = 2 * place + side - 1 + CENTRE
    return torch.remainder(row, 2 * period) / period - 1


def mirror_period(side: int) -> int:
    """Return the period of a line of pixels and its mirror image, the ends not repeated."""
    return max(2 * side - 2, 1)


@lru_cache(16)
def up(side: int, device: torch.device) -> Tensor:
    """Return the matrix (2 period + 1, side) of SYM6 at twice the resolution, over one period.

    Row n lies at pixel (n - CENTRE) / 2; the last row is the first again.
    """
    period = mirror_period(side)
    matrix = torch.zeros(2 * period + 1, side)
    for n in range(2 * period + 1):
        for tap, value in enumerate(SYM6):
            pixel, between = divmod(n % (2 * period) - tap, 2)
            if not between:
                matrix[n, min(pixel % period, -pixel % period)] += math.sqrt(2) * value
    return matrix.to(device)


@lru_cache(16)
def down(side: int, device: torch.device) -> Tensor:
    """Return the matrix (side, 2 side + 10) of SYM6, the other way round, at every other place."""
    matrix = torch.zeros(side, 2 * side + len(SYM6) - 2)
    for i in range(side):
        matrix[i, 2 * i : 2 * i + len(SYM6)] = torch.tensor(SYM6) / math.sqrt(2)
    return matrix.to(device)
