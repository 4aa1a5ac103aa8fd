"""Where images come from: folders, archives and data sets as they are downloaded.

A source is opened by its content and name. It is never extracted: images are decoded one at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.data.archives import npz_entries, zip_entries
from cmtool.data.cifar import cifar_entries, cifar_folder, is_packed
from cmtool.data.columns import table_entries
from cmtool.data.decoding import MAX_FILE, WHITE, image_mode, read_image
from cmtool.data.entries import (
    LOOKED_FOR,
    Entries,
    Labels,
    Names,
    fingerprint,
    is_hidden,
    is_image,
    left_out,
)
from cmtool.data.headers import BLOCK, is_tar
from cmtool.data.images import fitted, recoloured
from cmtool.data.labels import SPLITS, TRAIN, find_labels, max_table
from cmtool.data.lsun import lmdb_entries
from cmtool.data.shards import tar_entries
from cmtool.data.tables import Tables, is_table, is_table_name
from cmtool.errors import InputError
from cmtool.system.files import read_regular

AGAIN = "repair the file, or remove it"


class How(NamedTuple):
    """How a source is read: its classes by one of labels.RULES or a column, of tables which column.

    `split` chooses among the archives or tables of a folder.
    """

    labels: str = "auto"
    column: str = ""
    split: str = ""


def open_images(path: Path, how: How = How()) -> Entries | None:
    """Return the images of a folder, zip, npz, tar, table or lmdb; None for anything else.

    Raises InputError for a pipe or a device, which are not read, for damaged archives, and for
    classes that cannot be found as `how` says.
    """
    if path.is_dir():
        is_lmdb = (path / "data.mdb").is_file()
        return lmdb_entries(path, how.labels) if is_lmdb else folder_entries(path, how)
    if not path.is_file():
        raise InputError(f"{path} is not a regular file", "give a folder or a file of images")
    if how.split:
        what = f"{path} is one file, and has no split {how.split!r}"
        raise InputError(what, f"give the file: {path}")
    is_npz = path.suffix.lower() == ".npz"
    if zipfile.is_zipfile(path):
        return (npz_entries if is_npz else zip_entries)(path, how.labels)
    with path.open("rb") as opened:
        start = opened.read(BLOCK)
    if start.startswith(b"PK\x03\x04"):
        what = f"{path} is a zip archive that is cut short"
        raise InputError(what, "copy or download it again")
    if is_npz:
        return npz_entries(path, how.labels)
    if is_table(path):
        return table_entries([path], str(path), how.labels, how.column)
    if is_tar(start):
        entries = tar_entries([path], str(path), how.labels)
        return cifar_entries(path, how.labels) if entries is None else entries
    return cifar_entries(path, how.labels) if is_packed(path) else None


def has_columns(path: Path, labels: str) -> bool:
    """Tell whether classes may be found by a column of this name: in a table, or in a tar."""
    if path.is_file() and is_table(path):
        return labels in Tables([path], str(path)).class_columns()
    if path.is_dir():
        every = [name for name in _files(path) if not is_hidden(name)]
        tables = sorted(filter(is_table_name, every))
        if tables:
            return labels in Tables([path / tables[0]], str(path)).class_columns()
        return any(name.endswith(".tar") for name in every)
    return path.suffix == ".tar"


def folder_entries(path: Path, how: How = How()) -> Entries:
    """Return the images under a folder, and under those that links in it lead to, by path.

    Without images as files, they are those of the archives or tables in it.
    """
    every = sorted(_files(path))
    found = list(filter(is_image, every))
    if not found or how.split:
        return _packed_entries(path, every, how)

    def beside(name: str) -> bytes | None:
        file = path / name
        if not os.path.lexists(file):
            return None
        is_read = how.labels == "auto"
        return read_regular(file, max_table(len(found)), AGAIN) if is_read else b""

    labels = find_labels(str(path), found, beside, how.labels)
    facts = (f"{name} {(path / name).lstat().st_size}" for name in found)
    names = Names(found)

    def read(index: int) -> bytes:
        return read_regular(path / names[index], MAX_FILE, AGAIN)

    def sizes() -> Sequence[int]:
        return array("Q", (_size(path / names[index]) for index in range(len(names))))

    mark = fingerprint(facts, labels.classes)
    return Entries(names, read, labels, mark, left_out(every), sizes)


def _size(file: Path) -> int:
    """Return the bytes of a file, 0 for a link to nothing."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _files(path: Path) -> Iterator[str]:
    """Yield the paths of all files under a folder, relative to it."""
    above = {os.fspath(path): frozenset[str]()}
    for folder, folders, files in os.walk(path, followlinks=True):
        real, outer = os.path.realpath(folder), above.pop(folder)
        if real in outer:  # a link that leads back
            folders.clear()
            continue
        above |= {os.path.join(folder, name): outer | {real} for name in folders}
        inside = os.path.relpath(folder, path)
        for file in files:
            yield file if inside == "." else f"{inside}/{file}".replace(os.sep, "/")


def _packed_entries(path: Path, every: Sequence[str], how: How) -> Entries:
    """Return the images in the archives or tables of a folder, or of one split of them."""
    entries = cifar_folder(path, how.labels) if not how.split else None
    if entries is not None:
        return entries
    seen = [name for name in every if not is_hidden(name)]
    tables, tars = list(filter(is_table_name, seen)), [n for n in seen if n.endswith(".tar")]
    packed = [path / name for name in of_split(str(path), tables or tars, how.split)]
    if tables:
        entries = table_entries(packed, str(path), how.labels, how.column)
    elif tars:
        entries = tar_entries(packed, str(path), how.labels)
    if entries is None:
        raise InputError(f"no images in {path}", LOOKED_FOR)
    return entries


def of_split(source: str, files: Sequence[str], split: str) -> list[str]:
    """Return those of the files that are of a split, by their names: train-00000.parquet.

    Raises InputError for a split that there is not, and, without one, for files of several.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[/_.-]", file)
        found.setdefault(next((w for w in words if w.lower() in SPLITS), ""), []).append(file)
    if split and split not in found:
        good = ", ".join(f"{source}:{name}" for name in filter(None, sorted(found)))
        hint = f"give one of {good}" if good else f"leave it out: {source}"
        raise InputError(f"{source} has no split {split!r}", hint)
    train = next((name for name in found if name.lower() in TRAIN), None)
    if not split and train is not None and len(found) > 1:
        what = f"{source} holds {', '.join(filter(None, sorted(found)))}"
        raise InputError(what, f"give one of them: {source}:{train}")
    return found[split] if split else list(files)


def listed_entries(paths: Sequence[str]) -> Entries:
    """Return the image files of a list of paths, in the order of the list."""
    names = Names(paths)

    def read(index: int) -> bytes:
        return read_regular(names[index], MAX_FILE)

    return Entries(names, read, Labels(), fingerprint(paths, None))


@dataclass
class LazyImages:
    """Images (N, C, H, W) uint8 that are decoded when they are asked for, in any process.

    Without a `size` all have the size of the image that is asked for first.
    """

    source: str
    entries: Entries
    channels: int
    size: tuple[int, int] | None
    fit: str
    background: str = WHITE
    first: tuple[str, tuple[int, int]] | None = None
    """The name and the size of the image that was asked for first."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        if self.size is None and self.first is None:
            self.image(0)
        h, w = self.size or (self.first[1] if self.first else (0, 0))
        return len(self), self.channels, h, w

    def __len__(self) -> int:
        return len(self.entries.names)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images (n, C, H, W) of a one-dimensional index."""
        return torch.stack([self.image(i) for i in index.tolist()])

    def image(self, index: int) -> Tensor:
        """Return one image (C, H, W). Raises InputError naming it when it cannot be used."""
        image, shown = self.decoded(index), self.shown(index)
        if self.size is not None:
            return fitted(image, self.size, self.fit, shown)
        h, w = image.shape[1:]
        self.first = self.first or (shown, (h, w))
        name, (fh, fw) = self.first
        if (h, w) != (fh, fw):
            raise InputError(
                f"{shown} is {w}x{h} but {name} is {fw}x{fh}",
                f"bring them to one size: cmtool data prepare {shlex.quote(self.source or 'DATA')}"
                f" one.zip --size {min(fh, fw)} --fit box."
                " In training, add --set data.fit=box",
            )
        return image

    def settle(self) -> None:
        """Take the size of the first image that can be read, unless the size is known."""
        for index in range(len(self)):
            if self.size or self.first:
                return
            with suppress(InputError):
                self.image(index)

    def decoded(self, index: int) -> Tensor:
        """Return one image in its own size. Raises InputError naming it."""
        content = self.entries.read(index)
        if isinstance(content, Tensor):
            return recoloured(content, self.channels)
        mode = "L" if self.channels == 1 else "RGB"
        return read_image(content, self.shown(index), mode, self.background)

    def mode(self, index: int) -> str:
        """Return how an image stores its pixels. Raises InputError naming it."""
        content = self.entries.read(index)
        if isinstance(content, Tensor):
            return "L" if len(content) == 1 else "RGB"
        return image_mode(content, self.shown(index))

    def shown(self, index: int) -> str:
        """Return what people call an image."""
        name = self.entries.names[index]
        return f"{self.source}/{name}" if self.source else name
