"""What a key of a preset means and what it may be, for people."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from cmtool.core.distances import DISTANCES
from cmtool.core.losses import WEIGHTINGS
from cmtool.core.methods import METHODS
from cmtool.core.networks import NETWORKS
from cmtool.core.noise import CURRICULA, LEVELS
from cmtool.core.optimizers import OPTIMIZERS
from cmtool.core.paths import SOURCES
from cmtool.core.precond import NOISE_LABELS, SCALINGS
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.data.images import FITS
from cmtool.data.labels import RULES
from cmtool.errors import UserError, nearest
from cmtool.presets.keys import field_schema, meaning
from cmtool.presets.toml import as_toml

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "model.network": NETWORKS,
    "model.noise_label": NOISE_LABELS,
    "model.scalings": SCALINGS,
    "data.fit": FITS,
    "data.labels": RULES,
    "loss.method": METHODS,
    "loss.levels": LEVELS,
    "loss.source": SOURCES,
    "loss.solver": SOLVERS,
    "loss.distance": DISTANCES,
    "loss.weight": WEIGHTINGS,
    "loss.curriculum": CURRICULA,
    "train.optimizer": OPTIMIZERS,
    "sample.sampler": SAMPLERS,
}
"""Where the names of components come from."""

GIVEN = {
    "sigma_data",
    "sigma_min",
    "noise_range",
    "labels",
    "project",
    "solver",
    "distance",
    "weight",
}
"""Parameters of components that come from elsewhere in a preset."""
WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "a table",
}
BOUNDS = {
    "exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below",
    "maximum": "at most",
}  # fmt: skip


class Entry(NamedTuple):
    """A key, its line in a preset, and lines about it."""

    key: str
    line: str
    text: list[str]


def keys_of(key: str, values: Mapping[str, Any]) -> list[str]:
    """Return the keys in a table of a preset that have a value; a key itself if it is no table."""
    if key in values or f"{key}.name" in values:
        return [key]
    inside = [k for k, value in values.items() if k.startswith(f"{key}.") and value is not None]
    return inside or [key]


def explained(key: str, values: Mapping[str, Any]) -> Entry:
    """Return what a key means and may be; `values` are those of a preset, by dotted keys.

    Raises UserError for a key that presets do not have.
    """
    key = key.removesuffix(".name")
    shown = f"{key}.name" if f"{key}.name" in values else key
    if shown not in values:
        raise UserError(f"no key {key!r}", nearest(key, [k.removesuffix(".name") for k in values]))
    value = values[shown]
    line = f"# {key} is not set" if value is None else f"{key} = {as_toml(value)}"
    registry = REGISTRIES.get(key)
    choices = [_choice(name, row) for name, row in sorted(registry.items())] if registry else []
    says = meaning(key)
    said = [f"{says[0].upper()}{says[1:]}."] if says else []
    if choices:
        return Entry(key, line, [*said, "One of:", *(f"  {c}" for c in choices)])
    return Entry(key, line, [*said, *_range(key)])


def _choice(name: str, row: Any) -> str:
    """Return a component in a line: its name, what it is, and its options."""
    if options := getattr(row, "options", None):  # a network
        about, names = inspect.getdoc(row.build), [field.name for field in fields(options)]
    else:
        component: Any = getattr(row, "loss", row)  # of a method, its function
        about = inspect.getdoc(getattr(component, "func", component))
        known = inspect.signature(component).parameters.values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN]
    first = (about or "").partition("\n")[0]
    return f"{name}: {first}" + (f" Options: {', '.join(names)}." if names else "")


def _range(key: str) -> list[str]:
    """Return what a value that is no component may be, in a sentence, or nothing."""
    facts = field_schema(key)
    if not facts:
        return []
    allowed = facts.get("enum")
    if allowed:
        return [f"One of {', '.join(map(str, allowed))}."]
    kinds = [part for part in facts.get("anyOf", [facts]) if part.get("type") != "null"]
    words = " or ".join(filter(None, map(_kind, kinds)))
    return [f"{words[0].upper()}{words[1:]}."] if words else []


def _kind(kind: Mapping[str, Any]) -> str:
    """Return a type and its bounds in words."""
    form = ",d" if kind.get("type") == "integer" else "g"
    bounds = " and ".join(f"{word} {kind[b]:{form}}" for b, word in BOUNDS.items() if b in kind)
    return " ".join(filter(None, [WORDS.get(kind.get("type", ""), ""), bounds]))
