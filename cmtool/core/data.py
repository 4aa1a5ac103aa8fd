"""Data sets: uint8 images with class labels, and the order in which training sees them."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtool.core.images import SUFFIXES, from_uint8, read_image
from cmtool.core.rng import keyed_generator
from cmtool.errors import InputError, nearest

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"
COLOURINGS = 8
HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) uint8 with labels (N,) int64 or None, in memory."""

    name: str
    images: Tensor
    labels: Tensor | None
    num_classes: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.images.shape[0]

    def fingerprint(self) -> str:
        """Return a hash of images and labels, to recognise the same data again."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
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


def folder(path: Path) -> Dataset:
    """Return a folder of images, recursive and sorted by path; sub-folders are classes.

    Raises InputError for an empty folder or images of different sizes, naming the files.
    """
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"no images in {path}", f"looked for {', '.join(SUFFIXES)}")
    images = [read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            (h0, w0), (h, w) = images[0].shape[1:], image.shape[1:]
            raise InputError(
                f"{file} is {w}x{h} but {files[0]} is {w0}x{h0}", "bring them to one size first"
            )
    parents = [file.relative_to(path).parent.as_posix() for file in files]
    classes = sorted(set(parents))
    labels = None
    if len(classes) > 1:
        labels = torch.tensor([classes.index(parent) for parent in parents])
    return Dataset(
        str(path), torch.stack(images), labels, len(classes) if labels is not None else 0
    )


def load_dataset(name: str) -> Dataset:
    """Return a data set by name (`digits`, `digits:held-out`) or by the path of a folder."""
    known, _, split = name.partition(":")
    if known in DATASETS:
        return DATASETS[known](split or "train")
    path = Path(name)
    if not path.exists():
        raise InputError(f"no data set or folder {name!r}", nearest(name, DATASETS))
    if not path.is_dir():
        raise InputError(f"{name} is not a folder", "give a folder of images, or a data set's name")
    return folder(path)


BatchFn = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""`(step, shard) -> (x0, labels)`, one microbatch."""


def batches(data: Dataset, *, batch: int, shards: int, seed: int, device: str) -> BatchFn:
    """Return the function that gives each microbatch: x0 (batch / shards, C, H, W), labels or None.

    The order is a permutation of each epoch, a function of (seed, epoch), so that a resumed or
    differently split run sees the same images at the same steps. Raises InputError for a batch
    the shards do not divide.
    """
    if batch % shards:
        raise InputError(
            f"a batch of {batch} cannot be split into {shards} equal parts",
            f"use a multiple of {shards}",
        )
    size = batch // shards

    @lru_cache(2)
    def permutation(epoch: int) -> Tensor:
        return torch.randperm(len(data), generator=keyed_generator("epoch", seed, epoch))

    def microbatch(step: int, shard: int) -> tuple[Tensor, Tensor | None]:
        first = step * batch + shard * size
        place = [divmod(first + i, len(data)) for i in range(size)]
        index = torch.stack([permutation(epoch)[slot] for epoch, slot in place])
        x0 = from_uint8(data.images[index]).to(device)
        labels = None if data.labels is None else data.labels[index].to(device)
        return x0, labels

    return microbatch


DATASETS: dict[str, Callable[[str], Dataset]] = {"digits": digits}
