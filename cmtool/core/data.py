"""Data sets: uint8 images with class labels, and the order in which training sees them."""

from __future__ import annotations

import atexit
import colorsys
import gc
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmtool.core.devices import keep_freed_memory, sent
from cmtool.core.images import from_uint8
from cmtool.core.rng import keyed_generator
from cmtool.core.sources import LazyImages, listed_entries, open_images
from cmtool.core.workers import WORKER_TIMEOUT, made_ahead
from cmtool.errors import InputError, ResourceError, nearest

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"
COLOURINGS = 8
HELD_OUT_EVERY = 5
MAX_IN_MEMORY = 256 << 20
"""Bytes of decoded images that are kept in memory, and on a GPU; more are streamed."""
MAX_CHECKED = 50_000
"""Images of a streamed set that are all decoded once before the first step."""


class Images(Protocol):
    """Images (N, C, H, W) uint8: a tensor, or what decodes them when they are asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """N, C, H, W."""
        ...

    def __len__(self) -> int:
        """Return N."""
        ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Return the images (n, C, H, W) of a one-dimensional index."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) uint8 with labels (N,) int64 or None."""

    name: str
    images: Images
    labels: Tensor | None
    num_classes: int
    known_hash: str = ""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def is_checked_first(self) -> bool:
        """Whether the images are few enough to decode all before training, and were not yet."""
        return not isinstance(self.images, Tensor) and len(self) <= MAX_CHECKED

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield self.images[torch.arange(first, min(first + size, len(self)))]

    def fingerprint(self) -> str:
        """Return a hash of images and labels, to recognise the same data again."""
        if self.known_hash:
            return self.known_hash
        digest = hashlib.sha256()
        for chunk in self.chunks(4096):
            digest.update(chunk.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def digits(split: str = "train") -> Dataset:
    """Return the bundled handwritten digits as 8x8 RGB pictures, `split` train or held-out.

    The 1,797 digits of the UCI Optical Recognition set (Alpaydin & Kaynak 1998, CC BY 4.0); every
    fifth of each class is held out. Each appears in 8 colourings, first all digits in their first
    colouring, then all in their second. Colours are a function of digit and colouring alone.
    """
    if split not in ("train", "held-out"):
        raise InputError(f"no split {split!r} of the digits", nearest(split, ["train", "held-out"]))
    with np.load(DIGITS) as stored:
        ink_amount, labels = stored["images"], stored["labels"]
    index = np.arange(len(labels))
    rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])  # in class
    held_out = rank % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = index[held_out if split == "held-out" else ~held_out]
    parts = []
    for colouring in range(COLOURINGS):
        colours = np.array([_colours(int(i) + colouring * len(labels)) for i in chosen])
        paper, ink = colours[:, 0, :, None, None], colours[:, 1, :, None, None]  # (n, 3, 1, 1)
        amount = ink_amount[chosen, None] / 16.0  # (n, 1, 8, 8)
        parts.append((255 * (paper + (ink - paper) * amount)).round().astype(np.uint8))
    images = torch.from_numpy(np.concatenate(parts))
    repeated = torch.from_numpy(np.tile(labels[chosen], COLOURINGS).astype(np.int64))
    return Dataset(f"digits:{split}", images, repeated, num_classes=10)


def _colours(index: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return paper and ink (RGB in [0, 1]) from an additive low-discrepancy sequence.

    Paper is light and pale, ink is dark and saturated; hues are independent.
    """
    root = 1.1127756842787055  # of r^7 = r + 1: an even spread in six dimensions (Roberts 2018)
    u = [(0.5 + (index + 1) * root ** -(d + 1)) % 1.0 for d in range(6)]
    paper = colorsys.hsv_to_rgb(u[0], 0.1 + 0.3 * u[1], 0.85 + 0.15 * u[2])
    ink = colorsys.hsv_to_rgb(u[3], 0.7 + 0.3 * u[4], 0.25 + 0.35 * u[5])
    return paper, ink


def load_dataset(
    name: str,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    fit: str = "exact",
    in_memory: bool = True,
) -> Dataset:
    """Return a data set by name (`digits`, `digits:held-out`) or by path.

    A path is a folder or zip of images, an npz, CIFAR-10's python tarball, or an LSUN database;
    images are brought to `size` (H, W) by the rule `fit`. Up to 256 MiB are decoded at once, more,
    or without `in_memory`, when they are asked for. Raises InputError, naming the file that
    cannot be used.
    """
    known, _, split = name.partition(":")
    if known in DATASETS:
        return DATASETS[known](split or "train")
    path = Path(name)
    if not name or not path.exists():
        hint = f"{nearest(name, DATASETS)}, or give the path of a folder, zip, npz or tarball"
        raise InputError(f"no data set or folder {name!r}", hint)
    entries = open_images(path)
    if entries is None:
        raise InputError(
            f"{name} is not a data set", "give a folder or zip of images, an npz, or a tarball"
        )
    lazy = LazyImages(name, entries, channels, size, fit)
    labels = None if entries.labels is None else torch.tensor(entries.labels)
    if not in_memory or math.prod(lazy.shape) > MAX_IN_MEMORY:
        return Dataset(name, lazy, labels, _count(labels), entries.fingerprint)
    everything = torch.empty(lazy.shape, dtype=torch.uint8)
    for index, image in enumerate(everything):
        image.copy_(lazy.image(index))
    return Dataset(name, everything, labels, _count(labels))


def listed_images(paths: Sequence[str]) -> Dataset:
    """Return the image files of a list as a data set, RGB, decoded when they are asked for."""
    images = LazyImages("", listed_entries(paths), 3, None, "exact")
    name = paths[0] if len(paths) == 1 else f"{len(paths)} files"
    return Dataset(name, images, None, 0, images.entries.fingerprint)


def _count(labels: Tensor | None) -> int:
    return 0 if labels is None else int(labels.max()) + 1


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
    workers: int = 0,
    timeout: float = WORKER_TIMEOUT,
    rank: int = 0,
    world_size: int = 1,
) -> BatchFn:
    """Return the function that gives each microbatch: x0 (batch / shards, C, H, W), labels or None.

    The order is a permutation of each epoch, a function of (seed, epoch), and so are the mirrored
    images of `flip`: a resumed or differently split run sees the same images at the same steps.
    `workers` processes decode ahead, for the shards of this `rank`, when asked in order. Raises
    InputError for a batch the shards do not divide, and later ResourceError for a worker that died
    or gives nothing for `timeout` seconds.
    """
    if batch % shards:
        raise InputError(
            f"a batch of {batch} cannot be split into {shards} equal parts",
            f"use a multiple of {shards}",
        )
    if device == "cpu":
        keep_freed_memory()
    pick = Picker(resident(data, device), batch, batch // shards, seed, flip)
    fetch: BatchFn = pick
    if workers and not isinstance(data.images, Tensor):
        fetch = Ahead(pick, workers, range(rank, shards, world_size), timeout)

    def microbatch(step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        images, labels = fetch(step, shard)
        return from_uint8(sent(images, device)), None if labels is None else sent(labels, device)

    return microbatch


def resident(data: Dataset, device: str) -> Dataset:
    """Return the data set with its images, if it has them in memory, on the device."""
    if not isinstance(data.images, Tensor) or device == "cpu":
        return data
    labels = None if data.labels is None else data.labels.to(device)
    return replace(data, images=data.images.to(device), labels=labels)


@dataclass(frozen=True)
class Picker:
    """Which images a microbatch has: `(step, shard) -> (images uint8, labels)`."""

    data: Dataset
    batch: int
    size: int
    seed: int
    flip: bool

    def __call__(self, step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        """Return one microbatch, where the images are."""
        images, labels = self.data.images, self.data.labels
        first = step * self.batch + shard * self.size
        index = places(len(self.data), self.seed, first, self.size)
        if isinstance(images, Tensor):
            index = sent(index, str(images.device))
        found = images[index]
        if self.flip:
            generator = keyed_generator("flip", self.seed, step, shard)
            mirrored = torch.rand(len(found), generator=generator) < 0.5
            mirrored = sent(mirrored, str(found.device))[:, None, None, None]
            found = torch.where(mirrored, found.flip(3), found)
        return found, None if labels is None else labels[index]


def places(count: int, seed: int, first: int, size: int) -> Tensor:
    """Return the indices of `size` images from place `first` on: epoch after epoch."""
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


class Ahead:
    """A Picker whose microbatches are decoded ahead, by worker processes, in training's order."""

    def __init__(self, pick: Picker, workers: int, shards: range, timeout: float) -> None:
        self.pick = pick
        self.workers = workers
        self.shards = shards
        self.timeout = timeout
        self.waiting: Iterator[Any] | None = None
        self.next: tuple[int, int] | None = None

    def __call__(self, step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        """Return one microbatch. Raises ResourceError when a worker died or hangs."""
        if self.next != (step, shard):
            gc.freeze()  # or collections, here and there, copy all that workers share with us
            atexit.register(gc.unfreeze)
            start = step * len(self.shards) + self.shards.index(shard)
            turns = _Turns(self.pick, self.shards)
            order = itertools.count(start)
            self.waiting = made_ahead(turns, order, self.workers, self.timeout)
        assert self.waiting is not None
        try:
            found = next(self.waiting)
        except ResourceError as error:
            raise ResourceError(f"{error.what} at step {step}", error.hint) from None
        later = self.shards.index(shard) + 1
        self.next = (
            (step, self.shards[later]) if later < len(self.shards) else (step + 1, self.shards[0])
        )
        if isinstance(found, InputError):
            self.waiting = self.next = None  # and with it go the workers
            raise found
        return found


def decoded_ahead(images: Images, parts: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield the images (n, C, H, W) of each index, decoded ahead by worker processes.

    Raises InputError naming what cannot be read, ResourceError for a worker that is gone.
    """
    if isinstance(images, Tensor):
        workers = 0
    for found in made_ahead(_Parts(images, parts), range(len(parts)), workers):
        if isinstance(found, InputError):
            raise found
        yield found


class _Turns(TorchDataset[Any]):
    """The microbatches of one process, numbered in the order it asks for them."""

    def __init__(self, pick: Picker, shards: range) -> None:
        self.pick = pick
        self.shards = shards

    def __getitem__(self, turn: int) -> Any:
        step, place = divmod(turn, len(self.shards))
        try:
            return self.pick(step, self.shards[place])
        except InputError as error:  # raised again where the user can see it
            return error


class _Parts(TorchDataset[Any]):
    """Images by the number of their index; what cannot be read is given, not raised."""

    def __init__(self, images: Images, parts: Sequence[Tensor]) -> None:
        self.images = images
        self.parts = parts

    def __getitem__(self, number: int) -> Any:
        try:
            return self.images[self.parts[number]]
        except InputError as error:
            return error


DATASETS: dict[str, Callable[[str], Dataset]] = {"digits": digits}
