"""Zero-shot edits of images with a consistency model: `cmtool edit`, and `cmtool.edit` in Python.

Images are float in [-1, 1], (C, H, W) or (B, C, H, W), and so are the answers. Image i of a batch
takes the seed `seed + i`: a batch of equal images gives variations. Without a `label` each image of
a class-conditional model takes the class that fits it best. `fit` says what to do with an image
that has not the model's size: "exact" refuses it, "crop" takes its centre, "pad" fills it up,
"tile" works in overlapping tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cmtool import sampling
from cmtool.core import edits
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.prepared import (
    VARIATION,
    PreparedEdit,
    on_canvas,
    prepare_colorize,
    prepare_deblur,
    prepare_denoise,
    prepare_inpaint,
    prepare_outpaint,
    prepare_stroke,
    prepare_superres,
    prepare_variations,
    run_prepared,
    stroke_levels,
)
from cmtool.sampling import Plan, Sigmas, model_device


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
    model: Model, image: Tensor, factor: int = 2, *, noise: float = 0.0, steps: int | None = None,
    sigmas: Sigmas = None, label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image `factor` times as large; the means of the answer's blocks are its pixels.

    An image of the model's own size is sharpened: the means of its own blocks are kept. `noise` is
    the deviation of white noise in the image, which the answer has not.
    """
    prepare = partial(prepare_superres, factor=factor, noise=noise)
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
    model: Model, image: Tensor, kernel: Tensor, *, noise: float = 0.0, steps: int | None = None,
    sigmas: Sigmas = None, label: int | None = None, seed: int = 0, fit: str = "exact",
) -> Tensor:  # fmt: skip
    """Return the image without the blur of a kernel (h, w), odd sides: its frequencies stay.

    `noise` is as in superres. `cmtool.core.edits` has gaussian_kernel and motion_kernel.
    """
    prepare = partial(prepare_deblur, kernel=kernel, noise=noise)
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
    _check_class(model, label)
    if isinstance(start, int) and isinstance(end, int):
        chosen = sampling.plan(model.preset, steps, sigmas)
        return between_seeds(model, chosen, (start, end), frames, label)
    if isinstance(start, int) or isinstance(end, int):
        what = "a path from an image to a seed is not made"
        raise UserError(what, "give two images, or two seeds")
    _check_kind(model)
    chosen = sampling.edit_plan(model.preset, steps, sigmas, stroke_levels(model))
    return between_images(model, chosen, (_checked(start), _checked(end)), frames, seed, label)


Prepare = Callable[..., PreparedEdit]
"""`(model, images, ..., fit=, name=) -> PreparedEdit`; `name` is what messages call the images."""


def _edit(
    model: Model, prepare: Prepare, given: tuple[Tensor, ...], steps: int | None, sigmas: Sigmas,
    label: int | None, seed: int, fit: str, *, singly: bool = False,
) -> Tensor:  # fmt: skip
    """Return the edit of images and what belongs to them, all at once where that is possible."""
    _check_kind(model)
    _check_class(model, label)
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


def _check_kind(model: Model) -> None:
    """Raise UserError for a model that cannot edit."""
    if model.kind != "consistency":
        what = f"{model.source} is a {model.kind} model: edits need a consistency model"
        raise UserError(what, "distill it, or load another model")


def _check_class(model: Model, label: int | None) -> None:
    """Raise UserError for a class that the model does not know."""
    if label is not None:
        sampling.check_classes([label], 1, model.preset.model.num_classes)


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
        on_canvas(model, image[None], "exact", name)[1]
        for image, name in zip(images, names, strict=True)
    )
    weights = torch.linspace(0, 1, frames, device=start.device).reshape(-1, 1, 1, 1)
    edit = edits.stroke((1 - weights) * start + weights * end)
    if label is None:
        label = sampling.best_class(model, edits.stroke(start), chosen, seed)
    labels = None if label is None else torch.full((frames,), label, device=start.device)
    return sampling.run_edit(model, edit, chosen, [seed] * frames, labels)
