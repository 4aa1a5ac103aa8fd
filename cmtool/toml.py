"""A preset as TOML, the origin of each value as a comment; the standard library only reads TOML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomlkit

from cmtool.presets import Preset, origin_of


def to_toml(preset: Preset, origins: Mapping[str, str] | None = None) -> str:
    """Return the preset as TOML that `--preset` takes again, origins as comments."""
    document = tomlkit.document()
    _fill(document, preset.model_dump(exclude_none=True), origins or {}, "")
    return tomlkit.dumps(document)


def with_values(text: str, values: Mapping[str, tuple[Any, str]]) -> str:
    """Return TOML with the values of some dotted keys, and their origins; the rest untouched."""
    document = tomlkit.parse(text)
    for dotted, (value, origin) in values.items():
        *names, key = dotted.split(".")
        table: Any = document
        for name in names:
            table = table[name]
        item = tomlkit.item(_plain(value))
        item.comment(origin)
        table[key] = item
    return tomlkit.dumps(document)


def _fill(table: Any, tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> None:
    """Fill a TOML table: values first, then tables; a component without options is its name."""
    short = {k: v["name"] if _is_bare(v) else v for k, v in tree.items()}
    for key, value in sorted(short.items(), key=lambda entry: isinstance(entry[1], Mapping)):
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            section = tomlkit.table()
            _fill(section, value, origins, f"{dotted}.")
            table[key] = section
            continue
        item = tomlkit.item(_plain(value))
        if origins:
            item.comment(origin_of(dotted, origins))
        table[key] = item


def _is_bare(value: Any) -> bool:
    """Tell whether a value is a component without options."""
    return isinstance(value, Mapping) and set(value) == {"name"}


def _plain(value: Any) -> Any:
    """Return the value with tuples as lists, and tables inside lists as inline tables."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        array = tomlkit.array()
        for entry in value:
            if isinstance(entry, Mapping):
                inline = tomlkit.inline_table()
                inline.update(_plain(entry))
                array.append(inline)
            else:
                array.append(_plain(entry))
        return array
    return value
