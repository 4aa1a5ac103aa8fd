"""From the names and options in a preset to components: registry rows with options bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from cmtool.core.networks import NETWORKS
from cmtool.core.networks.layers import MAX_BLOCKS
from cmtool.core.noise import NoiseRange
from cmtool.core.precond import (
    NOISE_LABELS,
    SCALINGS,
    Preconditioned,
    consistency_scalings,
)
from cmtool.errors import UserError, nearest
from cmtool.presets import Card, Choice, Kind, ModelSection


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
