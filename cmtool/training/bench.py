"""What a preset costs on this device: its speed, where the time goes, memory, hours."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch

from cmtool.models import Model
from cmtool.presets.schema import Preset
from cmtool.system import memory
from cmtool.system.devices import free_memory, is_out_of_memory
from cmtool.system.dist import ALONE
from cmtool.training.cost import GIB, check_memory, fitting_parts, step_memory
from cmtool.training.laps import ImagesOf, Lap, Rig, laps, rig, with_precision
from cmtool.training.utilisation import ideal_seconds, step_flops

SECONDS = 15.0
"""Steps are timed for as long, unless their number is given."""
SECONDS_OF_STEP = 4.0
"""On a CPU a step has so few images that it takes no longer, if one image does not."""
SECONDS_OF_TRIES = 15.0
"""How long larger batches are tried."""
MOST_LAPS = 50
GROWTH = 8
"""How many times as many images the next step on a CPU has at most."""
MOST_IMAGES = 1 << 20


class Held(NamedTuple):
    """Bytes of memory, beyond what was held before; None where nobody says it.

    `networks` has also their averages; `first_step` and `steady` are the most that a step took, the
    first and later ones. `reserved` is what torch took of a GPU in all, `estimate` what a run
    expects before it begins, for `images` at once.
    """

    networks: int | None
    first_step: int | None
    steady: int | None
    reserved: int | None
    estimate: int | None


class Figures(NamedTuple):
    """What was measured: of `laps` steps, each of `rounds` microbatches of `images`.

    `lap` is a step of the whole batch, by phase; `first` the seconds of the first step. `largest`
    is the most images at once, by trying (`is_tried`) or by the estimate.
    """

    preset: Preset
    images: int
    rounds: int
    laps: int
    lap: Lap
    first: float
    flops: int | None
    mfu: float | None
    held: Held
    largest: int | None
    is_tried: bool

    @property
    def images_per_second(self) -> float:
        """Images a second of the whole batch."""
        return self.preset.train.batch / self.lap.whole

    @property
    def hours(self) -> float:
        """Hours of all steps of the preset, without samples, evaluations and checkpoints."""
        return self.preset.train.steps * self.lap.whole / 3600


def bench(
    preset: Preset,
    teacher: Model | None,
    device: str,
    *,
    images: ImagesOf | None = None,
    steps: int | None = None,
    tries: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Return what a preset costs on a device, by some steps of its training. Nothing is written.

    `images` gives microbatches of the data set; random images stand in for it. With `tries` a GPU
    is given larger batches until its memory ends. Raises ResourceError
    where not even one image at a time fits, and UserError as a run does.
    """
    estimate, free = step_memory(preset, teacher, device), free_memory(device)
    preset = _split(with_precision(preset, device), teacher, device, tell)
    size = preset.train.batch // preset.train.accumulate
    before = memory.held(device)
    made = rig(preset, teacher, device, images)
    networks = memory.held(device)
    memory.look_anew(device)
    timed = Timed(made, size)
    if device == "cpu":
        timed.grow()
    timed.begin()
    if timed.images < size and device == "cpu":
        tell(f"steps of {timed.images} images are timed; each image of {size} takes as long")
    elif timed.images < size:
        parts = preset.train.accumulate * (size // timed.images)
        tell(f"{size} images at once do not fit: --accumulate {parts} is timed")
        preset = _with_parts(preset, parts)
    first_step = memory.most_held(device)
    memory.look_anew(device)
    found = timed.run(steps)
    steady, reserved = memory.most_held(device), memory.most_reserved(device)
    lap = found[(len(found) - 1) // 2].of(preset.train.batch / (timed.images * timed.rounds))
    ideal = ideal_seconds(preset, teacher, device, 1)
    held = Held(
        networks=_above(networks, before), first_step=_above(first_step, before),
        steady=_above(steady, before), reserved=reserved,
        estimate=None if estimate is None else estimate.of(timed.images),
    )  # fmt: skip
    largest, is_tried = None, tries and device.startswith("cuda") and not preset.train.compile
    if is_tried:
        largest = timed.largest()
    elif estimate is not None and free is not None:
        largest = max((free - estimate.networks) // max(estimate.image, 1), 0)
    return Figures(
        preset, timed.images, timed.rounds, len(found), lap, timed.first,
        step_flops(preset, teacher), None if ideal is None else ideal / lap.whole, held, largest,
        is_tried,
    )  # fmt: skip


def _split(
    preset: Preset, teacher: Model | None, device: str, tell: Callable[[str], None]
) -> Preset:
    """Return a preset with its batch in so many parts that the expected memory is free.

    Raises ResourceError where one image at a time is too much.
    """
    check_memory(_with_parts(preset, preset.train.batch), teacher, device, ALONE)
    estimate, free = step_memory(preset, teacher, device), free_memory(device)
    train = preset.train
    size = train.batch // train.accumulate
    if estimate is None or free is None or estimate.of(size) <= free:
        return preset
    parts = fitting_parts(preset, estimate, free) or train.batch
    tell(f"{size} images at once do not fit into {free / GIB:.1f} GiB: --accumulate {parts} does")
    return _with_parts(preset, parts)


def _with_parts(preset: Preset, parts: int) -> Preset:
    """Return a preset with its batch in so many parts."""
    train = preset.train.model_copy(update={"accumulate": parts})
    return preset.model_copy(update={"train": train})


def _above(now: int | None, before: int | None) -> int | None:
    """Return how many bytes more are held, None where it is not known."""
    return None if now is None or before is None else max(now - before, 0)


class Timed:
    """Steps of a rig, of so many images at once as fit; `first` is the time of the first one."""

    def __init__(self, rig: Rig, images: int) -> None:
        self.rig, self.wanted, self.images = rig, images, images
        self.rounds = min(rig.preset.train.accumulate, 2)  # the second has gradients beside it
        self.first = 0.0
        self.steps: Iterator[Lap] | None = None

    def grow(self) -> None:
        """Find how many images a step may have: from one on, as long as it takes no longer."""
        size = 1
        while size < self.wanted:
            steps = laps(self.rig, size, self.rounds)
            first = lap = next(steps)
            if lap.whole > SECONDS_OF_STEP / 2:  # a method may prepare something in its first step
                lap = next(steps)
            times = min(int(SECONDS_OF_STEP / max(lap.whole, 1e-9)), GROWTH)
            if times < 2:  # the steps go on
                self.steps, self.first = steps, first.whole
                break
            size = min(size * times, self.wanted)
        self.images = size

    def begin(self) -> None:
        """Take the first step, with fewer images each time that they do not fit."""
        while self.steps is None and not self._begun():
            if self.images == 1:
                raise torch.OutOfMemoryError("out of memory with one image at a time")
            self.images = next(n for n in range(self.images // 2, 0, -1) if self.images % n == 0)
            self._tidy()

    def _begun(self) -> bool:
        """Take the first step; return False if memory is short."""
        try:
            steps = laps(self.rig, self.images, self.rounds)
            self.first = next(steps).whole
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        self.steps = steps
        return True

    def run(self, steps: int | None) -> list[Lap]:
        """Return the laps of later steps, so many or what there is time for, the fastest first."""
        assert self.steps is not None
        found, until = list[Lap](), time.monotonic() + SECONDS
        for lap in islice(self.steps, steps or MOST_LAPS):
            found.append(lap)
            if steps is None and time.monotonic() > until:
                break
        self.steps = None
        return sorted(found, key=lambda lap: lap.whole)

    def largest(self) -> int:
        """Return the most images at once that fit, by doubling from those that do."""
        size, until = self.images, time.monotonic() + SECONDS_OF_TRIES
        while 2 * size <= MOST_IMAGES and time.monotonic() < until:
            self._tidy()
            if not self._fits(2 * size):
                break
            size *= 2
        self._tidy()
        return size

    def _fits(self, images: int) -> bool:
        """Tell whether two steps of so many images at once fit."""
        rounds = 2 if images < self.rig.preset.train.batch else 1
        try:
            for _ in islice(laps(self.rig, images, rounds), 1):
                pass
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _tidy(self) -> None:
        """Give back what a step left."""
        self.rig.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.rig.device.startswith("cuda"):
            torch.cuda.empty_cache()
