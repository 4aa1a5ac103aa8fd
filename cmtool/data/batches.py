"""The order in which training sees images, and the workers that decode ahead of it."""

from __future__ import annotations

import atexit
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from cmtool.core.rng import keyed_generator
from cmtool.core.tensors import to_device
from cmtool.core.types import NO_CLASS
from cmtool.data.datasets import Dataset, Images
from cmtool.data.images import from_uint8
from cmtool.errors import InputError, ResourceError
from cmtool.system.devices import keep_freed_memory
from cmtool.system.workers import WORKER_TIMEOUT, Results, made_ahead

BatchFn = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""`(step, shard) -> (x0, labels)`, one microbatch."""


def batches(
    data: Dataset,
    *,
    batch: int,
    shards: int,
    seed: int,
    device: str,
    flip: bool = False,
    label_dropout: float = 0.0,
    balanced: bool = False,
    workers: int = 0,
    timeout: float = WORKER_TIMEOUT,
    rank: int = 0,
    world_size: int = 1,
) -> BatchFn:
    """Return the function that gives each microbatch: x0 (batch / shards, C, H, W), labels or None.

    Each epoch has a permutation that is a function of (seed, epoch), and the images that `flip`
    mirrors, or that lose their label by `label_dropout`, are a function of (seed, step, shard): a
    resumed or differently split run sees the same images at the same steps. `balanced` shows each
    class equally often, and the images of a class in epochs of its own. `workers` processes decode
    ahead for the shards of this `rank`, as long as steps are asked for in order. Raises InputError
    for a batch that the shards do not divide and for balanced images without classes, and later
    ResourceError for a worker that died or hangs for `timeout` seconds.
    """
    order = ByClass.of(data) if balanced else partial(epoch_indices, len(data))
    if batch % shards:
        what = f"a batch of {batch} cannot be split into {shards} equal parts"
        raise InputError(what, f"use a multiple of {shards}")
    if device == "cpu":
        keep_freed_memory()
    elif isinstance(data.images, Tensor):  # in memory, so on the GPU
        labels = None if data.labels is None else data.labels.to(device)
        data = replace(data, images=data.images.to(device), labels=labels)
    pick = Picker(data, batch, batch // shards, seed, flip, label_dropout, order)
    fetch: BatchFn = pick
    if workers and not isinstance(data.images, Tensor):
        fetch = PickerAhead(pick, workers, range(rank, shards, world_size), timeout)

    def microbatch(step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        images, labels = fetch(step, shard)
        given = None if labels is None else to_device(labels, device)
        return from_uint8(to_device(images, device)), given

    return microbatch


@dataclass(frozen=True)
class Picker:
    """Picks the images of a microbatch: `(step, shard) -> (images uint8, labels)`."""

    data: Dataset
    batch: int
    size: int
    seed: int
    flip: bool
    label_dropout: float
    order: Callable[[int, int, int], Tensor]
    """`(seed, first, size)` -> indices of `size` images, from number `first` in the order."""

    def __call__(self, step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        """Return one microbatch, on the device where the images are."""
        images, labels = self.data.images, self.data.labels
        first = step * self.batch + shard * self.size
        index = self.order(self.seed, first, self.size)
        if isinstance(images, Tensor):
            index = to_device(index, str(images.device))
        found = images[index]
        if self.flip:
            generator = keyed_generator("flip", self.seed, step, shard)
            mirrored = torch.rand(len(found), generator=generator) < 0.5
            mirrored = to_device(mirrored, str(found.device))[:, None, None, None]
            found = torch.where(mirrored, found.flip(3), found)
        return found, None if labels is None else self.some(labels[index], step, shard)

    def some(self, labels: Tensor, step: int, shard: int) -> Tensor:
        """Return labels (B,) with a share of them, `label_dropout`, replaced by NO_CLASS."""
        if not self.label_dropout:
            return labels
        generator = keyed_generator("label dropout", self.seed, step, shard)
        dropped = torch.rand(len(labels), generator=generator) < self.label_dropout
        return labels.masked_fill(to_device(dropped, str(labels.device)), NO_CLASS)


def epoch_indices(count: int, seed: int, first: int, size: int) -> Tensor:
    """Return the indices of `size` images, from number `first` of all epochs in order."""
    parts = []
    while size:
        epoch, slot = divmod(first, count)
        parts.append(permutation(count, seed, epoch)[slot : slot + size])
        first, size = first + len(parts[-1]), size - len(parts[-1])
    return torch.cat(parts)


@lru_cache(4)
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch."""
    return torch.randperm(count, generator=keyed_generator("epoch", seed, epoch))


@dataclass(frozen=True)
class ByClass:
    """An order of images in which the classes take turns: a round has one image of each."""

    members: tuple[Tensor, ...]
    """The indices of the images of each class that has any."""

    @classmethod
    def of(cls, data: Dataset) -> ByClass:
        """Return the order for a data set. Raises InputError if it has no classes."""
        if data.labels is None:
            what = f"{data.name} has no classes, which data.balanced shows equally often"
            raise InputError(what, "leave it out: --set data.balanced=false")
        labels = data.labels.cpu()
        return cls(tuple((labels == label).nonzero()[:, 0] for label in labels.unique()))

    def __call__(self, seed: int, first: int, size: int) -> Tensor:
        """Return the indices of `size` images, from number `first` of all rounds in order."""
        return torch.stack([self.index(seed, number) for number in range(first, first + size)])

    def index(self, seed: int, number: int) -> Tensor:
        """Return the index (scalar) of the image with this number."""
        turn, slot = divmod(number, len(self.members))
        label = int(turn_order(len(self.members), seed, turn)[slot])
        mine = self.members[label]
        epoch, place = divmod(turn, len(mine))
        return mine[class_order(len(mine), seed, label, epoch)[place]]


@lru_cache(4)
def turn_order(classes: int, seed: int, turn: int) -> Tensor:
    """Return the order of the classes in a round."""
    return torch.randperm(classes, generator=keyed_generator("turn", seed, turn))


@lru_cache(4096)
def class_order(count: int, seed: int, label: int, epoch: int) -> Tensor:
    """Return the order of an epoch of one class."""
    return torch.randperm(count, generator=keyed_generator("class epoch", seed, label, epoch))


@dataclass
class PickerAhead:
    """A Picker whose microbatches worker processes decode ahead, in the order of training."""

    pick: Picker
    workers: int
    shards: range
    timeout: float
    decoded: Iterator[Any] | None = None
    next: int | None = None
    """The number of the microbatch that `decoded` yields next, in this process's order."""

    def __call__(self, step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        """Return one microbatch. Raises ResourceError when a worker died or hangs."""
        if shard not in self.shards:  # another process's, of which no worker is ahead
            return self.pick(step, shard)
        number = step * len(self.shards) + self.shards.index(shard)
        if self.next != number:
            gc.freeze()  # else garbage collections copy the memory that workers share with us
            atexit.register(gc.unfreeze)
            made = Results(partial(_numbered, self.pick, self.shards))
            self.decoded = made_ahead(made, itertools.count(number), self.workers, self.timeout)
        assert self.decoded is not None
        try:
            found = next(self.decoded)
        except ResourceError as error:
            raise ResourceError(f"{error.what} at step {step}", error.hint) from None
        self.next = number + 1
        if isinstance(found, InputError):
            self.decoded = self.next = None  # this ends the workers too
            raise found
        return found


def _numbered(pick: Picker, shards: range, number: int) -> tuple[Tensor, Tensor | None]:
    """Return a microbatch by its number in the order in which a process asks for them."""
    step, place = divmod(number, len(shards))
    return pick(step, shards[place])


def decoded_ahead(images: Images, parts: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield the images (n, C, H, W) of each index, decoded ahead by worker processes.

    Raises InputError naming what cannot be read, ResourceError for a worker that is gone.
    """
    made = Results(lambda number: images[parts[number]])
    crew = 0 if isinstance(images, Tensor) else workers
    for found in made_ahead(made, range(len(parts)), crew):
        if isinstance(found, InputError):
            raise found
        yield found
