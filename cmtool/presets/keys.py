"""The dotted keys of a preset: the table that has a key, what it means, and what it may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from cmtool.presets.schema import Preset


def is_table(name: str) -> bool:
    """Tell whether a name is that of a table of presets, and not of a single value."""
    kind = Preset.model_fields[name].annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def section(path: list[str]) -> type[BaseModel]:
    """Return the table of a preset at `path`."""
    model: type[BaseModel] = Preset
    for part in itertools.filterfalse(str.isdigit, path):
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def meaning(key: str) -> str:
    """Return what a dotted key of a preset means, "" for an option of a component."""
    *above, last = key.split(".")
    try:
        return section(above).model_fields[last].description or ""
    except (KeyError, StopIteration):
        return ""


def field_schema(key: str) -> dict[str, Any]:
    """Return the JSON schema of a dotted key, empty for an option of a component."""
    *above, last = key.split(".")
    try:
        properties: dict[str, dict[str, Any]] = section(above).model_json_schema()["properties"]
        return properties[last]
    except (KeyError, StopIteration):
        return {}


def path_in(tree: Any, location: Iterable[int | str]) -> list[str]:
    """Return the parts of an error's location that are keys or indices in a tree.

    pydantic's locations also name validators, and the members of unions.
    """
    path = []
    for part in location:
        is_index = isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)
        if is_index or (isinstance(tree, Mapping) and part in tree):
            path.append(str(part))
            tree = tree[part]
    return path
