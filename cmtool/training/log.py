"""log.jsonl: what its lines say (means, speed, memory), and the file itself."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from cmtool.core.noise import NoiseRange
from cmtool.core.tensors import doubled, precise
from cmtool.errors import ResourceError, is_full
from cmtool.presets.schema import Preset
from cmtool.system.dist import Group
from cmtool.system.files import opened, read_own, write_atomic
from cmtool.system.portable import peak_resident
from cmtool.training.fit import StepInfo
from cmtool.training.records import LogLine

MAX_LOG = 1 << 30
"""Bytes of a log that are read: two million lines."""


class Progress(NamedTuple):
    """What a watcher is told at each step; `line` is the last log line, empty before the first."""

    step: int
    steps: int
    seconds_left: float
    line: dict[str, Any]
    is_log_line: bool


class Watcher(Protocol):
    """Shows a user how a run goes."""

    def progress(self, news: Progress) -> None:
        """Show the progress after one step."""

    def working(self, what: str, done: float, total: int) -> None:
        """Show how far a longer piece of work between steps is; `done` is 0 at its start."""

    def note(self, text: str) -> None:
        """Show a remark."""


def band_edges(noise_range: NoiseRange) -> list[float]:
    """Return the levels between bands of noise: the decades above sigma_min, below sigma_max."""
    decades = math.log10(noise_range.sigma_max / noise_range.sigma_min)
    return [noise_range.sigma_min * 10**i for i in range(1, math.ceil(decades - 1e-9))]


def band_names(edges: list[float]) -> list[str]:
    """Return `<0.02`, `0.02-0.2`, ..., `>20`; of no edges, `all`."""
    if not edges:
        return ["all"]
    texts = [f"{edge:g}" for edge in edges]
    between = [f"{low}-{high}" for low, high in itertools.pairwise(texts)]
    return [f"<{texts[0]}", *between, f">{texts[-1]}"]


class Means(NamedTuple):
    """Means over the steps since the last log line, None for a mean of nothing."""

    loss: float | None
    loss_by_sigma: dict[str, float | None]
    images_by_sigma: dict[str, int]
    grad_norm: float | None
    skipped: int


class Meter:
    """Sums since the last log line. They stay on the device and are read only for a line.

    A skipped step is counted, but is in no mean.
    """

    def __init__(self, noise_range: NoiseRange, device: str) -> None:
        edges = band_edges(noise_range)
        self.names = band_names(edges)
        best = precise(device)
        self.edges = torch.tensor(edges, dtype=best, device=device)
        self.bands = torch.arange(len(self.names), device=device)[:, None]
        self.loss = torch.zeros(len(self.names), dtype=best, device=device)
        self.images = torch.zeros_like(self.loss)
        self.norm = torch.zeros((), dtype=best, device=device)
        self.steps = self.skipped = 0

    def add(self, info: StepInfo) -> None:
        """Add one step."""
        if info.skipped:
            self.skipped += 1
            return
        place = torch.bucketize(doubled(info.sigma), self.edges, right=True)  # (B,)
        inside = place == self.bands  # (bands, B)
        self.loss += torch.where(inside, doubled(info.loss), 0).sum(1)
        self.images += inside.sum(1)
        self.norm += info.grad_norm
        self.steps += 1

    def sums(self, group: Group) -> dict[str, Any]:
        """Return the sums over all processes, ready for JSON; every process calls this."""
        loss, images = group.sum(torch.stack([self.loss, self.images])).tolist()
        counts = {"steps": self.steps, "skipped": self.skipped}
        return {"loss": loss, "images": images, "grad_norm": float(self.norm), **counts}

    def restore(self, sums: Mapping[str, Any] | None, *, leads: bool) -> None:
        """Go on from the `sums` of a stopped run; those over processes go to the leading one."""
        if sums is None or len(sums["loss"]) != len(self.names):
            return
        if leads:
            self.loss += self.loss.new_tensor(sums["loss"])
            self.images += self.images.new_tensor(sums["images"])
        self.norm += sums["grad_norm"]
        self.steps, self.skipped = sums["steps"], sums["skipped"]

    def take(self, group: Group) -> Means:
        """Return the means over all processes and reset the sums; every process calls this."""
        sums = self.sums(group)
        loss, images = sums["loss"], sums["images"]
        for total in (self.loss, self.images, self.norm):
            total.zero_()
        self.steps = self.skipped = 0
        return Means(
            loss=mean(sum(loss), sum(images)),
            loss_by_sigma=dict(zip(self.names, map(mean, loss, images), strict=True)),
            images_by_sigma=dict(zip(self.names, map(int, images), strict=True)),
            grad_norm=mean(sums["grad_norm"], sums["steps"]),
            skipped=sums["skipped"],
        )


def mean(total: float, count: float) -> float | None:
    """Return total / count; None (null in JSON) if there is nothing to count or no finite total."""
    return total / count if count and math.isfinite(total) else None


class Lap(NamedTuple):
    """What a step took: seconds, seconds of all the process's threads, and seconds of waiting."""

    seconds: float
    cpu_seconds: float
    waited: float


class Clock:
    """The time a run takes, from its start or resumption on.

    `ideal` is the seconds of a step that used all of the devices, None if it is not known.
    """

    def __init__(self, step: int, preset: Preset, ideal: float | None = None) -> None:
        self.ideal = ideal
        self.steps, self.batch = preset.train.steps, preset.train.batch
        self.first = self.step = step
        self.start = self.since = time.monotonic()
        self.cpu_since = time.process_time()
        self.waited = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the speed, though not out of the time left."""
        began, cpu_began = time.monotonic(), time.process_time()
        yield
        self.since += time.monotonic() - began
        self.cpu_since += time.process_time() - cpu_began

    def seconds_left(self, step: int) -> float:
        """Return the time to the last step at the pace so far."""
        pace = (time.monotonic() - self.start) / (step - self.first)
        return (self.steps - step) * pace

    def lap(self, step: int) -> Lap:
        """Return what a step took since the last lap."""
        now, cpu_now, steps = time.monotonic(), time.process_time(), step - self.step
        seconds, cpu_seconds = max(now - self.since, 1e-9), max(cpu_now - self.cpu_since, 0.0)
        lap = Lap(seconds / steps, cpu_seconds / steps, self.waited / steps)
        self.step, self.since, self.cpu_since, self.waited = step, now, cpu_now, 0.0
        return lap


def log_line(
    info: StepInfo, meter: Meter, clock: Clock, group: Group, device: str
) -> dict[str, Any]:
    """Return the line for log.jsonl and reset the sums; every process calls this."""
    means = meter.take(group)  # this waits for the device, so the clock is read after it
    seconds, cpu_seconds, waited = clock.lap(info.step)
    line = {
        "step": info.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": info.step * clock.batch,
        **means._asdict(),
        **{"lr": info.lr, "n": info.n, "mu": info.mu},
        "images_per_second": round(clock.batch / seconds, 1),
        "step_seconds": round(seconds, 6),
        "step_cpu_seconds": round(cpu_seconds, 6),
        "data_wait": round(waited / seconds, 4),
        "memory_gib": round(peak_memory(device) / 2**30, 3),
    }
    return line if clock.ideal is None else {**line, "mfu": round(clock.ideal / seconds, 4)}


def peak_memory(device: str) -> int:
    """Return the most bytes of memory this process has held: of the GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of log.jsonl in the order of their steps, and the last line of each step.

    A line that was cut short, is damaged, or has values of other types is left out. Raises
    InputError for what is no regular file, or is larger than a log can be.
    """
    try:
        content = read_own(path, MAX_LOG)
    except FileNotFoundError:
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in content.decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines[LogLine.model_validate(line).step] = line
    return [lines[step] for step in sorted(lines)]


def trim_log(out: Path, step: int) -> None:
    """Move the lines after a step, which will be written again, to log.superseded.jsonl."""
    log = out / "log.jsonl"
    texts = [(line["step"], json.dumps(line) + "\n") for line in read_log(log)]
    superseded = "".join(text for number, text in texts if number > step)
    if superseded:
        with opened(out / "log.superseded.jsonl", "ab") as file:
            file.write(superseded.encode())
    if texts or log.exists():
        write_atomic(log, "".join(text for number, text in texts if number <= step).encode())


class LogFile:
    """log.jsonl. Lines for which the disk has no room are written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[str] = []

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines written so far."""
        return read_log(self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line and the unwritten ones, or nothing. Raises ResourceError on a full disk."""
        self.unwritten.append(json.dumps(line) + "\n")
        content = "".join(self.unwritten).encode()
        with opened(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(content)
            except OSError as error:
                if not is_full(error):
                    raise
                written = 0
            if written < len(content):
                file.truncate(end)
                raise ResourceError(f"no room on the disk for {self.path}", "free disk space")
        self.unwritten.clear()


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a log line's numbers under names that trackers take, tables as `table/key`."""
    for key, value in line.items():
        if key == "eval":
            yield f"eval/{value['metric']}", value["value"]
        elif isinstance(value, Mapping):
            for band, number in value.items():
                if number is not None:
                    yield f"{key}/{band.replace('<', 'below_').replace('>', 'above_')}", number
        elif key not in ("step", "time") and value is not None:
            yield key, value
