"""From the names and options in a preset to components: registry rows with options bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cmtool.core.augment import LABELS, Augment, augmented
from cmtool.core.distances import DISTANCES, is_norm
from cmtool.core.guidance import guided
from cmtool.core.losses import WEIGHTINGS
from cmtool.core.methods import METHODS, Before, Method, MethodRow
from cmtool.core.networks import NETWORKS
from cmtool.core.networks.guided import Guided
from cmtool.core.networks.layers import MAX_BLOCKS
from cmtool.core.networks.truncated import Truncated
from cmtool.core.noise import CURRICULA, LEVELS, Curriculum, LevelPicker, NoiseRange
from cmtool.core.objective import Objective, make_objective
from cmtool.core.paths import SOURCES, Draw
from cmtool.core.precond import NOISE_LABELS, SCALINGS, Preconditioned, is_two_time
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.core.types import Denoiser, Distance
from cmtool.errors import UserError, nearest
from cmtool.presets.schema import (
    MAX_LEVELS,
    Card,
    Choice,
    Kind,
    ModelSection,
    Preset,
    SampleSection,
)

Registry = Mapping[str, Callable[..., Any]]
T = TypeVar("T")
SAMPLING: dict[Kind, SampleSection] = {
    "teacher": SampleSection(sampler=Choice(name="heun"), steps=18),
    "consistency": SampleSection(sampler=Choice(name="multistep"), steps=1),
    "flow map": SampleSection(sampler=Choice(name="multistep"), steps=1),
}
"""How to sample a model of each kind, where its card does not say it."""


def _row(registry: Mapping[str, T], name: str, key: str) -> T:
    """Return the entry of a registry. Raises UserError for an unknown name, with the good ones."""
    if name not in registry:
        raise UserError(f"{key} = {name!r} is unknown", nearest(name, registry))
    return registry[name]


def pick(
    registry: Registry, choice: Choice, key: str, given: Mapping[str, Any] | Collection[str] = ()
) -> Callable[..., Any]:
    """Return the component a preset names, with its options bound, and what it takes of `given`.

    Options are its keyword-only parameters but those `given` by the caller; of a mapping, the
    values are bound too. Raises UserError for an unknown name or option, naming the good ones, and
    for an option of the wrong type.
    """
    component = _row(registry, choice.name, key)
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
            raise UserError(
                f"{key}.{option} = {value!r}: {reason}", "give it a value of the right type"
            ) from None
    if isinstance(given, Mapping):
        options |= {name: value for name, value in given.items() if name in types}
    return partial(component, **options) if options else component


def build_network(model: ModelSection) -> nn.Module:
    """Return the raw network of a model section; PyTorch's global generators draw its weights.

    Raises UserError for an unknown network or option, or an option of the wrong type.
    """
    choice = model.network
    kind = _row(NETWORKS, choice.name, "model.network")
    known = [field.name for field in fields(kind.options)]
    for option, value in choice.options.items():
        if option not in known:
            what = f"network {choice.name!r} has no option {option!r}"
            raise UserError(what, nearest(option, known))
        if isinstance(value, list) and len(value) > MAX_BLOCKS:
            raise UserError(f"model.network.{option} has {len(value):,} entries", "shorten it")
    try:
        options = TypeAdapter(kind.options).validate_python(choice.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"model.network.{key} = {first['input']!r}: {first['msg'].lower()}"
        raise UserError(what, "give it a value of the right type") from None
    try:
        made = kind.build(options, model.channels, model.num_classes)
        if model.transition is None and model.guidance is None:
            return made
        other = kind.build(options, model.channels, model.num_classes)
        if model.guidance is not None:
            hears = model.guide_hears_class
            return Guided(made, other, model.guidance, hears_class=hears)
        noise_label = build_noise_label(model)
        with torch.device("cpu"):  # a number, also where networks are but shapes
            label = float(noise_label(torch.tensor(model.transition, dtype=torch.float64)))
        return Truncated(made, other, label)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        what = f"network {choice.name!r} cannot be built: {error}"
        raise UserError(what, "change the options of model.network") from None


def noise_range(preset: Card) -> NoiseRange:
    """Return the range of noise levels of a preset."""
    return NoiseRange(preset.noise.sigma_min, preset.noise.sigma_max, preset.noise.rho)


def build_noise_label(model: ModelSection) -> Callable[[Tensor], Tensor]:
    """Return what turns levels into the labels that the network hears."""
    known = {"sigma_data": model.sigma_data}
    return pick(NOISE_LABELS, model.noise_label, "model.noise_label", known)


def build_denoiser(card: Card, network: nn.Module) -> Preconditioned:
    """Return the Denoiser of a card. Raises UserError for a network that is not of its kind."""
    if is_two_time(network) != (card.kind == "flow map"):
        flow_map = card.kind == "flow map"
        levels = "two noise levels" if flow_map else "one noise level"
        what = f"the network of kind = {card.kind!r} must take {levels}, and this one does not"
        raise UserError(what, f"in model.network, set two_time = {str(flow_map).lower()}")
    scalings = pick(SCALINGS, card.model.scalings, "model.scalings")
    label = build_noise_label(card.model)
    sigma_data, sigma_min = card.model.sigma_data, card.noise.sigma_min
    return Preconditioned(network, scalings, label, sigma_data=sigma_data, sigma_min=sigma_min)


def method_row(preset: Preset) -> MethodRow:
    """Return the row of the preset's method. Raises UserError for an unknown one."""
    return _row(METHODS, preset.loss.method.name, "loss.method")


def needs_teacher(preset: Preset) -> bool:
    """Tell whether training takes a teacher: for its loss, or to start from its weights."""
    return method_row(preset).needs_teacher or preset.train.from_teacher


def can_recompute(preset: Preset) -> bool:
    """Tell whether train.checkpoint_activations may be on."""
    return method_row(preset).recomputes and bool(NETWORKS[preset.model.network.name].blocks)


class Built(NamedTuple):
    """A preset's method and level picker, with choices bound, and what it does before a step."""

    method: Method
    levels: LevelPicker
    before: Before | None


def build_method(preset: Preset) -> Built:
    """Return the preset's method, and what goes with it.

    Raises UserError for a choice that does not exist, used or not, or that the method forbids.
    """
    loss, row, model = preset.loss, method_row(preset), preset.model
    distance = pick(DISTANCES, loss.distance, "loss.distance")
    choices = {
        "distance": distance,
        "weight": pick(WEIGHTINGS, loss.weight, "loss.weight", {"sigma_data": model.sigma_data}),
        "noise_range": noise_range(preset),
        "solver": pick(SOLVERS, loss.solver, "loss.solver"),
        "sigma_data": model.sigma_data,
        "transition": model.transition,
    }
    pick(SOURCES, loss.source, "loss.source", ["images", "teacher", "noise_range", "seed"])
    check_method(preset, row, distance)
    name, options = loss.method.name, loss.method.options
    early = inspect.signature(row.before).parameters if row.before else {}
    theirs = {key: value for key, value in options.items() if key in early}
    ours = Choice(name=name, **{k: v for k, v in options.items() if k not in theirs})
    method = pick({name: row.loss}, ours, "loss.method", choices)
    before = None
    if row.before is not None:
        given = {"noise_range": choices["noise_range"]}
        before = pick({name: row.before}, Choice(name=name, **theirs), "loss.method", given)
    return Built(method, pick(LEVELS, loss.levels, "loss.levels", choices), before)


def build_source(preset: Preset, images: Draw, teacher: Denoiser | None) -> Draw:
    """Return what each step of a preset starts from."""
    given = {"noise_range": noise_range(preset), "seed": preset.train.seed}
    known = [*given, "images", "teacher"]
    source = pick(SOURCES, preset.loss.source, "loss.source", known)
    return source(images, followed(preset, teacher), noise_range(preset), preset.train.seed)


def build_objective(preset: Preset, teacher: Denoiser | None, device: str = "cpu") -> Objective:
    """Return the preset's training objective.

    Raises UserError for a choice that its method does not take, or a teacher that is missing,
    MissingError for a distance that lacks a file.
    """
    row, (method, levels, _) = method_row(preset), build_method(preset)
    augment = build_augment(preset, row)
    if row.needs_teacher and teacher is None:
        raise UserError("this preset distills a teacher", "run it with cmtool distill")
    if "distance" in inspect.signature(row.loss).parameters:
        blank = torch.zeros(1, preset.model.channels, *preset.model.image_size, device=device)
        distance = pick(DISTANCES, preset.loss.distance, "loss.distance")
        distance(blank, blank)  # what it lacks, such as a weight file, it says now
    teacher = followed(preset, teacher) if row.needs_teacher else None
    return make_objective(method, levels, noise_range(preset), teacher=teacher, augment=augment)


def followed(preset: Preset, teacher: Denoiser | None) -> Denoiser | None:
    """Return the teacher as the steps of a preset follow it: guided, if loss.guidance says so."""
    return None if teacher is None else guided(teacher, preset.loss.guidance)


def check_guided(card: Card, what: str, without: str = "leave guidance out") -> None:
    """Raise UserError for guidance, `what` says which, of a model that does not know "no class".

    `without` is how to do without it.
    """
    if card.kind != "teacher":
        hint = "leave it out, or cmtool distill with --set loss.guidance=2"
        raise UserError(f"{what}: a {card.kind} model is guided when it is made", hint)
    if not card.model.num_classes:
        raise UserError(f"{what}: the model has no classes", without)
    if isinstance(card, Preset) and not card.data.label_dropout:
        hint = f"train a teacher with --set data.label_dropout=0.1, or {without}"
        raise UserError(f"{what}: the model never learned images of no class", hint)


def check_method(preset: Preset, row: MethodRow, distance: Distance) -> None:
    """Raise UserError for choices of a preset that the row of its method does not allow."""
    loss, name = preset.loss, preset.loss.method.name
    if preset.kind != row.makes:
        what = f"kind = {preset.kind!r} with loss.method = {name!r}"
        raise UserError(f"{what}, which makes a {row.makes} model", f"--set kind={row.makes!r}")
    if loss.target not in row.targets:
        hint = f"--set loss.target={row.targets[0]}; it takes {' or '.join(row.targets)}"
        raise UserError(f"loss.target = {loss.target!r} with loss.method = {name!r}", hint)
    if loss.source.name != row.source:
        what = f"loss.source = {loss.source.name!r} with loss.method = {name!r}"
        raise UserError(what, f"--set loss.source={row.source}")
    if loss.guidance != 1 and (not row.needs_teacher or "previous" in row.targets):
        what = f"loss.guidance = {loss.guidance:g} with loss.method = {name!r}"
        raise UserError(f"{what}, whose steps call no teacher", "leave loss.guidance out")
    takes_two = "transition" in inspect.signature(row.loss).parameters
    if takes_two and preset.model.transition is None:
        what = f"loss.method = {name!r} without model.transition"
        raise UserError(what, "--set model.transition=1.0: below it the first stage answers")
    if takes_two and not preset.train.from_teacher:
        what = f"loss.method = {name!r} is a second stage and starts from the model of the first"
        raise UserError(what, "--set train.from_teacher=true, and give that model as --teacher")
    if preset.model.transition is not None and not takes_two:
        what = f"model.transition with loss.method = {name!r}, which trains one network"
        raise UserError(what, "leave model.transition out")
    if row.needs_curvature and is_norm(distance):
        what = f"loss.distance = {loss.distance.name!r} has no curvature, which {name} needs"
        hint = "use another, such as l2, or distill with loss.method = live_distillation"
        raise UserError(what, hint)
    if preset.model.guidance is not None:
        what = f"model.guidance = {preset.model.guidance:g}: two networks are guided, not trained"
        raise UserError(what, "leave model.guidance out")
    if preset.train.checkpoint_activations and not row.recomputes:
        raise UserError(
            f"train.checkpoint_activations with loss.method = {name!r}: what is computed again"
            " cannot be differentiated forwards",
            "leave train.checkpoint_activations out, and split the batch with --accumulate",
        )


def build_augment(preset: Preset, row: MethodRow) -> Augment | None:
    """Return how training images are warped, or None. Raises UserError where they may not be."""
    if not preset.data.augment:
        return None
    what = f"data.augment = {preset.data.augment}"
    if not row.warps:
        raise UserError(f"{what} for a model that is not an EDM teacher", "--set data.augment=0")
    known = preset.model.network.options.get("augment_dim", 0)
    if known != LABELS:
        hint = f"the network must be told: --set model.network.augment_dim={LABELS}"
        raise UserError(f"{what} with model.network.augment_dim = {known}", hint)
    if preset.data.flip:
        raise UserError(f"{what} with data.flip", "it mirrors by itself: --set data.flip=false")
    return partial(augmented, p=preset.data.augment)


def build_curriculum(preset: Preset) -> Curriculum:
    """Return the preset's N(k) and mu(k). Raises UserError for more levels than a grid may have."""
    curriculum = pick(CURRICULA, preset.loss.curriculum, "loss.curriculum")
    steps = preset.train.steps
    n = max(curriculum(step, steps).n for step in (0, steps - 1))  # it grows, or it falls
    if n > MAX_LEVELS:
        what = f"loss.curriculum = {preset.loss.curriculum.name!r} makes n = {n:,} levels"
        raise UserError(what, f"at most {MAX_LEVELS:,}")
    return curriculum


def build_sampler(choice: Choice) -> Callable[..., Tensor]:
    """Return a sampler by its choice."""
    given = ["sigma_min", "labels", "project", "solver"]
    return pick(SAMPLERS, choice, "sample.sampler", given)
