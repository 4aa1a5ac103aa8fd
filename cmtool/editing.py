"""Zero-shot edits of images with a consistency model: `cmtool edit`, and `cmtool.edit` in Python.

Images are float in [-1, 1], (C, H, W) or (B, C, H, W), and so are the answers. Image i of a batch
takes the seed `seed + i`: a batch of equal images gives variations. Without a `label` each image of
a class-conditional model takes the class that fits it best. `fit` says what to do with an image
that has not the model's size: "exact" refuses it, "crop" takes its centre, "pad" fills it up,
"tile" works in overlapping tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cmtool import sampling
from cmtool.core import edits
from cmtool.core.edits import Edit
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.core.samplers import sampling_levels
from cmtool.data.images import Canvas, canvas
from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.sampling import Plan, Sigmas, model_device

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


def inpaint(
    model: Model, image: Tensor, mask: Tensor, *, steps: int | None = None, sigmas: Sigmas = None,
    label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image with the masked pixels made anew; every other pixel stays as it is.

    mask (H, W), (1, H, W) or (B, 1, H, W) bool: True is made anew. Raises InputError when the
    sizes differ.
    """
    if mask.dtype != torch.bool:
        raise InputError(f"the mask is {mask.dtype}, not bool", "give mask > 0.5, or the like")
    mask = mask[(None,) * (4 - mask.ndim)].expand(_batch(image).shape[0], -1, -1, -1)
    return _edit(model, prepare_inpaint, (image, mask), steps, sigmas, label, seed, fit)


def superres(
    model: Model, image: Tensor, factor: int = 2, *, steps: int | None = None,
    sigmas: Sigmas = None, label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image `factor` times as large; the means of the answer's blocks are its pixels.

    An image of the model's own size is sharpened: the means of its own blocks are kept.
    """
    prepare = partial(prepare_superres, factor=factor)
    return _edit(model, prepare, (image,), steps, sigmas, label, seed, fit)


def colorize(
    model: Model, image: Tensor, *, steps: int | None = None, sigmas: Sigmas = None,
    label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image, of one or three channels, with new colours; its luma stays."""
    image = image.expand(*image.shape[:-3], 3, -1, -1) if image.shape[-3] == 1 else image
    return _edit(model, prepare_colorize, (image,), steps, sigmas, label, seed, fit)


def stroke(
    model: Model, image: Tensor, *, steps: int | None = None, sigmas: Sigmas = None,
    label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return a picture made of a rough painting; a higher first sigma leaves less of it."""
    return _edit(model, prepare_stroke, (image,), steps, sigmas, label, seed, fit)


def denoise(
    model: Model, image: Tensor, sigma: float | None = None, *, label: int | None = None,
    seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image without its white noise of deviation `sigma`, estimated if None.

    sigma is in the units of images in [-1, 1]: 2 / 255 is one grey level.
    """
    prepare = partial(prepare_denoise, sigma=sigma)
    return _edit(model, prepare, (image,), None, None, label, seed, fit, singly=sigma is None)


def deblur(
    model: Model, image: Tensor, kernel: Tensor, *, steps: int | None = None,
    sigmas: Sigmas = None, label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image without the blur of a kernel (h, w), odd sides: its frequencies stay.

    `cmtool.core.edits` has gaussian_kernel and motion_kernel.
    """
    prepare = partial(prepare_deblur, kernel=kernel)
    return _edit(model, prepare, (image,), steps, sigmas, label, seed, fit)


def outpaint(
    model: Model, image: Tensor, margins: tuple[int, int, int, int], *, steps: int | None = None,
    sigmas: Sigmas = None, label: int | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Return the image with new pixels around it: left, top, right and bottom `margins`."""
    prepare = partial(prepare_outpaint, margins=margins)
    return _edit(model, prepare, (image,), steps, sigmas, label, seed, "tile")


def variations(
    model: Model, image: Tensor, sigma: float = VARIATION, *, label: int | None = None,
    seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return another picture like the image: noised to the level sigma, and back."""
    prepare = partial(prepare_variations, sigma=sigma)
    return _edit(model, prepare, (image,), None, None, label, seed, fit)


def interpolate(
    model: Model, start: Tensor | int, end: Tensor | int, *, frames: int = 8,
    steps: int | None = None, sigmas: Sigmas = None, label: int | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Return `frames` images from start to end, both included: two images, or two seeds.

    Between seeds the noise travels a great circle. Images (C, H, W) of the model's size are mixed
    under the noise of `seed` at the first level.
    """
    if isinstance(start, int) and isinstance(end, int):
        chosen = sampling.plan(model.preset, steps, sigmas)
        return between_seeds(model, chosen, (start, end), frames, label)
    if isinstance(start, int) or isinstance(end, int):
        raise UserError("an image and a seed", "give two images, or two seeds")
    chosen = sampling.edit_plan(model.preset, steps, sigmas, stroke_levels(model))
    return between_images(model, chosen, (_checked(start), _checked(end)), frames, seed, label)


Prepare = Callable[..., PreparedEdit]
"""`(model, images, ..., fit=, name=) -> PreparedEdit`; `name` is what messages call the images."""


def _edit(
    model: Model, prepare: Prepare, given: tuple[Tensor, ...], steps: int | None, sigmas: Sigmas,
    label: int | None, seed: int, fit: str, *, singly: bool = False,
) -> Tensor:  # fmt: skip
    """Return the edit of images and what belongs to them, all at once where that is possible."""
    image = _checked(given[0])
    batch = list(map(_batch, given))
    if image.shape[-3] != model.preset.model.channels:
        what = f"the image has {image.shape[-3]} channels, not {model.preset.model.channels}"
        raise InputError(what, "give an image as the model makes them")
    singly = singly or (label is None and model.preset.model.num_classes > 0)
    size = 1 if singly else len(batch[0])
    answers: list[Tensor] = []
    for part in zip(*(tensor.split(size) for tensor in batch), strict=True):
        prepared = prepare(model, *part, fit=fit, name="the image")
        chosen = sampling.edit_plan(model.preset, steps, sigmas, prepared.levels)
        first, fits = seed + len(answers), label  # a part is one image, or all
        if fits is None:
            fits = sampling.best_class(model, prepared.edit, chosen, first)
        seeds = range(first, first + len(part[0]))
        answers.append(run_prepared(prepared, model, chosen, seeds, fits))
    answer = torch.cat(answers)
    return answer if image.ndim == 4 else answer[0]


def _checked(image: Tensor) -> Tensor:
    """Return the image. Raises InputError unless it is float and has 3 or 4 dimensions."""
    if not image.is_floating_point():
        what = f"the image is {image.dtype}, not float in [-1, 1]"
        raise InputError(what, "give image / 127.5 - 1")
    if image.ndim not in (3, 4):
        raise InputError(f"the image is {tuple(image.shape)}", "give (C, H, W) or (B, C, H, W)")
    return image


def _batch(image: Tensor) -> Tensor:
    return image if image.ndim == 4 else image[None]


def prepare_inpaint(
    model: Model, images: Tensor, mask: Tensor, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that makes the pixels anew where the mask (B or 1, 1, H, W) is True.

    Raises InputError for a mask of another size.
    """
    edits.inpaint(images, ~mask)  # raises for sizes that differ, before both are cropped
    layout, x = _on_canvas(model, images, fit, name)
    edit = edits.inpaint(x, ~layout.place(mask).to(x.device))
    return PreparedEdit(edit, layout, (layout.unpad(x), layout.unpad(edit.init)))


def prepare_superres(
    model: Model, images: Tensor, factor: int, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that enlarges images `factor` times.

    Images that have the model's size already count as enlarged by repeating: their block means are
    kept. Raises UserError for a factor that does not divide the model's size.
    """
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
        small, low = _on_canvas(model, images, fit, shown, small_size)
        large = small.scaled(factor)
    edit = edits.superres(low, factor)
    return PreparedEdit(edit, large, (large.unpad(edit.init),))


def prepare_colorize(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
    """Return the edit that gives images new colours and keeps their luma.

    Raises InputError for a model of one channel.
    """
    if model.preset.model.channels != 3:
        raise InputError(f"{model.source} makes grey pictures", "give a model of colour pictures")
    layout, x = _on_canvas(model, images, fit, name)
    gray = edits.luma(x)
    panels = (layout.unpad(x), layout.unpad(gray.expand_as(x)))
    return PreparedEdit(edits.colorize(gray), layout, panels)


def prepare_stroke(model: Model, images: Tensor, *, fit: str, name: str) -> PreparedEdit:
    """Return the edit that makes pictures of rough paintings."""
    layout, x = _on_canvas(model, images, fit, name)
    return PreparedEdit(edits.stroke(x), layout, (layout.unpad(x),), stroke_levels(model))


def prepare_denoise(
    model: Model, images: Tensor, sigma: float | None, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that takes noise of deviation `sigma` out; of one image if it is None.

    Raises UserError for a sigma outside the model's range.
    """
    layout, x = _on_canvas(model, images, fit, name)
    low, high = model.preset.noise.sigma_min, model.preset.noise.sigma_max
    if sigma is None:
        sigma = min(max(float(edits.estimate_sigma(x)), low), high)
    _check_level(model, sigma)
    return PreparedEdit(edits.denoise(x), layout, (layout.unpad(x),), (sigma,))


def prepare_deblur(
    model: Model, images: Tensor, kernel: Tensor, *, fit: str, name: str
) -> PreparedEdit:
    """Return the edit that takes the blur of a kernel (h, w) out.

    Raises UserError for a kernel larger than the images.
    """
    layout, x = _on_canvas(model, images, fit, name)
    edit = edits.deblur(x, kernel)
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
    layout, x = _on_canvas(model, images, fit, name)
    _check_level(model, sigma)
    levels = near_levels(model, (sigma, sigma / 4))
    return PreparedEdit(edits.stroke(x), layout, (layout.unpad(x),), levels)


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


def between_seeds(
    model: Model, chosen: Plan, seeds: tuple[int, int], frames: int, label: int | None
) -> Tensor:
    """Return `frames` images (n, C, H, W) from one seed's noise to another's.

    The first and the last are what `sample` draws from these seeds, of the class of the first.
    """
    ends = [SeededNoise([seed]) for seed in seeds]
    weights = torch.linspace(0, 1, frames)

    def path(like: Tensor) -> Tensor:
        start, end = (noise(like[:1]) for noise in ends)
        return edits.interpolate(start, end, weights)

    if label is None and model.preset.model.num_classes:
        label = int(seeded_labels(seeds[:1], model.preset.model.num_classes))
    labels = None if label is None else torch.full((frames,), label)
    images = sampling.generate(
        model.f, model.preset, chosen, range(frames), labels=labels, batch=frames,
        device=str(model_device(model)), noise=path,
    )  # fmt: skip
    return torch.cat(list(images))


def between_images(
    model: Model, chosen: Plan, images: Sequence[Tensor], frames: int, seed: int,
    label: int | None, names: Sequence[str] = ("the image", "the image"),
) -> Tensor:  # fmt: skip
    """Return `frames` images (n, C, H, W) from one image (C, H, W) to another.

    Both are noised alike to the first level, mixed there, and denoised (Ho et al. 2020, sec. 4.4):
    a high level mixes what they show, a low one their pixels. Raises InputError for images that
    have not the model's size.
    """
    start, end = (
        _on_canvas(model, image[None], "exact", name)[1]
        for image, name in zip(images, names, strict=True)
    )
    weights = torch.linspace(0, 1, frames, device=start.device).reshape(-1, 1, 1, 1)
    edit = edits.stroke((1 - weights) * start + weights * end)
    if label is None:
        label = sampling.best_class(model, edits.stroke(start), chosen, seed)
    labels = None if label is None else torch.full((frames,), label, device=start.device)
    return sampling.run_edit(model, edit, chosen, [seed] * frames, labels)


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


def _on_canvas(
    model: Model, images: Tensor, fit: str, name: str, size: tuple[int, int] | None = None
) -> tuple[Canvas, Tensor]:
    """Return how images are brought to `size`, that of the model, and the images so brought."""
    h, w = images.shape[2:]
    found = canvas(h, w, size or model.preset.model.image_size, fit, name)
    return found, found.place(images).to(model_device(model))
