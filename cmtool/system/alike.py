"""Processes of one command tell each other what they are about to do: it must be the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from cmtool.errors import ResourceError, UserError

Facts = Mapping[str, Any]
T = TypeVar("T")
HINT = "start all processes with the same command, files and version of cmtool"
PARTING = timedelta(seconds=10)
"""Time for the others to hear of a difference before the leading process, and its store, ends."""
MAX_SHOWN = 3
MAX_VALUE = 80


def check_alike(found: Sequence[Facts]) -> None:
    """Raise UserError that names the keys in which the facts of the processes, by rank, differ."""
    if told := difference(found):
        raise UserError(told, HINT)


def check_over_store(store: Store, rank: int, world_size: int, facts: Facts) -> None:
    """Raise UserError in all processes if their facts, which JSON can hold, differ.

    This needs no process group: processes that differ might not even come to make the same one.
    """
    if told := _judged(store, rank, world_size, "difference", facts, difference):
        raise UserError(told, HINT)


def check_apart(store: Store, rank: int, world_size: int, name: str) -> None:
    """Raise ResourceError in all processes if two have one GPU, which has the same `name`.

    "" is no GPU.
    """
    if told := _judged(store, rank, world_size, "sharing", name, sharing):
        raise ResourceError(told, "give each process a GPU of its own, or start fewer processes")


def _judged(
    store: Store, rank: int, world_size: int, what: str, own: T, judge: Callable[[list[T]], str]
) -> str:
    """Return what the leading process finds in what the processes say, by rank; "" for nothing."""
    store.set(f"{what}/of/{rank}", json.dumps(own))
    if rank == 0:
        found = [json.loads(store.get(f"{what}/of/{each}")) for each in range(world_size)]
        store.set(what, judge(found))
    told = store.get(what).decode()
    store.set(f"{what}/heard/{rank}", "")
    if told and rank == 0:
        with suppress(DistStoreError):
            store.wait([f"{what}/heard/{each}" for each in range(world_size)], PARTING)
    return told


def sharing(names: Sequence[str]) -> str:
    """Return which processes have one GPU, by their ranks; "" for none."""
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        ranks.setdefault(name, []).append(rank)
    shared = [_who(of) for name, of in ranks.items() if name and len(of) > 1]
    return f"one GPU serves {' and one serves '.join(shared)}" if shared else ""


def difference(found: Sequence[Facts]) -> str:
    """Return in which keys the facts of processes differ, and the values; "" for nothing."""
    keys = list(dict.fromkeys(key for facts in found for key in facts))
    told = []
    for key in keys:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(found):
            ranks.setdefault(_shown(facts.get(key)), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value[:MAX_VALUE]} in {_who(of)}" for value, of in ranks.items())
            told.append(f"{key}: {', '.join(values)}")
    more = f"; and {len(told) - MAX_SHOWN} more" if len(told) > MAX_SHOWN else ""
    return f"the processes differ in {'; '.join(told[:MAX_SHOWN])}{more}" if told else ""


def _shown(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _who(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:4]))
    return f"ranks {listed}{', ...' if len(ranks) > 4 else ''}"
