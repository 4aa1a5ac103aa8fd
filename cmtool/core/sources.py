"""Where training images come from: folders, archives and data sets as they are downloaded.

A source is opened by content and name, never extracted, and decodes images one at a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.core.formats.cifar import cifar_batch
from cmtool.core.images import SUFFIXES, fitted, read_image
from cmtool.errors import InputError, MissingError

MAX_MEMBER = 64 << 20
MAX_RATIO = 200
MAX_ARRAY = 2 << 30
EDM_FOLDER = 5
"""EDM's archives spread images over folders of five digits, which are no classes."""


class Entries(NamedTuple):
    """What a source holds: a name per image, how to read one, labels, and a hash of it all."""

    names: list[str]
    read: Callable[[int], bytes]
    labels: list[int] | None
    fingerprint: str


@dataclass
class LazyImages:
    """Images (N, C, H, W) uint8 that are decoded when they are asked for, in any process."""

    source: str
    entries: Entries
    channels: int
    size: tuple[int, int] | None
    fit: str
    _first: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W; without a given size that of the first image."""
        if self.size is None and self._first is None:
            self._first = (0, 0)
            h, w = self.image(0).shape[1:]
            self._first = (h, w)
        h, w = self.size or self._first or (0, 0)
        return len(self.entries.names), self.channels, h, w

    def __len__(self) -> int:
        """Return the number of images; decodes none."""
        return len(self.entries.names)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images (n, C, H, W) of a one-dimensional index."""
        return torch.stack([self.image(i) for i in index.tolist()])

    def image(self, index: int) -> Tensor:
        """Return one image (C, H, W). Raises InputError naming it when it cannot be used."""
        name = self.entries.names[index]
        shown = f"{self.source}/{name}"
        image = read_image(
            self.entries.read(index), shown, mode="L" if self.channels == 1 else "RGB"
        )
        if self.size is not None:
            return fitted(image, self.size, self.fit, shown)
        if self._first not in (None, (0, 0)) and tuple(image.shape[1:]) != self._first:
            h, w = image.shape[1:]
            fh, fw = self._first or (0, 0)
            raise InputError(
                f"{shown} is {w}x{h} but {self.entries.names[0]} is {fw}x{fh}",
                "bring them to one size: cmtool data prepare, or --set data.fit=edm",
            )
        return image


def open_images(path: Path) -> Entries | None:
    """Return the encoded images of a folder, zip or lmdb; None for another kind of source."""
    if path.is_dir():
        return lmdb_entries(path) if (path / "data.mdb").is_file() else folder_entries(path)
    return zip_entries(path) if zipfile.is_zipfile(path) and path.suffix != ".npz" else None


def open_array(path: Path) -> tuple[Tensor, Tensor | None] | None:
    """Return the decoded images and labels of an npz or a CIFAR-10 tarball, else None."""
    if path.suffix == ".npz":
        return npz_images(path)
    return cifar_images(path) if path.is_file() and tarfile.is_tarfile(path) else None


def folder_entries(path: Path) -> Entries:
    """Return the images under a folder, sorted by path."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    names = [file.relative_to(path).as_posix() for file in files]
    if not names:
        raise InputError(f"no images in {path}", f"looked for {', '.join(SUFFIXES)}")

    def beside(name: str) -> bytes | None:
        return (path / name).read_bytes() if (path / name).is_file() else None

    labels = find_labels(str(path), names, beside)
    sizes = (f"{name} {file.stat().st_size}" for name, file in zip(names, files, strict=True))
    return Entries(names, lambda i: (path / names[i]).read_bytes(), labels, _digest(sizes, labels))


class ZipReader:
    """Reads the images of a zip by number, in any process, from an index of a few bytes each.

    Python's own index takes half a kilobyte a file, again in each process.
    """

    def __init__(self, path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
        self.path = path
        self.offset = array("Q", (m.header_offset for m in members))
        self.packed = array("Q", (m.compress_size for m in members))
        self.size = array("Q", (m.file_size for m in members))
        self.crc = array("L", (m.CRC for m in members))
        self.stored = bytes(m.compress_type == zipfile.ZIP_STORED for m in members)
        self.opened: tuple[int, int] | None = None

    def __call__(self, index: int) -> bytes:
        """Return the content of a member. Raises ValueError for a damaged one."""
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = (os.getpid(), os.open(self.path, os.O_RDONLY))
        file, start = self.opened[1], self.offset[index]
        header = os.pread(file, LOCAL_HEADER.size, start)
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        start += LOCAL_HEADER.size + name_bytes + extra_bytes
        content = os.pread(file, self.packed[index], start)
        if not self.stored[index]:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size[index])
        if signature != b"PK\x03\x04" or len(content) != self.size[index]:
            raise ValueError("it is cut short")
        if zlib.crc32(content) != self.crc[index]:
            raise ValueError("its checksum differs")
        return content


LOCAL_HEADER = struct.Struct("<4s22xHH")


def zip_entries(path: Path) -> Entries:
    """Return the images in a zip. Raises InputError for names that come twice, and for bombs."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            labels_files = {n: archive.read(n) for n in LABELS if n in archive.NameToInfo}
    except (zipfile.BadZipFile, OSError, ValueError, zlib.error, NotImplementedError) as error:
        raise InputError(f"{path} is damaged: {error}", "fetch it again") from None
    if len({member.filename for member in members}) < len(members):
        raise InputError(f"{path} holds a name twice", "make the archive again")
    members = [m for m in members if m.filename.lower().endswith(SUFFIXES)]
    members.sort(key=lambda member: member.filename)
    if not members:
        raise InputError(f"no images in {path}", f"looked for {', '.join(SUFFIXES)}")
    for member in members:
        size, packed = member.file_size, max(member.compress_size, 1)
        if size > MAX_MEMBER or size / packed > MAX_RATIO:
            raise InputError(
                f"{member.filename!r} in {path} unpacks from {packed:,} to {size:,} bytes",
                "no image is like that: leave it out",
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or (
            member.flag_bits & 1
        ):
            raise InputError(
                f"{member.filename!r} in {path} is encrypted, or packed in a rare way",
                "make the archive again with cmtool data prepare",
            )
    names = [member.filename for member in members]
    reader = ZipReader(path, members)

    def read(index: int) -> bytes:
        try:
            return reader(index)
        except (ValueError, OSError, struct.error, zlib.error) as error:
            raise InputError(
                f"{names[index]!r} in {path} is damaged: {error}", "replace it"
            ) from None

    labels = find_labels(str(path), names, labels_files.get)
    facts = (f"{name} {crc}" for name, crc in zip(names, reader.crc, strict=True))
    return Entries(names, read, labels, _digest(facts, labels))


def lmdb_entries(path: Path) -> Entries:
    """Return the images of an LSUN database folder. Raises MissingError without the lmdb extra."""
    try:
        import lmdb
    except ImportError:
        raise MissingError(
            f"{path} is an lmdb, which needs another package", "pip install 'cmtool[lmdb]'"
        ) from None
    opened: dict[int, Any] = {}

    def environment() -> Any:
        if os.getpid() not in opened:  # an environment does not survive a fork
            opened[os.getpid()] = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        return opened[os.getpid()]

    with environment().begin() as transaction:
        keys = transaction.cursor().iternext(keys=True, values=False)
        names = [bytes(key).hex() for key in keys]

    def read(index: int) -> bytes:
        with environment().begin() as transaction:
            return bytes(transaction.get(bytes.fromhex(names[index])))

    return Entries(names, read, None, _digest(names, None))


def find_labels(
    source: str, names: Sequence[str], read: Callable[[str], bytes | None]
) -> list[int] | None:
    """Return a class per image: of dataset.json, of labels.csv, else of sub-folders; or None.

    `read` gives a file beside the images, or None. Raises InputError naming the first bad entry.
    """
    for name, parse in LABELS.items():
        content = read(name)
        if content is not None:
            table = parse(content, f"{name} in {source}")
            return None if table is None else _looked_up(table, names, f"{name} in {source}")
    folders = [name.rpartition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2 or all(c.isdigit() and len(c) == EDM_FOLDER for c in classes):
        return None
    return [classes.index(folder) for folder in folders]


def _json_labels(content: bytes, shown: str) -> dict[str, Any] | None:
    try:
        listed = json.loads(content).get("labels")
        return None if listed is None else {str(name): label for name, label in listed}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{shown} is not {{'labels': [[name, class], ...]}}", "make it again, or remove it"
        ) from None


def _csv_labels(content: bytes, shown: str) -> dict[str, Any]:
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{shown} is not a table: {error}", "write name,class a line") from None
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{shown} has other than two columns", "write name,class a line")
    classes = sorted({label for _, label in rows if not label.lstrip("-").isdigit()})
    if classes:  # classes by name; a header's own name would be one more
        if rows[0][1] in classes and sum(row[1] == rows[0][1] for row in rows) == 1:
            rows, classes = rows[1:], sorted({label for _, label in rows[1:]})
        if any(not label.lstrip("-").isdigit() for label in classes):
            return {name: classes.index(label) for name, label in rows}
    return {name: int(label) for name, label in rows}


LABELS: dict[str, Callable[[bytes, str], dict[str, Any] | None]] = {
    "dataset.json": _json_labels,
    "labels.csv": _csv_labels,
}


def _looked_up(table: dict[str, Any], names: Sequence[str], shown: str) -> list[int]:
    labels = []
    for name in names:
        label = table.get(name)
        if type(label) is not int or label < 0:
            what = "gives no class" if name not in table else f"gives the class {label!r}"
            raise InputError(f"{shown} {what} for {name!r}", "classes count from 0; mend that line")
        labels.append(label)
    return labels


def npz_images(path: Path) -> tuple[Tensor, Tensor | None]:
    """Return arr_0 (N, H, W, C) uint8 and arr_1 (N,) of an npz, as ADM's tools write them."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as opened:
                    version = np.lib.format.read_magic(opened)
                    header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                    shape, _, dtype = header(opened)
                    claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
                    if claimed > min(member.file_size, MAX_ARRAY):
                        raise InputError(
                            f"{member.filename} in {path} claims {claimed:,} bytes",
                            "it is damaged, or too large: make a zip with cmtool data prepare",
                        )
        with np.load(path, allow_pickle=False) as stored:
            images = stored["arr_0"]
            labels = stored.get("arr_1")
    except InputError:
        raise
    except (KeyError, ValueError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no images: {error}", "arr_0 is N x H x W x C") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            f"arr_0 of {path} is {images.dtype} {images.shape}", "it must be uint8, N x H x W x 3"
        )
    found = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if labels is None:
        return found, None
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise InputError(f"arr_1 of {path} is not a class per image", "it must be N whole numbers")
    return found, torch.from_numpy(labels.astype(np.int64))


def cifar_images(path: Path) -> tuple[Tensor, Tensor]:
    """Return the 50,000 training images of cifar-10-python.tar.gz, batch after batch.

    Its batches are pickles; they are read without executing them.
    """
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if not member.isfile() or not name.startswith("data_batch_"):
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                rows, classes = cifar_batch(opened.read(MAX_MEMBER), member.size)
                images.append((name, rows))
                labels.append((name, classes))
    except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not CIFAR-10's archive: {error}", "fetch it again") from None
    if not images:
        raise InputError(f"{path} holds no data_batch_1 ...", "give cifar-10-python.tar.gz")
    rows = np.concatenate([array for _, array in sorted(images, key=lambda pair: pair[0])])
    classes = [label for _, part in sorted(labels, key=lambda pair: pair[0]) for label in part]
    return torch.from_numpy(rows.reshape(-1, 3, 32, 32).copy()), torch.tensor(classes)


def _digest(facts: Iterable[str], labels: Sequence[int] | None) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()[:16]
