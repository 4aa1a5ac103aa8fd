"""Seconds, memory and the machine's peak: what the benchmarks measure with."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """What one call took: by the clock on the wall, and of this process on the processor."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Seconds:
    """Return the seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def apart(build: Callable[[], Callable[[], object]]) -> Callable[[Callable[..., Any]], Any]:
    """Return what measures, in a process of its own, the call that `build` returns there.

    So the memory settings and the state of the heap of neither side are the other's. The process
    starts now, by fork, and builds when it is first asked.
    """
    here, there = get_context("fork").Pipe()

    def serve() -> None:
        call = None
        while True:
            measure = there.recv()
            call = call or build()
            there.send(measure(call))

    get_context("fork").Process(target=serve, daemon=True).start()

    def ask(measure: Callable[..., Any]) -> Any:
        here.send(measure)
        return here.recv()

    return ask


def alternate(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    take: Callable[[Callable[[], Any]], Seconds] = timed,
) -> dict[str, list[Seconds]]:
    """Return the seconds of each call, one after another in turn, after one turn to warm up.

    What else the machine does then falls on all alike: only ratios within one turn mean anything.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = take(call)
            if turn:
                seconds[name].append(took)
    return seconds


def ratio(slow: list[Seconds], fast: list[Seconds]) -> Seconds:
    """Return how many times as long `slow` took: the median over the turns, wall and CPU."""
    pairs = list(zip(slow, fast, strict=True))
    return Seconds(
        statistics.median(a.wall / b.wall for a, b in pairs),
        statistics.median(a.cpu / b.cpu for a, b in pairs),
    )


def resident(field: str = "VmRSS") -> float:
    """Return a line of /proc/self/status in MiB: VmRSS is now, VmHWM the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def peak_resident(call: Callable[[], object]) -> float:
    """Return the MiB that the process grew by at the height of a call.

    What was freed before is first given back to the system, or it would hide what the call takes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the height is now
    call()
    return resident("VmHWM") - before


def peak_flops(precision: str) -> float:
    """Return the FLOP/s of a large 3x3 convolution on this machine's threads."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = torch.randn(16, 256, 32, 32).to(dtype), torch.randn(256, 256, 3, 3).to(dtype)
    with torch.no_grad():
        seconds = [timed(lambda: torch.nn.functional.conv2d(x, w, padding=1)).cpu for _ in range(6)]
    return 2 * 16 * 256 * 256 * 9 * 32 * 32 / min(seconds)
