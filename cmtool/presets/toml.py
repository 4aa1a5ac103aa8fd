"""Presets as TOML: read with their `extends` chain and overrides, and written with their origins.

Layers, weakest first: defaults, the `extends` chain, the file, and overrides in the order given.
Every value keeps its origin.
"""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit
from pydantic import ValidationError

from cmtool.errors import InputError, UserError, nearest
from cmtool.presets.keys import is_table, meaning, path_in, section
from cmtool.presets.schema import Preset, Published
from cmtool.presets.upgrade import upgraded
from cmtool.system.files import expanded, read_regular
from cmtool.system.text import printable

_PACKAGED = Path(__file__).parents[1] / "_presets"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "presets"


MAX_FILE = 1 << 20
"""Bytes that the file of a preset may have."""
MAX_CHAIN = 32
"""Presets that one preset may extend, one by way of the other."""
MAX_DEPTH = 8
MAX_KEYS = 2000
"""Keys in the file of a preset; cmtool's have about a hundred."""
MAX_DOTS = 100
MAX_SHOWN = 200
"""Characters of a value that an error shows."""
EMA_HINT = (
    "--set run.ema_every=0, or --set"
    " \"train.ema=[{name='ema', sigma_rel=0.05}, {name='long', sigma_rel=0.1}]\""
)
"""What to do about run.ema_every without averages to store."""

Comment = Callable[[str], str | None]
"""What stands beside a dotted key."""


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
    for path, table in _chain(name_or_path):
        table.pop("published", None)
        _merge(tree, table, path.name, origins, "")
    _merge_layers(tree, layers, origins)
    preset = _validated(upgraded(tree), name_or_path)
    found = {key: origin_of(key, origins) for key, _ in flat(preset.model_dump())}
    return Resolved(preset, found)


def published(name_or_path: str) -> Published:
    """Return what the authors report for this very preset. Raises UserError."""
    *_, (_, table) = _chain(name_or_path)
    try:
        return Published.model_validate(table.get("published", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("published", *map(str, first["loc"])))
        raise UserError(f"{name_or_path}: {key}: {first['msg'].lower()}", "correct it") from None


def packaged_value(name_or_path: str, key: str) -> Any:
    """Return a key's value in the nearest of cmtool's presets this one is or extends, or None."""
    value = None
    for path, table in _chain(name_or_path):
        if path.parent == FOLDER:
            value = dict(flat(table)).get(key, value)
    return value


def is_method_preset(name: str) -> bool:
    """Tell whether a preset is one of cmtool's that name no data: they are fitted to some."""
    return name in preset_names() and not packaged_value(name, "data.path")


def parse_override(text: str) -> tuple[str, Any]:
    """Return ("a.b", value) for "a.b=value"; the value is read as TOML, else taken as a string."""
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\-]+", key.strip()):
        raise UserError(f"--set {text!r} is not KEY=VALUE", "for example --set train.lr=1e-4")
    try:
        _check_keys(raw)
        table = tomllib.loads(f"value = {raw.strip()}")
        value = table["value"] if len(table) == 1 else raw.strip()  # of several lines: text
    except RecursionError:
        what = f"the value of --set {key.strip()} has too many brackets in each other"
        raise UserError(what, "set single keys, for example --set train.batch=32") from None
    except ValueError:  # no TOML, or a number of thousands of digits
        value = raw.strip()
    return key.strip(), value


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chain(name_or_path: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, table) of the furthest ancestor down to the preset itself."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen, wanted = set[Path](), name_or_path
    while True:
        path = _find(wanted)
        if path.resolve() in seen:
            raise UserError(f"preset {path.name} extends itself", "break the circle of `extends`")
        if len(seen) == MAX_CHAIN:
            what = f"preset {name_or_path} extends more than {MAX_CHAIN} others"
            raise UserError(what, "extend one of cmtool's presets: cmtool preset list")
        seen.add(path.resolve())
        table = _table(path)
        parent = table.pop("extends", None)
        chain.insert(0, (path, table))
        if parent is None:
            return chain
        beside = path.parent / f"{parent}.toml"
        wanted = str(beside) if beside.exists() else str(parent)


def _table(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file. Raises UserError for a file that holds none."""
    try:
        text = read_regular(path, MAX_FILE).decode("utf-8-sig")
        _check_keys(text)
        table = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} nests too deep", "mend the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason}", "save it as UTF-8") from None
    except ValueError as error:  # of TOML, of numbers of thousands of digits
        raise UserError(f"{path} is not TOML: {error}", "mend the file") from None
    _check_depth(table, str(path))
    return table


def _check_keys(text: str) -> None:
    """Raise RecursionError for a key of very many parts: tomllib takes quadratic time for it."""
    if any(part.count(".") > MAX_DOTS for part in re.split(r"[^\w.\-\"' \t]", text)):
        raise RecursionError


def _check_depth(tree: Mapping[str, Any], shown: str) -> None:
    """Raise UserError for more keys, or deeper tables and arrays, than those of any preset."""
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        if (keys := sum(len(v) for v in level if isinstance(v, Mapping))) > MAX_KEYS:
            raise UserError(f"{shown} has {keys:,} keys and more", "remove those of no use")
        inner = [v.values() if isinstance(v, Mapping) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, Mapping | list)]
    if level:
        raise UserError(f"{shown} nests more than {MAX_DEPTH} tables and arrays", "make it flat")


def _find(name_or_path: str) -> Path:
    """Return the file of a preset's name or path."""
    path = expanded(name_or_path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if not path.exists():
            raise InputError(f"no preset file {name_or_path}", "check the path")
        return path
    if name_or_path not in preset_names():
        close = difflib.get_close_matches(name_or_path, preset_names(), n=4, cutoff=0.5)
        hint = "cmtool preset list shows all"
        hint = f"did you mean {', '.join(close[:-1])} or {close[-1]}? {hint}" if close[1:] else hint
        raise UserError(f"there is no preset {name_or_path!r}", hint)
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


def _merge_layers(
    tree: dict[str, Any], layers: Mapping[str, Mapping[str, Any]], origins: dict[str, str]
) -> None:
    """Put layers of dotted overrides {origin: {key: value}} over `tree`."""
    for origin, overrides in layers.items():
        for dotted, value in overrides.items():
            for key in reversed(dotted.split(".")):
                value = {key: value}
            _check_depth(value, f"--set {dotted[:60]}")
            _merge(tree, value, origin, origins, "")


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
        path = path_in(tree, first["loc"])
        path += map(str, first["loc"][-1:] if first["type"] == "missing" else ())
        key = ".".join(path)
        given = repr(first["input"])
        given = given if len(given) <= MAX_SHOWN else f"{given[:MAX_SHOWN]}..."
        reason = first["msg"].removeprefix("Value error, ")
        what = f"{key} = {given}: {reason[0].lower()}{reason[1:]}"
        what = what.replace("input should be", "it must be")
        top = ".".join(itertools.takewhile(lambda part: not part.isdigit(), path))
        hint = f"cmtool preset show edm {top} prints what it may be"
        if not path:  # a value that another table does not allow
            what, hint = reason, EMA_HINT
        if key == "model.image_size":
            sides = re.findall(r"[0-9]+", str(first["input"])[:MAX_SHOWN]) or ["8"]
            hint = f"give height and width: --set {key}=[{sides[0]},{sides[-1]}]"
        if first["type"] == "extra_forbidden":
            what = f"unknown key {key!r} in preset {shown}"
            known = [name for name in _known(tree) if name.rpartition(".")[2] == path[-1]]
            above = "".join(f"{part}." for part in path[:-1])
            here = nearest(key, [above + name for name in section(path[:-1]).model_fields])
            hint = f"did you mean {' or '.join(known)}?" if known else here
        if first["type"] == "missing" and key.startswith("model.image_size."):
            what = f"model.image_size = {given}: it must be two numbers"
            side = (first["input"] or (8,))[0]
            hint = f"give height and width: --set model.image_size=[{side},{side}]"
        elif first["type"] == "missing":
            what, hint = f"preset {shown} lacks {key!r}", "set it, or extend a preset"
        raise UserError(what, hint) from None


def _known(tree: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that presets may have, and the options in a tree of this one."""
    tables = [name for name in Preset.model_fields if is_table(name)]
    keys = [f"{table}.{key}" for table in tables for key in section([table]).model_fields]
    ours = [key for key, _ in flat(tree) if key.count(".") > 1]  # options of components
    return keys + ours


def to_toml(
    preset: Preset, origins: Mapping[str, str] | None = None, *, explain: bool = False
) -> str:
    """Return the preset as TOML that `--preset` takes again, origins as comments.

    With `explain` the comments say what the keys mean, too.
    """
    document = tomlkit.document()
    comment = _comments(origins, explain) if origins else lambda _: None
    _fill(document, preset.model_dump(exclude_none=True), comment, "")
    return tomlkit.dumps(document)


def extension(parent: str, layers: Mapping[str, Mapping[str, Any]], heading: str) -> str:
    """Return a TOML file that extends a preset by layers {origin: {key: value}}, with comments."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    _merge_layers(tree, layers, origins)
    document = tomlkit.document()
    for line in heading.splitlines():
        document.add(tomlkit.comment(line))
    document.add("extends", tomlkit.item(parent))
    _fill(document, tree, _comments(origins, explain=True), "")
    return tomlkit.dumps(document)


def _comments(origins: Mapping[str, str], explain: bool) -> Comment:
    def comment(key: str) -> str:
        parts = [origin_of(key, origins), meaning(key) if explain else ""]
        return ": ".join(filter(None, parts))

    return comment


def with_values(text: str, values: Mapping[str, tuple[Any, str]]) -> str:
    """Return TOML with the values of some dotted keys, and their origins; the rest untouched.

    A key whose value is None is taken out. A component that was its name alone becomes a table.
    """
    document = tomlkit.parse(text)
    for dotted, (value, origin) in values.items():
        *names, key = dotted.split(".")
        table: Any = document
        for name in names:
            if not isinstance(table.get(name), Mapping):
                known = table.pop(name, None)  # a table must stand after the values
                table[name] = tomlkit.table()
                if known is not None:
                    table[name]["name"] = known
            table = table[name]
        if value is None:
            table.pop(key, None)
        else:
            table[key] = _item(value, origin)
    return tomlkit.dumps(document)


def _fill(table: Any, tree: Mapping[str, Any], comment: Comment, prefix: str) -> None:
    """Fill a TOML table: values first, then tables; a component without options is its name."""
    short = {
        k: v["name"] if isinstance(v, Mapping) and set(v) == {"name"} else v
        for k, v in tree.items()
    }
    for key, value in sorted(short.items(), key=lambda entry: isinstance(entry[1], Mapping)):
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            table[key] = tomlkit.table()
            _fill(table[key], value, comment, f"{dotted}.")
        else:
            table[key] = _item(value, comment(dotted))


def as_toml(value: Any) -> str:
    """Return a value as it is written in TOML."""
    text: str = _item(value, None).as_string()
    return text


def _item(value: Any, comment: str | None) -> Any:
    """Return a TOML value with a comment; tables in a list are inline tables."""
    many = isinstance(value, list | tuple)
    item: Any = tomlkit.array() if many else tomlkit.item(value)
    for entry in value if many else ():
        said = {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else {}
        item.append(tomlkit.inline_table() | said if isinstance(entry, dict) else entry)
    if comment is not None:
        item.comment(printable(comment))
    return item
