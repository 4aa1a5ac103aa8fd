"""The edits that the page offers, a row each: what it needs, and how it is said in a shell."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cmtool import prepared
from cmtool.core.edits import gaussian_kernel
from cmtool.models import Model
from cmtool.prepared import PreparedEdit


class Amount(NamedTuple):
    """The number that an edit takes: its option in a shell, and the field's ends and start.

    `choices` are the only numbers there are, if any are given. Where it `may_be_left_out`, the edit
    finds the number by itself.
    """

    option: str
    label: str
    low: float
    high: float
    step: float
    start: float
    choices: tuple[int, ...] = ()
    may_be_left_out: bool = False


class Row(NamedTuple):
    """An edit on the page.

    `prepare(model, images, mask, amount)` makes it ready. `draws` is what the mouse draws: a
    "mask", "paint", or nothing. `amount(h, w)` is its number for pictures of this size. `has_steps`
    is False for an edit whose levels are its own.
    """

    title: str
    help: str
    prepare: Callable[[Model, Tensor, Tensor | None, float], PreparedEdit]
    draws: str = ""
    amount: Callable[[int, int], Amount] | None = None
    has_steps: bool = True
    has_variations: bool = True


NAME = "the picture"
"""What messages call the picture."""


def _inpaint(model: Model, images: Tensor, mask: Tensor | None, _: float) -> PreparedEdit:
    assert mask is not None  # the desk asks for it
    return prepared.prepare_inpaint(model, images, mask, fit="exact", name=NAME)


def _superres(model: Model, images: Tensor, _: Tensor | None, factor: float) -> PreparedEdit:
    return prepared.prepare_superres(model, images, int(factor), fit="exact", name=NAME)


def _colorize(model: Model, images: Tensor, _: Tensor | None, __: float) -> PreparedEdit:
    return prepared.prepare_colorize(model, images, fit="exact", name=NAME)


def _stroke(model: Model, images: Tensor, _: Tensor | None, __: float) -> PreparedEdit:
    return prepared.prepare_stroke(model, images, fit="exact", name=NAME)


def _denoise(model: Model, images: Tensor, _: Tensor | None, sigma: float) -> PreparedEdit:
    return prepared.prepare_denoise(model, images, sigma or None, fit="exact", name=NAME)


def _deblur(model: Model, images: Tensor, _: Tensor | None, sigma: float) -> PreparedEdit:
    kernel = gaussian_kernel(sigma)
    return prepared.prepare_deblur(model, images, kernel, fit="exact", name=NAME)


def _outpaint(model: Model, images: Tensor, _: Tensor | None, by: float) -> PreparedEdit:
    margins = (int(by),) * 4
    return prepared.prepare_outpaint(model, images, margins, fit="tile", name=NAME)


def _variations(model: Model, images: Tensor, _: Tensor | None, sigma: float) -> PreparedEdit:
    return prepared.prepare_variations(model, images, sigma, fit="exact", name=NAME)


def _factor(h: int, w: int) -> Amount:
    both = math.gcd(h, w)
    good = tuple(f for f in range(2, min(both, 8) + 1) if both % f == 0)
    return Amount("--factor", "Size of a block", 2, 8, 1, 2, choices=good)


def _blur(h: int, w: int) -> Amount:
    """Return widths of a blur whose kernel, of 3 deviations on each side, fits into the picture."""
    most = (min(h, w) - 1) // 2 / 3
    return Amount("--gaussian", "Blur, in pixels", 0.2, max(most, 0.2), 0.1, min(1.0, most))


def _margin(h: int, w: int) -> Amount:
    side = min(h, w)
    return Amount("--by", "Pixels on every side", 1, side, 1, max(1, side // 4))


def _noise(h: int, w: int) -> Amount:
    label = "Noise, from 0.01 to 2"
    return Amount("--sigma", label, 0.01, 2, 0.01, 0.3, may_be_left_out=True)


def _change(h: int, w: int) -> Amount:
    return Amount("--sigma", "How much to change", 0.1, 20, 0.1, 1.5)


EDITS: dict[str, Row] = {
    "inpaint": Row(
        "Inpaint", "Paint over what is to be made anew. Every other pixel stays as it is.",
        _inpaint, draws="mask",
    ),
    "stroke": Row(
        "Stroke", "Paint roughly. The model makes a picture of it.", _stroke, draws="paint",
    ),
    "superres": Row(
        "Enlarge", "Makes the details anew. The mean of each block of pixels stays.", _superres,
        amount=_factor,
    ),
    "colorize": Row("Colour", "Gives new colours. How bright a pixel is stays.", _colorize),
    "denoise": Row(
        "Denoise", "Takes white noise out, in one network call.", _denoise, amount=_noise,
        has_steps=False, has_variations=False,
    ),
    "deblur": Row(
        "Deblur", "Takes a Gaussian blur out. What the blur left stays.", _deblur, amount=_blur,
    ),
    "outpaint": Row("Outpaint", "Makes new pixels around it.", _outpaint, amount=_margin),
    "variations": Row(
        "Vary", "Draws another picture like this one.", _variations, amount=_change,
        has_steps=False,
    ),
}  # fmt: skip
