"""One pass over all images of a data set, in worker processes: what it holds, and what is bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmtool.data.datasets import Dataset
from cmtool.data.drawing import png_bytes
from cmtool.data.images import from_uint8
from cmtool.data.sources import LazyImages
from cmtool.errors import InputError
from cmtool.system.workers import Results, made_ahead

PART = 64
"""Images that a worker takes at a time."""


@dataclass
class Survey:
    """What some images hold: how many of each size and mode, sums over images, and errors.

    `mean` (C,) is the sum of their means in [-1, 1], `square` of their mean squares.
    """

    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    mean: Tensor | float = 0.0
    square: float = 0.0

    @property
    def good(self) -> int:
        """How many images can be read."""
        return self.sizes.total()

    @property
    def sigma_data(self) -> float:
        """The standard deviation of all images about the mean image colour, in [-1, 1]."""
        if isinstance(self.mean, float):
            return 0.0
        mean = self.mean / self.good
        return max(self.square / self.good - float(mean.square().mean()), 0.0) ** 0.5

    def add(self, other: Survey) -> None:
        """Add what other images hold."""
        self.sizes += other.sizes
        self.modes += other.modes
        self.bad += other.bad
        self.mean += other.mean
        self.square += other.square


def surveys(data: Dataset, workers: int = 0, every: int = 1) -> Iterator[Survey]:
    """Yield what each PART of the images holds, in their own sizes; of every image, or fewer."""
    return _map_parts(data, range(0, len(data), every), workers, _survey)


def pngs(data: Dataset, workers: int = 0) -> Iterator[list[bytes | InputError]]:
    """Yield the images of each PART as PNG files, or the error of one that cannot be used.

    Without a given size all must have the size of the first image that can be read.
    """
    if isinstance(data.images, LazyImages):
        data.images.settle()  # else each worker would take the size of its own first image
    return _map_parts(data, range(len(data)), workers, _encode)


def check_images(data: Dataset, workers: int = 0, rank: int = 0, world_size: int = 1) -> None:
    """Decode this process's share of all images. Raises InputError naming a bad one."""
    for found in _map_parts(data, range(rank, len(data), world_size), workers, _decode):
        if isinstance(found, InputError):
            found.rank = rank
            raise found


def _survey(data: Dataset, part: Sequence[int]) -> Survey:
    """Return what the images of a part hold."""
    images, found = data.images, Survey()
    for index in part:
        try:
            if isinstance(images, LazyImages):
                image, mode = images.decoded(index), images.mode(index)
            else:
                image = images[torch.tensor([index])][0]
                mode = "L" if len(image) == 1 else "RGB"
        except InputError as error:
            found.bad.append(error.what)
            continue
        x = from_uint8(image).double()
        found.sizes[f"{image.shape[2]}x{image.shape[1]}"] += 1
        found.modes[mode] += 1
        found.mean = found.mean + x.mean((1, 2))
        found.square += float(x.square().mean())
    return found


def _encode(data: Dataset, part: Sequence[int]) -> list[bytes | InputError]:
    found: list[bytes | InputError] = []
    for index in part:
        try:
            found.append(png_bytes(data.images[torch.tensor([index])][0]))
        except InputError as error:
            found.append(error)
    return found


def _decode(data: Dataset, part: Sequence[int]) -> None:
    data.images[torch.tensor(part)]


def _map_parts(
    data: Dataset, order: range, workers: int, use: Callable[[Dataset, Sequence[int]], Any]
) -> Iterator[Any]:
    """Yield what `use` returns for each part of the order, or the InputError it raises."""
    parts = [order[i : i + PART] for i in range(0, len(order), PART)]
    made = Results(lambda number: use(data, parts[number]))
    yield from made_ahead(made, range(len(parts)), workers)
