"""The edits that the page offers, a row each: what it needs, and how it is said in a shell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cmtool import prepared
from cmtool.core.edits import gaussian_kernel
from cmtool.models import Model
from cmtool.prepared import PreparedEdit


class Amount(NamedTuple):
    """The number that an edit takes: its option in a shell, and the slider's ends and start.

    Where it `may_be_left_out`, the edit finds the number by itself.
    """

    option: str
    label: str
    low: float
    high: float
    step: float
    start: float
    may_be_left_out: bool = False


class Row(NamedTuple):
    """An edit on the page.

    `prepare(model, images, mask, amount)` makes it ready. `draws` is what the mouse draws: a
    "mask", "paint", or nothing. `has_steps` is False for an edit whose levels are its own.
    """

    title: str
    help: str
    prepare: Callable[[Model, Tensor, Tensor | None, float], PreparedEdit]
    draws: str = ""
    amount: Amount | None = None
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


EDITS: dict[str, Row] = {
    "inpaint": Row(
        "Inpaint", "Paint over what is to be made anew. Every other pixel stays as it is.",
        _inpaint, draws="mask",
    ),
    "stroke": Row(
        "Stroke", "Paint roughly. The model makes a picture of it.", _stroke, draws="paint",
    ),
    "superres": Row(
        "Enlarge", "Makes the details anew; the means of blocks stay.", _superres,
        amount=Amount("--factor", "Block, in pixels", 2, 8, 1, 2),
    ),
    "colorize": Row("Colour", "Gives new colours; how bright a pixel is stays.", _colorize),
    "denoise": Row(
        "Denoise", "Takes white noise out, in one network call.", _denoise,
        amount=Amount("--sigma", "Noise, where half of the range is 1", 0.01, 2, 0.01, 0.3, True),
        has_steps=False, has_variations=False,
    ),
    "deblur": Row(
        "Deblur", "Takes a Gaussian blur out; what the blur left stays.", _deblur,
        amount=Amount("--gaussian", "Blur, in pixels", 0.2, 4, 0.1, 1),
    ),
    "outpaint": Row(
        "Outpaint", "Makes new pixels around the picture.", _outpaint,
        amount=Amount("--by", "Pixels on every side", 1, 32, 1, 8),
    ),
    "variations": Row(
        "Vary", "Draws another picture like this one.", _variations,
        amount=Amount("--sigma", "Noise level: higher changes more", 0.1, 20, 0.1, 1.5),
        has_steps=False,
    ),
}  # fmt: skip
