"""From a picture of the user's to edited ones: sizes, classes, variations, and what to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmtool.core import edits
from cmtool.core.edits import Edit
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.core.samplers import sampling_levels
from cmtool.data.images import Canvas, canvas, from_uint8, to_uint8
from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.sampling import Plan, best_class, generate, grid_size, run_edit

STROKE_LEVELS = ((5.38, 1.0), (2.24, 0.4))
"""The paper's levels for strokes on pictures of 256 pixels (App. D), and the least of each."""


@dataclass(frozen=True)
class Job:
    """One picture to edit: the edit on a canvas a model can make, and what part is the answer.

    `panels` (1, C, H, W) uint8 are what was given and what the edit sees of it, at the size of the
    answer, to compare with; `levels` are the edit's own noise levels, if it has any.
    """

    edit: Edit
    place: Canvas
    panels: tuple[Tensor, ...]
    levels: tuple[float, ...] | None = None


def inpaint_job(picture: Tensor, mask: Tensor, model: Model, fit: str, name: str) -> Job:
    """Return the job that regenerates the white part of a mask (1, H, W) uint8.

    picture (C, H, W) uint8, and so are those of the other jobs. Raises InputError for a mask of
    another size.
    """
    edits.inpaint(picture[None], mask[None] < 128)  # sizes agree before they are fitted
    place = _place(picture, model.preset.model.image_size, fit, name)
    known = mask[None] < 128
    laid, known = place.laid(picture[None]), place.laid(known)
    edit = edits.inpaint(_floats(laid, model), known.to(_device(model)))
    panels = (laid, torch.where(known, laid, 128))
    return Job(edit, place, tuple(map(place.taken, panels)))


def superres_job(picture: Tensor, factor: int, model: Model, fit: str, name: str) -> Job:
    """Return the job that enlarges a picture `factor` times.

    A picture that has the model's size already is one that was enlarged by repeating: its block
    means are kept. Raises UserError for a factor that does not divide the model's size.
    """
    size = model.preset.model.image_size
    if factor < 2:
        raise UserError(f"--factor {factor}", "give 2 or more")
    if fit == "exact":
        edits.block_means(torch.zeros(1, 1, *size), factor)  # the factor divides
    if fit == "exact" and tuple(picture.shape[1:]) == size:
        low = edits.block_means(_floats(picture[None], model), factor)
        place = Canvas((0, 0, *size), (0, 0))
    else:
        small = (-(-size[0] // factor), -(-size[1] // factor))
        below = _place(picture, small, fit, f"{name}, to be enlarged {factor} times,")
        low = _floats(below.laid(picture[None]), model)
        place = below.scaled(factor)
    given = edits.enlarged(to_uint8(low), factor).cpu()
    return Job(edits.superres(low, factor), place, (place.taken(given),))


def colorize_job(picture: Tensor, model: Model, fit: str, name: str) -> Job:
    """Return the job that gives a picture new colours and keeps its luma.

    Raises InputError for a model of one channel.
    """
    if model.preset.model.channels != 3:
        raise InputError(f"{model.source} makes grey pictures", "give a model of colour pictures")
    place = _place(picture, model.preset.model.image_size, fit, name)
    laid = place.laid(picture[None])
    gray = edits.luma(_floats(laid, model))
    panels = (laid, to_uint8(gray).cpu().expand(1, 3, *gray.shape[2:]))
    return Job(edits.colorize(gray), place, tuple(map(place.taken, panels)))


def stroke_job(picture: Tensor, model: Model, fit: str, name: str) -> Job:
    """Return the job that makes a picture of a rough painting."""
    place = _place(picture, model.preset.model.image_size, fit, name)
    laid = place.laid(picture[None])
    edit = edits.stroke(_floats(laid, model))
    return Job(edit, place, (place.taken(laid),), stroke_levels(model))


def denoise_job(picture: Tensor, sigma: float | None, model: Model, fit: str, name: str) -> Job:
    """Return the job that takes noise of deviation `sigma` out; estimated if None.

    sigma is in the units of images in [-1, 1]: 2 / 255 is one grey level. Raises UserError for one
    outside the model's range.
    """
    place = _place(picture, model.preset.model.image_size, fit, name)
    laid = place.laid(picture[None])
    noisy = _floats(laid, model)
    low, high = model.preset.noise.sigma_min, model.preset.noise.sigma_max
    if sigma is None:
        sigma = min(max(float(edits.estimate_sigma(noisy)), low), high)
    if not low <= sigma <= high:
        raise UserError(f"--sigma {sigma:g}", f"the model knows {low:g} to {high:g}")
    return Job(edits.denoise(noisy), place, (place.taken(laid),), (sigma,))


def do(
    job: Job, model: Model, chosen: Plan, seeds: Sequence[int], label: int | None
) -> tuple[Tensor, int | None]:
    """Return the answers (n, C, h, w) uint8, one a seed, and the class that was used.

    A class-conditional model without `label` takes the class that fits best.
    """
    if label is None and model.preset.model.num_classes:
        label = best_class(model, job.edit, chosen, seeds[0])
    n = len(seeds)
    edit = replace(job.edit, init=job.edit.init.expand(n, -1, -1, -1))
    labels = None if label is None else torch.full((n,), label, device=edit.init.device)
    result = run_edit(model, edit, chosen, seeds, labels)
    return job.place.taken(to_uint8(result).cpu()), label


def between_seeds(
    model: Model, chosen: Plan, seeds: tuple[int, int], frames: int, label: int | None
) -> Tensor:
    """Return `frames` images (n, C, H, W) uint8 from one seed's noise to another's.

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
    images = generate(
        model.f, model.preset, chosen, range(frames), labels=labels, batch=frames,
        device=str(_device(model)), noise=path,
    )  # fmt: skip
    return to_uint8(torch.cat(list(images))).cpu()


def between_pictures(
    model: Model, chosen: Plan, pictures: tuple[Tensor, Tensor], frames: int, seed: int,
    label: int | None,
) -> Tensor:  # fmt: skip
    """Return `frames` images (n, C, H, W) uint8 from one picture (C, H, W) uint8 to another.

    Both are noised alike to the first level, mixed there, and denoised (Ho et al. 2020, sec. 4.4):
    a high level mixes what they show, a low one their pixels.
    """
    ends = [_floats(picture[None], model) for picture in pictures]
    weights = torch.linspace(0, 1, frames, device=ends[0].device).reshape(-1, 1, 1, 1)
    edit = edits.stroke((1 - weights) * ends[0] + weights * ends[1])
    if label is None and model.preset.model.num_classes:
        label = best_class(model, edits.stroke(ends[0]), chosen, seed)
    labels = None if label is None else torch.full((frames,), label, device=ends[0].device)
    return to_uint8(run_edit(model, edit, chosen, [seed] * frames, labels)).cpu()


def stroke_levels(model: Model) -> tuple[float, ...]:
    """Return levels for strokes: high enough to lose the brush, low enough to keep the drawing.

    A drawing drowns in less noise the fewer its pixels, so the paper's levels shrink with the
    side; those of the training grid nearest to that are taken.
    """
    side = min(model.preset.model.image_size)
    known = sampling_levels(grid_size(model.preset), model.noise_range)[:-1]
    wanted = [max(level * side / 256, least) for level, least in STROKE_LEVELS]
    near = {min(known, key=lambda k: abs(k / s - s / k)) for s in wanted}
    return tuple(sorted(near, reverse=True))


def _place(picture: Tensor, size: tuple[int, int], fit: str, name: str) -> Canvas:
    h, w = picture.shape[1:]
    return canvas(h, w, size, fit, name)


def _floats(images: Tensor, model: Model) -> Tensor:
    """Return uint8 images in [-1, 1] on the model's device."""
    return from_uint8(images).to(_device(model))


def _device(model: Model) -> torch.device:
    return next(model.f.parameters()).device
