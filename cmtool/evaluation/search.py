"""The search for the noise levels that a consistency model samples best at (Song et al., sec. 3).

Levels are added one at a time, each by ternary search, as if the score had one valley in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from cmtool.errors import UserError


def ternary_search(value: Callable[[int], float], low: int, high: int) -> int:
    """Return where `value` is least among the whole numbers low < i < high it was asked for.

    With one valley that is the least of all. A third of the interval goes at each step.
    Raises UserError for an empty interval.
    """
    if high - low < 2:
        raise UserError(f"no level between {low} and {high}", "ask for fewer steps")
    known = lru_cache(maxsize=None)(value)
    asked: set[int] = set()

    def ask(i: int) -> float:
        asked.add(i)
        return known(i)

    while high - low > 3:
        third = (high - low) / 3
        left, right = int(low + third), int(high - third)
        low, high = (low, right) if ask(left) < ask(right) else (left, high)
    for i in range(low + 1, high):
        ask(i)
    return min(sorted(asked), key=known)


def search_indices(
    score: Callable[[tuple[int, ...]], float],
    steps: int,
    points: int,
    chosen: tuple[int, ...] = (0,),
) -> tuple[int, ...]:
    """Return `steps` ascending indices of a grid of `points` levels that begin with `chosen`.

    Greedy: the next index is searched for between the last one and the end, with those before it
    fixed, for the least score (Song et al. 2023, sec. 3; the released ternary_search.py).
    """
    if len(chosen) == steps:
        return chosen
    best = ternary_search(lambda i: score((*chosen, i)), chosen[-1], points - 1)
    return search_indices(score, steps, points, (*chosen, best))
