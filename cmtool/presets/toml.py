"""Presets as TOML: read with their `extends` chain and overrides, and written with their origins.

Layers, weakest first: defaults, the `extends` chain, the file, and overrides in the order given.
Every value keeps its origin.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import tomlkit
from pydantic import BaseModel, ValidationError

from cmtool.errors import InputError, UserError, nearest
from cmtool.presets.schema import Preset
from cmtool.presets.upgrade import upgraded
from cmtool.system.text import printable

_PACKAGED = Path(__file__).parents[1] / "_presets"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "presets"


class Resolved(NamedTuple):
    """A preset, and for each dotted key where its value came from."""

    preset: Preset
    origins: dict[str, str]


def preset_names() -> list[str]:
    """Return the names of the presets that come with cmtool, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load_preset(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Return a preset with dotted `overrides` such as {"loss.distance": "l1"}. Raises UserError."""
    return resolve(name_or_path, {"override": overrides or {}}).preset


def resolve(name_or_path: str, layers: Mapping[str, Mapping[str, Any]]) -> Resolved:
    """Return the preset with layers of dotted overrides {origin: {key: value}}, and all origins."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, table in _chain(name_or_path, ()):
        _merge(tree, table, path.name, origins, "")
    for origin, overrides in layers.items():
        for dotted, value in overrides.items():
            for key in reversed(dotted.split(".")):
                value = {key: value}
            _merge(tree, value, origin, origins, "")
    preset = _validated(upgraded(tree), name_or_path)
    found = {key: origin_of(key, origins) for key, _ in flat(preset.model_dump())}
    return Resolved(preset, found)


def packaged_value(name_or_path: str, key: str) -> Any:
    """Return a key's value in the nearest of cmtool's presets this one is or extends, or None."""
    value = None
    for path, table in _chain(name_or_path, ()):
        if path.parent == FOLDER:
            value = dict(flat(table)).get(key, value)
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """Return ("a.b", value) for "a.b=value"; the value is read as TOML, else taken as a string."""
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\-]+", key.strip()):
        raise UserError(f"--set {text!r} is not KEY=VALUE", "for example --set train.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return key.strip(), value


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chain(name_or_path: str, seen: tuple[str, ...]) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Yield (file, table) from the furthest ancestor down to the preset itself."""
    path = _find(name_or_path)
    if str(path) in seen:
        raise UserError(f"preset {path.name} extends itself", "break the circle of `extends`")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "mend the file") from None
    parent = table.pop("extends", None)
    if parent is not None:
        beside = path.parent / f"{parent}.toml"
        yield from _chain(str(beside) if beside.is_file() else str(parent), (*seen, str(path)))
    yield path, table


def _find(name_or_path: str) -> Path:
    """Return the file of a preset's name or path."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if not path.is_file():
            raise InputError(f"no preset file {name_or_path}", "check the path")
        return path
    if name_or_path not in preset_names():
        raise UserError(f"no preset {name_or_path!r}", nearest(name_or_path, preset_names()))
    return FOLDER / f"{name_or_path}.toml"


def _merge(
    tree: dict[str, Any], table: Mapping[str, Any], origin: str, origins: dict[str, str], at: str
) -> None:
    """Put `table` over `tree`; an empty table within a section empties the one below it.

    A component of another name brings its own options only.
    """
    for key, value in table.items():
        dotted, old = f"{at}{key}", tree.get(key)
        if not isinstance(value, Mapping) or (at and not value):
            for stale in [k for k in origins if k.startswith(f"{dotted}.")]:
                del origins[stale]
            origins[dotted] = origin
        if not isinstance(value, Mapping):
            tree[key] = value
            continue
        below = {"name": old} if isinstance(old, str) else old if isinstance(old, dict) else {}
        keep = value.get("name", below.get("name")) == below.get("name")
        keep = keep and (bool(value) or not at)  # a section without keys says nothing
        tree[key] = dict(below) if keep else {}
        _merge(tree[key], value, origin, origins, f"{dotted}.")


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where a key, or the nearest table above or value below it, was set."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (above := ".".join(parts[:end])) in origins:
            return origins[above]
    below = [origin for k, origin in origins.items() if k.startswith(f"{key}.")]
    return below[-1] if below else "default"


def _validated(tree: dict[str, Any], shown: str) -> Preset:
    try:
        return Preset.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in ("function-before", "tuple")]
        key = ".".join(path)
        what = f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        hint = f"set it with --set {key}=VALUE, or in the file"
        if first["type"] == "extra_forbidden":
            what = f"unknown key {key!r} in preset {shown}"
            hint = nearest(path[-1], _fields(path[:-1]))
        if first["type"] == "missing":
            what, hint = f"preset {shown} lacks {key!r}", "set it, or extend a preset"
        raise UserError(what, hint) from None


def _fields(path: list[str]) -> list[str]:
    """Return the names of the keys a preset may have under `path`."""
    model: type[BaseModel] = Preset
    for part in itertools.filterfalse(str.isdigit, path):
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


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
        table[key] = _item(value, origin)
    return tomlkit.dumps(document)


def _fill(table: Any, tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> None:
    """Fill a TOML table: values first, then tables; a component without options is its name."""
    short = {
        k: v["name"] if isinstance(v, Mapping) and set(v) == {"name"} else v
        for k, v in tree.items()
    }
    for key, value in sorted(short.items(), key=lambda entry: isinstance(entry[1], Mapping)):
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            table[key] = tomlkit.table()
            _fill(table[key], value, origins, f"{dotted}.")
        else:
            table[key] = _item(value, origin_of(dotted, origins) if origins else None)


def _item(value: Any, origin: str | None) -> Any:
    """Return a TOML value with its origin as a comment; tables in a list are inline tables."""
    many = isinstance(value, list | tuple)
    item: Any = tomlkit.array() if many else tomlkit.item(value)
    for entry in value if many else ():
        item.append(tomlkit.inline_table() | entry if isinstance(entry, dict) else entry)
    if origin is not None:
        item.comment(printable(origin))
    return item
