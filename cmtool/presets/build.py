"""From the names and options in a preset to components: registry rows with options bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cmtool.core.augment import LABELS, Augment, augmented
from cmtool.core.distances import DISTANCES, NORMS
from cmtool.core.losses import (
    WEIGHTINGS,
    Objective,
    Pair,
    consistency_objective,
    continuous_loss,
    continuous_objective,
    denoising_objective,
    live_loss,
    noise_pair,
    noise_point,
    progressive_objective,
    teacher_pair,
    teacher_point,
)
from cmtool.core.networks import NETWORKS
from cmtool.core.networks.layers import MAX_BLOCKS
from cmtool.core.noise import CURRICULA, LEVELS, Curriculum, LevelPicker, NoiseRange
from cmtool.core.precond import (
    NOISE_LABELS,
    SCALINGS,
    Preconditioned,
    consistency_scalings,
)
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.core.tangents import OdePoint
from cmtool.core.types import Denoiser, Distance, Weighting
from cmtool.errors import UserError, nearest
from cmtool.presets.schema import Card, Choice, Kind, ModelSection, Preset


def pick(
    registry: Mapping[str, Callable[..., Any]],
    choice: Choice,
    key: str,
    given: Collection[str] = (),
) -> Callable[..., Any]:
    """Return the component a preset names, with its options bound.

    Options are its keyword-only parameters but those `given` by the caller. Raises UserError for
    an unknown name or option, naming the good ones, and for an option of the wrong type.
    """
    if choice.name not in registry:
        raise UserError(f"{key} = {choice.name!r}", nearest(choice.name, registry))
    component = registry[choice.name]
    known = inspect.signature(component, eval_str=True).parameters.values()
    types = {p.name: p.annotation for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY}
    options = {}
    for option, value in choice.options.items():
        good = sorted(types.keys() - set(given))
        if option not in good:
            hint = nearest(option, good) if good else "leave it out"
            raise UserError(f"{key} = {choice.name!r} has no option {option!r}", hint)
        try:
            options[option] = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise UserError(f"{key}.{option} = {value!r}: {reason}", "mend its type") from None
    return partial(component, **options) if options else component


def build_network(model: ModelSection) -> nn.Module:
    """Return the raw network of a model section, with PyTorch's global generators for its start.

    Raises UserError for an unknown network or option, or an option of the wrong type.
    """
    choice = model.network
    if choice.name not in NETWORKS:
        raise UserError(f"model.network = {choice.name!r}", nearest(choice.name, NETWORKS))
    kind = NETWORKS[choice.name]
    known = [field.name for field in fields(kind.options)]
    for option, value in choice.options.items():
        if option not in known:
            raise UserError(
                f"network {choice.name!r} has no option {option!r}", nearest(option, known)
            )
        if isinstance(value, list) and len(value) > MAX_BLOCKS:
            raise UserError(f"model.network.{option} has {len(value):,} entries", "shorten it")
    try:
        options = TypeAdapter(kind.options).validate_python(choice.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"model.network.{key} = {first['input']!r}: {first['msg'].lower()}", "mend its type"
        ) from None
    try:
        return kind.build(options, model.channels, model.num_classes)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"network {choice.name!r} cannot be built: {error}", "mend model.network"
        ) from None


def noise_range(preset: Card) -> NoiseRange:
    """Return the range of noise levels of a preset."""
    return NoiseRange(preset.noise.sigma_min, preset.noise.sigma_max, preset.noise.rho)


def build_denoiser(preset: Card, kind: Kind, network: nn.Module) -> Preconditioned:
    """Return a Denoiser of the preset: its plain scalings for a teacher, else shifted ones."""
    plain = pick(SCALINGS, preset.model.scalings, "model.scalings")
    return Preconditioned(
        network,
        plain if kind == "teacher" else consistency_scalings,
        pick(NOISE_LABELS, preset.model.noise_label, "model.noise_label"),
        sigma_data=preset.model.sigma_data,
        sigma_min=preset.noise.sigma_min,
    )


def build_objective(preset: Preset, teacher: Denoiser | None, device: str = "cpu") -> Objective:
    """Return the preset's training objective. Raises UserError if it lacks the teacher it needs."""
    loss = preset.loss
    levels = pick(LEVELS, loss.levels, "loss.levels")
    weight = partial(
        pick(WEIGHTINGS, loss.weight, "loss.weight", given=["sigma_data"]),
        sigma_data=preset.model.sigma_data,
    )
    augment = build_augment(preset)
    if loss.continuous and loss.pair not in ("noise", "teacher"):
        raise UserError(f"loss.pair = {loss.pair!r} in continuous time", "use noise or teacher")
    if loss.pair == "none":
        return denoising_objective(levels, weight, noise_range(preset), augment)
    distance = pick(DISTANCES, loss.distance, "loss.distance")
    if (loss.pair == "progressive") != (loss.target == "previous"):
        raise UserError(
            f"loss.pair = {loss.pair!r} with loss.target = {loss.target!r}",
            "progressive goes with previous, and with nothing else",
        )
    if loss.pair == "progressive":
        return progressive_objective(levels, distance, weight, noise_range(preset))
    blank = torch.zeros(1, preset.model.channels, *preset.model.image_size, device=device)
    distance(blank, blank)  # what it lacks, such as a weight file, it says now
    if loss.pair == "teacher" and teacher is None:
        raise UserError("this preset distills a teacher", "run it with cmtool distill")
    if loss.continuous:
        return _continuous_objective(preset, levels, distance, weight, teacher)
    if loss.target == "live":
        raise UserError("loss.target = 'live' with two levels", "set loss.continuous = true")
    if teacher is None or loss.pair == "noise":

        def make_pair(x0: Tensor, hi: Tensor, lo: Tensor, noise: Tensor, _: Tensor | None) -> Pair:
            return noise_pair(x0, hi, lo, noise)

    else:
        make_pair = partial(
            teacher_pair, teacher=teacher, solver=pick(SOLVERS, loss.solver, "loss.solver")
        )
    return consistency_objective(levels, make_pair, distance, weight, noise_range(preset))


def _continuous_objective(
    preset: Preset,
    levels: LevelPicker,
    distance: Distance,
    weight: Weighting,
    teacher: Denoiser | None,
) -> Objective:
    """Return the objective of continuous time, where pairs and targets of two levels differ."""
    loss, norm = preset.loss, preset.loss.distance.name in NORMS
    if loss.target not in ("student", "live"):
        raise UserError(
            f"loss.target = {loss.target!r} in continuous time",
            "use student (its output held fixed) or live (differentiated too)",
        )
    if loss.target == "live" and loss.pair == "noise":
        raise UserError(
            "loss.target = 'live' without a teacher: the noise's own variance would be minimised",
            "set loss.target = 'student'",
        )
    if loss.target == "live" and preset.train.checkpoint_activations:
        raise UserError(
            "loss.target = 'live' with train.checkpoint_activations: what is computed again cannot"
            " be differentiated forwards",
            "leave train.checkpoint_activations out, and split the batch with --accumulate",
        )
    if loss.target == "student" and norm:
        raise UserError(
            f"loss.distance = {loss.distance.name!r} has no curvature, which a target held fixed"
            " needs in continuous time",
            "use another, such as l2, or distill with loss.target = 'live'",
        )
    if teacher is None or loss.pair == "noise":

        def make_point(x0: Tensor, sigma: Tensor, noise: Tensor, _: Tensor | None) -> OdePoint:
            return noise_point(x0, sigma, noise)

    else:
        make_point = partial(teacher_point, teacher=teacher)
    which = partial(live_loss, norm=norm) if loss.target == "live" else continuous_loss
    near = partial(which, distance=distance, weight=weight)
    return continuous_objective(levels, make_point, near, noise_range(preset))


def build_augment(preset: Preset) -> Augment | None:
    """Return how training images are warped, None for not at all.

    Raises UserError unless a teacher is trained whose network takes the labels of EDM's warps.
    """
    if not preset.data.augment:
        return None
    what = f"data.augment = {preset.data.augment}"
    if preset.loss.pair != "none":
        raise UserError(f"{what} for a model that is not an EDM teacher", "--set data.augment=0")
    known = preset.model.network.options.get("augment_dim", 0)
    if known != LABELS:
        raise UserError(
            f"{what} with model.network.augment_dim = {known}",
            f"the network must be told: --set model.network.augment_dim={LABELS}",
        )
    if preset.data.flip:
        raise UserError(f"{what} with data.flip", "it mirrors by itself: --set data.flip=false")
    return partial(augmented, p=preset.data.augment)


def build_curriculum(preset: Preset) -> Curriculum:
    """Return the preset's N(k) and mu(k)."""
    return pick(CURRICULA, preset.loss.curriculum, "loss.curriculum")


def build_sampler(choice: Choice) -> Callable[..., Tensor]:
    """Return a sampler by its choice."""
    given = ["sigma_min", "labels", "project", "solver"]
    return pick(SAMPLERS, choice, "sample.sampler", given)
