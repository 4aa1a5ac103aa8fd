"""Edits made ready for a model: what was given, brought to the model's size and to an `Edit`.

`prepare_*` return a PreparedEdit; `run_prepared` draws its answers. `cmtool edit`, the page and
`cmtool.editing` are made of them. Images are float in [-1, 1], (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmtool import sampling
from cmtool.core import edits
from cmtool.core.edits import Edit
from cmtool.core.samplers import sampling_levels
from cmtool.data.images import Canvas, canvas
from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.sampling import Plan, model_device, precision_info

STROKE_LEVELS = ((5.38, 1.0), (2.24, 0.4))
"""The paper's levels for strokes on pictures of 256 pixels (App. D), and the least of each."""
VARIATION = 1.5
"""The noise level of variations: what is drawn stays, and how it is drawn is another."""


@dataclass(frozen=True)
class PreparedEdit:
    """An edit of images on a canvas that the model can edit.

    `panels` (B, C, h, w) are what was given and what the edit sees of it, at the size of the
    answer, to compare with; `levels` are the edit's own noise levels, if it has any.
    """

    edit: Edit
    canvas: Canvas
    panels: tuple[Tensor, ...]
    levels: tuple[float, ...] | None = None


def prepare_inpaint(
    model: Model, images: Tensor, mask: Tensor, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that makes the pixels anew where the mask (B or 1, 1, H, W) is True.

    Raises InputError for a mask of another size.
    """
    edits.inpaint(images, ~mask)  # raises for sizes that differ, before both are cropped
    layout, x = on_canvas(model, images, fit, name)
    edit = edits.inpaint(x, ~layout.place(mask).to(x.device))
    return PreparedEdit(edit, layout, (layout.unpad(x), layout.unpad(edit.init)))


def prepare_superres(
    model: Model, images: Tensor, factor: int, noise: float = 0.0, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that enlarges images `factor` times.

    Images that have the model's size already count as enlarged by repeating: their block means are
    kept. `noise` is the deviation of the noise in them. Raises UserError for a factor that does not
    divide the model's size, and for a noise that is none.
    """
    _check_noise(noise)
    size = model.preset.model.image_size
    if factor < 2:
        raise UserError(f"--factor {factor} enlarges nothing", "give 2 or more")
    if fit == "exact":
        edits.block_means(torch.zeros(1, 1, *size), factor)  # the factor divides
    if fit == "exact" and tuple(images.shape[2:]) == size:
        low = edits.block_means(images.to(model_device(model)), factor)
        large = Canvas((0, 0, *size), (0, 0))
    else:
        small_size = (-(-size[0] // factor), -(-size[1] // factor))
        shown = f"{name}, to be enlarged {factor} times,"
        small, low = on_canvas(model, images, fit, shown, small_size)
        large = small.scaled(factor)
    edit = edits.superres(low, factor, noise)
    return PreparedEdit(edit, large, (large.unpad(edit.init),))


def prepare_colorize(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
    """Return the edit that gives images new colours and keeps their luma.

    Raises InputError for a model of one channel.
    """
    if model.preset.model.channels != 3:
        raise InputError(f"{model.source} makes grey pictures", "give a model of colour pictures")
    layout, x = on_canvas(model, images, fit, name)
    gray = edits.luma(x)
    panels = (layout.unpad(x), layout.unpad(gray.expand_as(x)))
    return PreparedEdit(edits.colorize(gray), layout, panels)


def prepare_stroke(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
    """Return the edit that makes pictures of rough paintings."""
    layout, x = on_canvas(model, images, fit, name)
    return PreparedEdit(edits.stroke(x), layout, (layout.unpad(x),), stroke_levels(model))


def prepare_denoise(
    model: Model, images: Tensor, sigma: float | None, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that takes noise of deviation `sigma` out; of one image if it is None.

    Raises UserError for a sigma outside the model's range.
    """
    layout, x = on_canvas(model, images, fit, name)
    low, high = model.preset.noise.sigma_min, model.preset.noise.sigma_max
    if sigma is None:
        sigma = min(max(float(edits.estimate_sigma(x)), low), high)
    _check_level(model, sigma)
    return PreparedEdit(edits.denoise(x), layout, (layout.unpad(x),), (sigma,))


def prepare_deblur(
    model: Model, images: Tensor, kernel: Tensor, noise: float = 0.0, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that takes the blur of a kernel (h, w) out of images with this noise.

    Raises UserError for a kernel larger than the images, and for a noise that is none.
    """
    _check_noise(noise)
    layout, x = on_canvas(model, images, fit, name)
    edit = edits.deblur(x, kernel, noise)
    return PreparedEdit(edit, layout, (layout.unpad(x),))


def prepare_outpaint(
    model: Model, images: Tensor, margins: tuple[int, int, int, int], *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that makes `margins` (left, top, right, bottom) of new pixels.

    `fit` is not asked: the larger picture is made of tiles. Raises UserError for margins that are
    none.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise UserError(f"margins of {margins}", "give pixels from 0, and one side of 1 or more")
    around = (left, right, top, bottom)
    large = torch.nn.functional.pad(images, around, mode="replicate")
    new = torch.nn.functional.pad(torch.zeros_like(images[:, :1]), around, value=1.0) > 0.5
    return prepare_inpaint(model, large, new, fit="tile", name=name)


def prepare_variations(
    model: Model, images: Tensor, sigma: float, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that draws images again from the level `sigma`, in two calls.

    The second level is a fourth of the first. Raises UserError for a sigma outside the model's
    range.
    """
    layout, x = on_canvas(model, images, fit, name)
    _check_level(model, sigma)
    levels = near_levels(model, (sigma, sigma / 4))
    return PreparedEdit(edits.stroke(x), layout, (layout.unpad(x),), levels)


def _check_noise(noise: float) -> None:
    """Raise UserError unless the noise in a picture is 0 or a deviation of at most 2."""
    if not 0 <= noise <= 2:
        raise UserError(f"--noise {noise:g}", "give 0 to 2: half of the range is 1")


def _check_level(model: Model, sigma: float) -> None:
    """Raise UserError for a level that is none of the model's."""
    low, high = model.preset.noise.sigma_min, model.preset.noise.sigma_max
    if not low <= sigma <= high:
        what = f"--sigma {sigma:g} is none of the model's noise levels"
        raise UserError(what, f"the model knows {low:g} to {high:g}")


def run_prepared(
    prepared: PreparedEdit, model: Model, chosen: Plan, seeds: Sequence[int], label: int | None
) -> Tensor:
    """Return the answers (n, C, h, w), one a seed, of n images, or of n variations of one."""
    init = prepared.edit.init.expand(len(seeds), -1, -1, -1)
    labels = None if label is None else torch.full((len(seeds),), label, device=init.device)
    result = sampling.run_edit(model, replace(prepared.edit, init=init), chosen, seeds, labels)
    return prepared.canvas.unpad(result)


def provenance(
    name: str, model: Model, chosen: Plan, seed: int, label: int | None
) -> dict[str, str]:
    """Return what the PNG of an edit's answers says of how they were made; `seed` is the first."""
    about = {
        "cmtool:edit": name, **model.told(),
        "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)), "cmtool:seed": str(seed),
        **precision_info(chosen),
    }  # fmt: skip
    return about if label is None else about | {"cmtool:class": str(label)}


def stroke_levels(model: Model) -> tuple[float, ...]:
    """Return levels for strokes: high enough to lose the brush, low enough to keep the drawing.

    A drawing drowns in less noise the fewer its pixels, so the paper's levels shrink with the
    side; those of the training grid nearest to that are taken.
    """
    side = min(model.preset.model.image_size)
    return near_levels(model, [max(level * side / 256, least) for level, least in STROKE_LEVELS])


def near_levels(model: Model, wanted: Sequence[float]) -> tuple[float, ...]:
    """Return the levels of the training grid nearest to those wanted, from high to low."""
    known = sampling_levels(sampling.grid_size(model.preset), model.noise_range)[:-1]
    near = {min(known, key=lambda k: abs(k / s - s / k)) for s in wanted}
    return tuple(sorted(near, reverse=True))


def on_canvas(
    model: Model, images: Tensor, fit: str, name: str, size: tuple[int, int] | None = None
) -> tuple[Canvas, Tensor]:
    """Return how images are brought to `size`, that of the model, and the images so brought."""
    h, w = images.shape[2:]
    found = canvas(h, w, size or model.preset.model.image_size, fit, name)
    return found, found.place(images).to(model_device(model))
