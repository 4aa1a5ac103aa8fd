"""Images held out: a share of a data set that training does not see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmtool.core.rng import keyed_generator
from cmtool.data.datasets import Dataset, Images
from cmtool.errors import UserError


@dataclass(frozen=True)
class Subset:
    """Some of the images of a set, at the places `index` (n,), decoded when they are asked for."""

    images: Images
    index: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """N, C, H, W."""
        return len(self.index), *self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images (n, C, H, W) of a one-dimensional index."""
        return self.images[self.index[index]]


def split(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and those held out: a share of all, both in their own order.

    Which ones is a function of the number of images and the share. Raises UserError for a share
    that leaves no image on one of the sides.
    """
    num, count = len(data), round(len(data) * share)
    if not 0 < count < num:
        what = f"data.held_out = {share:g} of the {num:,} images of {data.name} is {count:,}"
        raise UserError(what, f"choose a share of {1 / num:.2g} or more, and less than 1")
    order = torch.randperm(num, generator=keyed_generator("held out"))
    places = order[count:].sort().values, order[:count].sort().values
    train, held = (_part(data, index, share) for index in places)
    return train, replace(held, name=f"{data.name}, held out", notes=())


def _part(data: Dataset, index: Tensor, share: float) -> Dataset:
    """Return some of the images of a set, those of one kept in memory as a tensor."""
    labels = None if data.labels is None else data.labels[index]
    if isinstance(data.images, Tensor):
        return replace(data, images=data.images[index], labels=labels, known_hash="")
    mark = f"{data.fingerprint()} {share!r} {len(index)}"
    known = hashlib.sha256(mark.encode()).hexdigest()[:16]
    return replace(data, images=Subset(data.images, index), labels=labels, known_hash=known)
