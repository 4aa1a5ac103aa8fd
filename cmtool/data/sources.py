"""Where images come from: folders, archives and data sets as they are downloaded.

A source is opened by its content and name. It is never extracted: images are decoded one at a time.
"""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmtool.data.archives import npz_entries, zip_entries
from cmtool.data.cifar import cifar_entries, is_tarball
from cmtool.data.decoding import MAX_FILE, WHITE, image_mode, read_image
from cmtool.data.entries import LOOKED_FOR, Entries, Labels, Names, fingerprint, is_image, left_out
from cmtool.data.images import fitted, recoloured
from cmtool.data.labels import find_labels, max_table
from cmtool.data.lsun import lmdb_entries
from cmtool.errors import InputError
from cmtool.system.files import read_regular

AGAIN = "repair the file, or remove it"


def open_images(path: Path, labelled: bool = True) -> Entries | None:
    """Return the images of a folder, zip, npz, tarball or lmdb; None for anything else.

    Unless `labelled`, what a table says of their classes does not matter. Raises InputError for a
    pipe or a device, which are not read, and for damaged archives.
    """
    if path.is_dir():
        is_lmdb = (path / "data.mdb").is_file()
        return lmdb_entries(path) if is_lmdb else folder_entries(path, labelled)
    if not path.is_file():
        raise InputError(f"{path} is not a regular file", "give a folder or a file of images")
    is_npz = path.suffix.lower() == ".npz"
    if zipfile.is_zipfile(path):
        return (npz_entries if is_npz else zip_entries)(path, labelled)
    with path.open("rb") as opened:
        if opened.read(4) == b"PK\x03\x04":
            what = f"{path} is a zip archive that is cut short"
            raise InputError(what, "copy or download it again")
    if is_npz:
        return npz_entries(path, labelled)
    return cifar_entries(path) if is_tarball(path) else None


def folder_entries(path: Path, labelled: bool = True) -> Entries:
    """Return the images under a folder, and under those that links in it lead to, by path."""
    every, above = [], {os.fspath(path): frozenset[str]()}
    for folder, folders, files in os.walk(path, followlinks=True):
        real, outer = os.path.realpath(folder), above.pop(folder)
        if real in outer:  # a link that leads back
            folders.clear()
            continue
        above |= {os.path.join(folder, name): outer | {real} for name in folders}
        inside = os.path.relpath(folder, path)
        for file in files:
            every.append(file if inside == "." else f"{inside}/{file}".replace(os.sep, "/"))
    found = sorted(filter(is_image, every))
    if not found:
        hint = LOOKED_FOR
        if (path / "data_batch_1").is_file():
            hint = "give cifar-10-python.tar.gz, the archive that this folder was in"
        raise InputError(f"no images in {path}", hint)

    def beside(name: str) -> bytes | None:
        file = path / name
        if not os.path.lexists(file):
            return None
        return read_regular(file, max_table(len(found)), AGAIN) if labelled else b""

    labels = find_labels(str(path), found, beside, labelled)
    sizes = (f"{name} {(path / name).lstat().st_size}" for name in found)
    names = Names(found)

    def read(index: int) -> bytes:
        return read_regular(path / names[index], MAX_FILE, AGAIN)

    return Entries(names, read, labels, fingerprint(sizes, labels.classes), left_out(every))


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
