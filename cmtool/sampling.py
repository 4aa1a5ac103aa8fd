"""From a model and seeds to images: what sample, edit, eval and training runs all do.

`sample` is `cmtool.sample` in Python; the rest is what it and the commands are made of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core import samplers
from cmtool.core.edits import Edit, none_at_first, while_above
from cmtool.core.guidance import guided
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.core.tensors import identity, to_device
from cmtool.core.types import Denoiser, RandnLike
from cmtool.errors import InputError, UserError, nearest
from cmtool.models import Model
from cmtool.presets.build import build_curriculum, build_sampler, check_guided, noise_range
from cmtool.presets.schema import Card, Choice, Preset
from cmtool.system.devices import autocast
from cmtool.system.room import in_room
from cmtool.system.threads import side_by_side

Sigmas = Sequence[float] | None
"""Descending noise levels, if any are given."""
PUBLISHED_GRID = 40
CHUNK_PIXELS, MAX_CHUNK = 4096, 16
"""Most pixels, and most images, that the network sees at once on a CPU: this is quickest."""
LIGHT = 1e10
"""A network of fewer parameters times pixels of a chunk gains little by a second core."""
OnDrawn = Callable[[float, int], None]
"""Called with how many images' worth of network calls are done, and with the number of images."""


class Plan(NamedTuple):
    """A sampler and its descending levels; `evaluations` network calls an image."""

    sampler: Choice
    sigmas: tuple[float, ...]
    precision: str = "fp32"
    """Precision of the network; noise, scalings and the sampler's state are float32 or better."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1 for none."""

    @property
    def evaluations(self) -> int:
        """Network calls an image; with guidance a call is two."""
        calls = samplers.count_calls(build_sampler(self.sampler), self.sigmas)
        return calls if self.guidance == 1 else 2 * calls


def plan(
    preset: Card, steps: int | None = None, sigmas: Sigmas = None, sampler: Choice | None = None,
    guidance: float = 1.0,
) -> Plan:  # fmt: skip
    """Return how to sample a model: by what is given, else by what its preset says.

    Levels for n steps are the preset's tuned ones if it has them, else a Karras grid for a
    teacher and levels of the training grid for a consistency model. Raises UserError for a
    sampler or guidance that does not suit the model, for levels that it never saw, and for a model
    whose images cannot be shown.
    """
    if preset.model.channels not in (1, 3):
        what = f"the model has {preset.model.channels} channels: no picture has them"
        raise UserError(what, "use a model of 1 channel (grey) or 3 (RGB): --set model.channels=3")
    chosen = sampler or preset.sample.sampler
    known = samplers.SAMPLERS
    if chosen.name not in known:
        raise UserError(f"no sampler {chosen.name!r}", nearest(chosen.name, known))
    if chosen.name != "multistep" and preset.kind != "teacher":
        what = f"sampler {chosen.name!r} walks a teacher's ODE; this is a {preset.kind} model"
        raise UserError(what, "use multistep, or leave --sampler out")
    if chosen.name == "multistep" and preset.kind == "teacher":
        hint = nearest("multistep", [name for name in known if name != "multistep"])
        raise UserError("multistep needs a consistency model; this is a teacher", hint)
    if guidance != 1:
        check_guided(preset, f"guidance {guidance:g}")
    if sigmas is not None and steps is not None:
        raise UserError(f"both --steps {steps} and --sigmas", "give one of them")
    if sigmas is not None:
        if max(sigmas, default=0) > preset.noise.sigma_max:
            what = f"noise level {max(sigmas):g} is above the model's {preset.noise.sigma_max:g}"
            raise UserError(what, "the model never saw so much noise: lower the level")
        samplers.check_levels(sigmas, preset.noise.sigma_min)
        return Plan(chosen, tuple(sigmas), guidance=guidance)
    n = steps or preset.sample.steps
    levels = preset.sample.levels.get(str(n))
    if levels is None and preset.kind == "teacher":
        levels = samplers.sampling_levels(n, noise_range(preset))
    found = trained_levels(preset, n) if levels is None else levels
    return Plan(chosen, tuple(found), guidance=guidance)


def edit_plan(
    preset: Card, steps: int | None = None, sigmas: Sigmas = None, default: Sigmas = None
) -> Plan:
    """Return how to edit with a consistency model: `sigmas`, `steps`, or the edit's `default`.

    Without any of them the levels are the whole training grid, at most 40 of it: edits agree with
    what they keep step by step (Song et al. 2023, App. D).
    """
    if sigmas is None and steps is None and default is not None:
        sigmas = default
    if sigmas is None and steps is None:
        steps = min(grid_size(preset) - 1, PUBLISHED_GRID)
    return plan(preset, steps, sigmas)


def indexed_levels(preset: Card, indices: Sequence[int], grid: int | None) -> list[float]:
    """Return the levels that the paper's indices mean: 0,22,39 of 40 are 80 and 1.382.

    Index 0 is sigma_max; the last index, grid - 1, is where sampling ends and costs no call.
    `grid` is the model's own if None. Raises UserError.
    """
    points = grid or grid_size(preset)
    if points < 2:
        raise UserError(f"--grid {points}", "a grid has 2 points or more")
    ascend = all(a < b for a, b in itertools.pairwise(indices))
    if not ascend or len(indices) < 2 or indices[0] < 0 or indices[-1] != points - 1:
        hint = f"indices ascend from 0 (most noise) and end with {points - 1}, the clean image"
        raise UserError(f"--ts {','.join(map(str, indices))} on a grid of {points}", hint)
    levels = samplers.sampling_levels(points, noise_range(preset))
    return [levels[i] for i in indices[:-1]]


def trained_levels(preset: Card, n: int) -> list[float]:
    """Return n descending levels a consistency model was trained on, n equal strides by index.

    Between the levels of its grid a model distilled on a coarse one is much worse than on them.
    More levels than the grid has above sigma_min are taken from a grid that has enough.
    """
    size = grid_size(preset)
    grid = samplers.sampling_levels(max(size, n + 1), noise_range(preset))
    return [grid[round(i * (len(grid) - 1) / n)] for i in range(n)]


def grid_size(preset: Card) -> int:
    """Return the points of the grid a consistency model was trained on; 40 if it is unknown."""
    if preset.sample.grid is not None:
        return preset.sample.grid
    if isinstance(preset, Preset):
        return build_curriculum(preset)(preset.train.steps, preset.train.steps).n or PUBLISHED_GRID
    return PUBLISHED_GRID


def computing_in(f: Denoiser, precision: str, device: torch.device | str) -> Denoiser:
    """Return a model whose convolutions and products are in fp32, bf16 or fp16."""
    if precision == "fp32":
        return f
    kind = torch.device(device).type

    def mixed(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        with autocast(kind, precision):
            return f(x, sigma, *given)

    return mixed


def steady(
    f: Denoiser, network: nn.Module, size: tuple[int, int], device: torch.device | str
) -> Denoiser:
    """Return a model whose answer for an image does not depend on the batch it is in, on a CPU.

    On a GPU it depends on the size of the batch, in the last bits of a float, and the network sees
    as many images at once as there is room for. On a CPU chunks of several small images go side by
    side, each on one core. `network` is what f calls.
    """
    chunk = chunk_size(size, device)
    if chunk is None:
        return in_room(f, network, size)
    if chunk == 1:
        return samplers.in_chunks(f, chunk)
    is_light = sum(p.numel() for p in network.parameters()) * chunk * math.prod(size) < LIGHT
    return samplers.in_chunks(f, chunk, partial(side_by_side, is_light=is_light))


def chunk_size(size: tuple[int, int], device: torch.device | str) -> int | None:
    """Return how many images (H, W) the network sees at once; None for any number, on a GPU."""
    if torch.device(device).type != "cpu":
        return None
    return max(1, min(CHUNK_PIXELS // (size[0] * size[1]), MAX_CHUNK))


def counted(f: Denoiser, on_call: Callable[[int], None]) -> Denoiser:
    """Return a denoiser that calls `on_call` after each call, with how many images it was for."""

    def counting(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        x0 = f(x, sigma, *given)
        on_call(len(x))
        return x0

    return counting


def share_of(total: int, tell: Callable[[float], None]) -> Callable[[int], None]:
    """Return a function that adds up its numbers, and tells which share of a total they are."""
    done = 0
    turn = Lock()  # chunks go side by side

    def add(number: int) -> None:
        nonlocal done
        with turn:
            done += number
            tell(done / total)

    return add


def seen_by_network(num: int, batch: int, size: tuple[int, int], device: torch.device | str) -> int:
    """Return how many images the network sees for `num` of them, with those that fill up chunks."""
    chunk = chunk_size(size, device)
    if chunk is None:
        return num
    whole, rest = divmod(num, batch)
    return whole * -(-batch // chunk) * chunk + -(-rest // chunk) * chunk


def _finite(x0: Tensor) -> Tensor:
    """Return images. Raises InputError for values that are not finite, which would be black."""
    if not bool(torch.isfinite(x0).all()):
        hint = "the model diverged: use an earlier checkpoint; or use --precision fp32"
        raise InputError("the model makes values that are not finite", hint)
    return x0


def sample(
    model: Model,
    seeds: Iterable[int],
    *,
    steps: int | None = None,
    sigmas: Sigmas = None,
    labels: int | Sequence[int] | Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1], one a seed: those that `cmtool sample` draws.

    `steps` or `sigmas` choose the noise levels, by default the model's preset does. `labels` are
    one class, or one a seed; without them a class-conditional model draws each image's class from
    its seed. `guidance` is for a teacher. Raises UserError for what the model does not know.
    """
    numbers = list(seeds)
    chosen = plan(model.preset, steps, sigmas, guidance=guidance)
    classes = None if labels is None else torch.as_tensor(labels).reshape(-1)
    if classes is not None:
        check_classes(classes.tolist(), len(numbers), model.preset.model.num_classes)
        classes = classes.expand(len(numbers))
    device = str(model_device(model))
    images = generate(model.f, model.preset, chosen, numbers, labels=classes, device=device)
    return torch.cat(list(images)).clamp(-1, 1)


def check_classes(classes: Sequence[int], num_images: int, num_classes: int) -> None:
    """Raise UserError unless there is one class, or one an image, and the model knows them all."""
    for index in classes:
        if not num_classes:
            raise UserError(f"class {index} for an unconditional model", "leave the class out")
        if not 0 <= index < num_classes:
            what = f"the model has no class {index}"
            raise UserError(what, f"its classes are 0 to {num_classes - 1}")
    if len(classes) not in (1, num_images):
        what = f"{len(classes)} classes for {num_images} seeds"
        raise UserError(what, "give one class, or one per seed")


def model_device(model: Model) -> torch.device:
    """Return the device that a model is on."""
    return next(model.f.parameters()).device


def provenance(model: Model, chosen: Plan) -> dict[str, str]:
    """Return what a PNG says of how it was sampled, without its seed and class."""
    options = ",".join(f"{key}={value}" for key, value in chosen.sampler.options.items())
    return {
        **model.told(),
        "cmtool:sampler": f"{chosen.sampler.name}({options})" if options else chosen.sampler.name,
        "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)),
        **({} if chosen.guidance == 1 else {"cmtool:guidance": repr(chosen.guidance)}),
        **precision_info(chosen),
    }


def precision_info(chosen: Plan) -> dict[str, str]:
    """Return what a PNG says of the precision: nothing of fp32, which is the default."""
    return {} if chosen.precision == "fp32" else {"cmtool:precision": chosen.precision}


@torch.no_grad()
def generate(
    f: Preconditioned,
    preset: Card,
    chosen: Plan,
    seeds: Sequence[int],
    *,
    labels: Tensor | None = None,
    batch: int = 256,
    device: str = "cpu",
    noise: RandnLike | None = None,
    on_drawn: OnDrawn | None = None,
) -> Iterator[Tensor]:
    """Yield images (B, C, H, W) in [-1, 1] for consecutive batches of seeds.

    An image is a function of its seed, its label and the plan. Without `labels` a conditional
    model draws each image's class from its seed. `noise` replaces the noise of the seeds.
    `on_drawn` is told of each call's progress. Raises InputError for values that are not finite.
    """
    denoiser = computing_in(f, chosen.precision, device)
    if on_drawn is not None:
        denoiser = _telling(denoiser, preset, chosen, len(seeds), batch, device, on_drawn)
    denoiser = guided(denoiser, chosen.guidance)
    denoiser = samplers.clipped(steady(denoiser, f, preset.model.image_size, device))
    draw = build_sampler(chosen.sampler)
    shape = (preset.model.channels, *preset.model.image_size)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        given = None if labels is None else labels[start : start + batch]
        if given is None and preset.model.num_classes:
            given = seeded_labels(part, preset.model.num_classes)
        given = None if given is None else to_device(given, device)
        init = torch.zeros(len(part), *shape, device=device)
        own, sigma_min = noise or SeededNoise(part), preset.noise.sigma_min
        yield _finite(draw(denoiser, init, chosen.sigmas, own, sigma_min=sigma_min, labels=given))


def _telling(
    f: Denoiser, preset: Card, chosen: Plan, num: int, batch: int, device: str, on_drawn: OnDrawn
) -> Denoiser:
    """Return a denoiser that tells how much of the drawing of `num` images is done."""
    on_drawn(0, num)
    calls = seen_by_network(num, batch, preset.model.image_size, device) * chosen.evaluations
    return counted(f, share_of(calls, lambda share: on_drawn(share * num, num)))


@torch.no_grad()
def run_edit(
    model: Model, edit: Edit, chosen: Plan, seeds: Sequence[int], labels: Tensor | None
) -> Tensor:
    """Return the edited images (B, C, H, W) in [-1, 1], one seed and label each.

    What the edit keeps is kept. Images larger than the model's are made of overlapping tiles.
    Raises InputError for values that are not finite.
    """
    return edit.finish(_finite(_edited(model, edit, chosen, SeededNoise(seeds), labels)))


def _edited(
    model: Model, edit: Edit, chosen: Plan, noise: RandnLike, labels: Tensor | None
) -> Tensor:
    """Return what the model answers to an edit of pictures of any size."""
    size, device = model.preset.model.image_size, edit.init.device
    f = steady(computing_in(model.f, chosen.precision, device), model.f, size, device)
    return samplers.multistep(
        samplers.clipped(samplers.tiled(f, size)),
        edit.init,
        chosen.sigmas,
        none_at_first(noise) if edit.is_noisy else noise,
        sigma_min=model.preset.noise.sigma_min,
        labels=labels,
        project=while_above(edit.project, chosen.sigmas, edit.noise),
    )


@torch.no_grad()
def best_class(model: Model, edit: Edit, chosen: Plan, seed: int) -> int | None:
    """Return the class under which an edit's answer (of one image) fits best what was given.

    The edit is run once per class. What is given is what `project` puts back, by how much it has
    to change x0; where it puts back nothing, the image the edit started from. None for an
    unconditional model.
    """
    num_classes = model.preset.model.num_classes
    if not num_classes:
        return None
    gaps: list[Tensor] = []

    def project(x0: Tensor) -> Tensor:
        kept = edit.project(x0)
        wanted = edit.init if edit.project is identity else kept
        gaps.append((wanted - x0).square().flatten(1).sum(1))
        return kept

    noise = SeededNoise([seed])

    def same_for_all(like: Tensor) -> Tensor:
        return noise(like[:1]).expand_as(like)

    init = edit.init[:1].expand(num_classes, *edit.init.shape[1:])
    labels = torch.arange(num_classes, device=init.device)
    _edited(model, replace(edit, init=init, project=project), chosen, same_for_all, labels)
    return int(torch.stack(gaps[1:] or gaps).mean(0).argmin())
