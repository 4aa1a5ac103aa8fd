"""Processes of one command tell each other what they are about to do: it must be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from cmtool.errors import UserError

Facts = Mapping[str, Any]
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
    store.set(f"facts/{rank}", json.dumps(facts))
    if rank == 0:
        found = [json.loads(store.get(f"facts/{each}")) for each in range(world_size)]
        store.set("difference", difference(found))
    told = store.get("difference").decode()
    store.set(f"heard/{rank}", "")
    if not told:
        return
    if rank == 0:
        with suppress(DistStoreError):
            store.wait([f"heard/{each}" for each in range(world_size)], PARTING)
    raise UserError(told, HINT)


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
