"""Data sets: uint8 images (N, C, H, W) with class labels, by name or path."""

from __future__ import annotations

import colorsys
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cmtool.data import emoji as bundled_emoji
from cmtool.data.decoding import WHITE, check_background
from cmtool.data.entries import Labels
from cmtool.data.labels import RULES, no_column, unnamed
from cmtool.data.sources import How, LazyImages, has_columns, listed_entries, open_images
from cmtool.errors import InputError, nearest
from cmtool.system.files import expanded

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"
SPLITS = ("train", "held-out")
COLOURINGS = 8
HELD_OUT_EVERY = 5
MAX_IN_MEMORY = 256 << 20
"""Bytes of decoded images that are kept in memory, or on a GPU. Larger sets are streamed."""
MAX_CHECKED = 50_000
"""A streamed set of at most so many images is decoded once before the first step."""


class Images(Protocol):
    """Images (N, C, H, W) uint8: a tensor, or an object that decodes them on request."""

    @property
    def shape(self) -> Sequence[int]:
        """N, C, H, W."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...  # of one dimension -> (n, C, H, W)


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) uint8 with labels (N,) int64 or None.

    `class_names` are those of the classes, if they have any; `notes` is what to tell the user.
    `older_hash` is the fingerprint that cmtool 0.1 gave to streamed images, if it had another.
    """

    name: str
    images: Images
    labels: Tensor | None
    num_classes: int
    known_hash: str = ""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    older_hash: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def is_checked_first(self) -> bool:
        """Whether the images are streamed, and few enough to decode all before training."""
        return not isinstance(self.images, Tensor) and len(self) <= MAX_CHECKED

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield self.images[torch.arange(first, min(first + size, len(self)))]

    def fingerprint(self) -> str:
        """Return a hash of images and labels, which identifies the data; it is computed once."""
        return self.known_hash or self._hash

    @cached_property
    def _hash(self) -> str:
        if isinstance(self.images, LazyImages):
            return self.images.entries.contents()
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
    held_out_only = _is_held_out("digits", split)
    with np.load(DIGITS) as stored:
        ink_amount, labels = stored["images"], stored["labels"]
    index = np.arange(len(labels))
    rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])  # in class
    held_out = rank % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = index[held_out if held_out_only else ~held_out]
    parts = []
    for colouring in range(COLOURINGS):
        colours = np.array([_colours(int(i) + colouring * len(labels)) for i in chosen])
        paper, ink = colours[:, 0, :, None, None], colours[:, 1, :, None, None]  # (n, 3, 1, 1)
        amount = ink_amount[chosen, None] / 16.0  # (n, 1, 8, 8)
        parts.append((255 * (paper + (ink - paper) * amount)).round().astype(np.uint8))
    images = torch.from_numpy(np.concatenate(parts))
    repeated = torch.from_numpy(np.tile(labels[chosen], COLOURINGS).astype(np.int64))
    names = tuple(map(str, range(10)))
    return Dataset(f"digits:{split}", images, repeated, num_classes=10, class_names=names)


def emoji(split: str = "train") -> Dataset:
    """Return the bundled emoji as 32x32 RGB pictures on white, `split` train or held-out.

    3,781 emoji as drawn for Noto Emoji (Google, Apache-2.0), then as drawn for Twemoji (Twitter and
    other contributors, CC BY 4.0); classes are their nine categories. Every eighth base emoji of a
    category is held out, with all its skin tones.
    """
    images, labels, names = bundled_emoji.read(_is_held_out("emoji", split))
    name = f"emoji:{split}"
    pictures = torch.from_numpy(images)
    return Dataset(name, pictures, torch.from_numpy(labels), len(names), class_names=names)


def _is_held_out(name: str, split: str) -> bool:
    """Return whether a split is the one held out. Raises InputError if it is no split."""
    if split not in SPLITS:
        raise InputError(f"no split {split!r} of the {name}", nearest(split, SPLITS))
    return split == "held-out"


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
    background: str = WHITE,
    in_memory: bool = True,
    labels: str = "auto",
    column: str = "",
) -> Dataset:
    """Return a data set by name (`digits`, `digits:held-out`) or by path.

    A path is a folder or zip of images, an npz, tar shards, a parquet table, a folder of Hugging
    Face datasets, CIFAR-10's archive or an LSUN database; `:train` after a folder chooses a split.
    Images are brought to `size` (H, W) by the rule `fit`, with alpha laid on the `background`. Up
    to 256 MiB are decoded at once. More are decoded on request, and so are all without `in_memory`.
    Classes are found by `labels`, one of labels.RULES or a column; `column` names the images of a
    table of several. Raises InputError naming the file that cannot be used, UserError for a colour
    that is none.
    """
    known, _, split = name.partition(":")
    if known in DATASETS:
        unnamed(name, Labels(), labels)  # checks the rule
        data = DATASETS[known](split or "train")
        is_plain = labels == "none"
        return replace(data, labels=None, num_classes=0, class_names=()) if is_plain else data
    check_background(background)
    path, split = place_of(name)
    entries = open_images(path, How(labels, column, split))
    if entries is None:
        hint = "give a folder or zip of images, an npz, a tar or a parquet table"
        raise InputError(f"{name} is not a data set", hint)
    lazy = LazyImages(name, entries, channels, size, fit, background)
    classes, class_names, notes = entries.labels
    targets = None if classes is None else torch.tensor(classes)
    count = 0 if targets is None else max(int(targets.max()) + 1, len(class_names))
    notes += () if entries.left_out is None else (f"{name}: {entries.left_out}",)
    if not in_memory or math.prod(lazy.shape) > MAX_IN_MEMORY:
        known, older = entries.fingerprint, ""
        if entries.sizes is not None:
            known, older = "", entries.fingerprint
        return Dataset(name, lazy, targets, count, known, class_names, notes, older)
    everything = torch.empty(lazy.shape, dtype=torch.uint8)
    for index, image in enumerate(everything):
        image.copy_(lazy.image(index))
    return Dataset(name, everything, targets, count, "", class_names, notes)


def check_rule(name: str, labels: str) -> None:
    """Raise InputError for a rule of labels.RULES that is none, nor can be the name of a column.

    Only tables have columns, and tar archives files that may have them.
    """
    if labels in RULES:
        return
    with suppress(InputError):
        if has_columns(place_of(name)[0], labels):
            return
    raise no_column(name or "a preset without data", labels)


def place_of(name: str) -> tuple[Path, str]:
    """Return the path that a name stands for, and the split of its files: "" for all.

    Raises InputError where there is nothing.
    """
    path = expanded(name)
    if name and path.exists():
        return path, ""
    start, _, split = name.rpartition(":")
    folder = expanded(start)
    if start and folder.is_dir():
        return (folder / split, "") if (folder / split).is_dir() else (folder, split)
    hint = f"{nearest(name, DATASETS)}, or give the path of a folder, zip, npz, tar or parquet"
    if re.search(r"^pipe:|[*?{]", name):
        what = "wildcards and pipe: commands are not supported"
        hint = f"{what}: give the folder that holds the archives"
    raise InputError(f"no data set or folder {name!r}", hint)


def examples(data: Dataset, count: int) -> Tensor:
    """Return `count` images (count, C, H, W) of a set: of its classes in turn, else evenly spread.

    A class without images has white ones.
    """
    spread = torch.arange(count) * len(data) // count
    if data.labels is None:
        return data.images[spread]
    pictures = torch.full((count, *data.images.shape[1:]), 255, dtype=torch.uint8)
    for label in range(min(data.num_classes, count)):
        places = torch.arange(label, count, data.num_classes)
        members = (data.labels == label).nonzero().flatten()
        if len(members):
            pictures[places] = data.images[members[torch.arange(len(places)) % len(members)]]
    return pictures


def listed_images(paths: Sequence[str]) -> Dataset:
    """Return the image files of a list as a data set, RGB, decoded on request."""
    images = LazyImages("", listed_entries(paths), 3, None, "exact")
    name = paths[0] if len(paths) == 1 else f"{len(paths)} files"
    return Dataset(name, images, None, 0, images.entries.fingerprint)


DATASETS: dict[str, Callable[[str], Dataset]] = {"digits": digits, "emoji": emoji}
