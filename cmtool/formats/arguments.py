"""The arguments that a pickled network was made with, each read as what it must be.

Every function raises Malformed, with the argument's name, for anything else.
"""

from __future__ import annotations

from typing import Any

from cmtool.formats.foreign import Malformed
from cmtool.formats.torch_pickle import Record


def arguments(record: Record) -> dict[str, Any]:
    """Return the arguments that an object was made with; all must have names."""
    given = record.state.get("_init_kwargs")
    if not isinstance(given, dict) or record.state.get("_init_args", ()) != ():
        raise Malformed(f"its {record.class_name} was not made with named arguments")
    return given


def whole(given: dict[str, Any], key: str, default: int | None, most: int = 1 << 20) -> int:
    """Return a whole number from 0 to `most`."""
    value = given.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise Malformed(f"its {key} = {short(value)} is not a whole number up to {most}")
    return value


def number(given: dict[str, Any], key: str, default: float) -> float:
    """Return a number that is not negative."""
    value = given.get(key, default)
    if type(value) not in (int, float) or not value >= 0:
        raise Malformed(f"its {key} = {short(value)} is not a number")
    return float(value)


def fraction(given: dict[str, Any], key: str, default: float) -> float:
    """Return a number from 0 to less than 1."""
    value = number(given, key, default)
    if value >= 1:
        raise Malformed(f"its {key} = {value} is not a fraction")
    return value


def numbers(given: dict[str, Any], key: str, default: list[int]) -> tuple[int, ...]:
    """Return one to sixteen whole numbers."""
    value = given.get(key, default)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise Malformed(f"its {key} is not a short list")
    return tuple(whole({key: item}, key, None) for item in value)


def attention_levels(
    given: dict[str, Any], default: list[int], side: int, levels: int
) -> tuple[int, ...]:
    """Return the levels whose resolution is in attn_resolutions; `side` is that of level 0."""
    has_none = given.get("attn_resolutions") == []
    at = () if has_none else numbers(given, "attn_resolutions", default)
    return tuple(level for level in range(levels) if side >> level in at)


def one_of(given: dict[str, Any], key: str, good: list[str]) -> Any:
    """Return one of the names in `good`; the first is the default."""
    value = given.get(key, good[0])
    if value not in good:
        raise Malformed(f"its {key} = {short(value)} is not one of {', '.join(good)}")
    return value


def short(value: Any) -> str:
    """Return how to call a value in a message."""
    return repr(value)[:40] if isinstance(value, int | float | str | bool) else type(value).__name__
