"""Several cores of a CPU at once, without waiting for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

MOST = 16
"""Parts that are worked on at once: each needs memory of its own."""
T = TypeVar("T")


def side_by_side(
    work: Callable[..., T], parts: Sequence[tuple[Any, ...]], *, is_light: bool = False
) -> list[T]:
    """Return `work(*part)` for each part, in order: as many at once as torch has threads.

    Each part is on one thread. The threads of one small operation would wait for each other after
    each operation; where other programs use the cores too, that takes up to 40 times as long. A
    part that is alone is on all threads, unless it `is_light`.
    """
    threads = torch.get_num_threads()
    if threads == 1 or (len(parts) == 1 and not is_light):
        return [work(*part) for part in parts]
    has_gradients = torch.is_grad_enabled()  # which each thread has for itself

    def work_on(part: tuple[Any, ...]) -> T:
        with torch.set_grad_enabled(has_gradients):
            return work(*part)

    torch.set_num_threads(1)
    try:
        if len(parts) == 1:
            return [work(*part) for part in parts]
        with ThreadPoolExecutor(min(threads, len(parts), MOST)) as pool:
            return list(pool.map(work_on, parts))
    finally:
        torch.set_num_threads(threads)
