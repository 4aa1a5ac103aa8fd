"""Where training images come from: folders, archives and data sets as they are downloaded.

A source is opened by content and name, never extracted, and decodes images one at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.data.cifar import cifar_batch
from cmtool.data.images import SUFFIXES, fitted, image_mode, read_image, recoloured
from cmtool.data.labels import LABELS, check_table, find_labels, table_limit
from cmtool.errors import InputError, MissingError

MAX_MEMBER = 64 << 20
MAX_RATIO = 200
MAX_ARRAY = 2 << 30


class Names:
    """The names of a source's images, packed into one string.

    A list of a million strings is a hundred megabytes, and again in each process that reads it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        packed, ends = bytearray(), array("Q", [0])
        for name in names:
            packed += name.encode("utf-8", "surrogateescape")
            ends.append(len(packed))
        self.packed, self.ends = bytes(packed), ends

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        """Return a name by its place from 0."""
        return self.packed[self.ends[index] : self.ends[index + 1]].decode(
            "utf-8", "surrogateescape"
        )


class Entries(NamedTuple):
    """What a source holds: a name per image, how to read one, labels, and a hash of it all.

    `read` gives a file's content, or the image itself (C, H, W) uint8 where it is not encoded.
    """

    names: Names
    read: Callable[[int], bytes | Tensor]
    labels: list[int] | None
    fingerprint: str


@dataclass
class LazyImages:
    """Images (N, C, H, W) uint8 that are decoded when they are asked for, in any process.

    Without a `size` they have that of the first one asked for.
    """

    source: str
    entries: Entries
    channels: int
    size: tuple[int, int] | None
    fit: str

    def __post_init__(self) -> None:
        self.first: tuple[str, tuple[int, int]] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        if self.size is None and self.first is None:
            self.image(0)
        h, w = self.size or (self.first[1] if self.first else (0, 0))
        return len(self), self.channels, h, w

    def __len__(self) -> int:
        """Return the number of images; decodes none."""
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
                "bring them to one size: cmtool data prepare; in training --set data.fit=edm",
            )
        return image

    def settle(self) -> None:
        """Take the size of the first image that can be read, unless there is one."""
        for index in range(len(self)):
            if self.size or self.first:
                return
            with suppress(InputError):
                self.image(index)

    def decoded(self, index: int) -> Tensor:
        """Return one image as large as it is. Raises InputError naming it."""
        content = self.entries.read(index)
        if isinstance(content, Tensor):
            return recoloured(content, self.channels)
        return read_image(content, self.shown(index), mode="L" if self.channels == 1 else "RGB")

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


def open_images(path: Path) -> Entries | None:
    """Return the images of a folder, zip, npz, tarball or lmdb; None for anything else."""
    if path.is_dir():
        return lmdb_entries(path) if (path / "data.mdb").is_file() else folder_entries(path)
    if path.suffix == ".npz":
        return npz_entries(path)
    if zipfile.is_zipfile(path):
        return zip_entries(path)
    return cifar_entries(path) if tarfile.is_tarfile(path) else None


def is_image(name: str) -> bool:
    """Return whether a file is an image by its name; hidden ones are not, and macOS's own."""
    hidden = re.search(r"(^|/)(\.[^./]|__MACOSX/)", name)
    return name.lower().endswith(SUFFIXES) and hidden is None


def folder_entries(path: Path) -> Entries:
    """Return the images under a folder, sorted by path."""
    found = []
    for folder, _, files in os.walk(path):
        inside = os.path.relpath(folder, path)
        for file in files:
            name = file if inside == "." else f"{inside}/{file}".replace(os.sep, "/")
            if is_image(name):
                found.append(name)
    found.sort()
    if not found:
        raise InputError(f"no images in {path}", f"looked for {', '.join(SUFFIXES)}")

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path / name} cannot be read: {error.strerror}", "mend it, or take it away"
            ) from None

    def beside(name: str, limit: int) -> bytes | None:
        file = path / name
        if not file.is_file():
            return None
        check_table(file.stat().st_size, limit, str(file))
        return read(name)

    labels = find_labels(str(path), found, beside)
    sizes = (f"{name} {(path / name).lstat().st_size}" for name in found)
    names, digest = Names(found), _digest(sizes, labels)
    return Entries(names, lambda i: read(names[i]), labels, digest)


def listed_entries(paths: Sequence[str]) -> Entries:
    """Return the image files of a list, in its order, which are named by their paths."""
    names = Names(paths)

    def read(index: int) -> bytes:
        try:
            return Path(names[index]).read_bytes()
        except OSError as error:
            raise InputError(
                f"{names[index]} cannot be read: {error.strerror}", "check the path"
            ) from None

    return Entries(names, read, None, _digest(paths, None))


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
            images = [member for member in members if is_image(member.filename)]
            tables = {}
            for name in LABELS.keys() & archive.NameToInfo.keys():
                member = archive.NameToInfo[name]
                check_table(member.file_size, table_limit(len(images)), f"{name} in {path}")
                tables[name] = archive.read(name)
    except (zipfile.BadZipFile, OSError, ValueError, zlib.error, NotImplementedError) as error:
        raise InputError(f"{path} is damaged: {error}", "fetch it again") from None
    if len({member.filename for member in members}) < len(members):
        raise InputError(f"{path} holds a name twice", "make the archive again")
    members = sorted(images, key=lambda member: member.filename)
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
    listed = [member.filename for member in members]
    names = Names(listed)
    reader = ZipReader(path, members)

    def read(index: int) -> bytes:
        try:
            return reader(index)
        except (ValueError, OSError, struct.error, zlib.error) as error:
            raise InputError(
                f"{names[index]!r} in {path} is damaged: {error}", "replace it"
            ) from None

    labels = find_labels(str(path), listed, lambda name, _: tables.get(name))
    facts = (f"{name} {crc}" for name, crc in zip(listed, reader.crc, strict=True))
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
        names = Names(bytes(key).decode("utf-8", "surrogateescape") for key in keys)
    if not len(names):
        raise InputError(f"no images in {path}", "fetch the database again")

    def read(index: int) -> bytes:
        with environment().begin() as transaction:
            return bytes(transaction.get(names[index].encode("utf-8", "surrogateescape")))

    return Entries(names, read, None, _digest((names[i] for i in range(len(names))), None))


def npz_entries(path: Path) -> Entries:
    """Return arr_0 (N, H, W, C) uint8 and arr_1 (N,) of an npz, as ADM's tools write them.

    What is not compressed stays in the file. Raises InputError for anything else in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {m.filename: _checked_array(path, archive, m) for m in archive.infolist()}
            images = arrays["arr_0.npy"]()
            labels = arrays["arr_1.npy"]() if "arr_1.npy" in arrays else None
            facts = [f"{member.filename} {member.CRC}" for member in archive.infolist()]
    except InputError:
        raise
    except (
        KeyError, ValueError, OSError, EOFError, AttributeError, RuntimeError, struct.error,
        zlib.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(f"{path} holds no images: {error}", "arr_0 is N x H x W x C") from None
    is_set = images.dtype == np.uint8 and images.ndim == 4 and 0 not in images.shape
    if not is_set or images.shape[3] not in (1, 3):
        raise InputError(
            f"arr_0 of {path} is {images.dtype} {images.shape}", "it must be uint8, N x H x W x 3"
        )
    if labels is not None and (
        labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any()
    ):
        raise InputError(f"arr_1 of {path} is not a class per image", "it must be N whole numbers")
    classes = None if labels is None else labels.tolist()

    def read(index: int) -> Tensor:
        return torch.from_numpy(np.array(images[index].transpose(2, 0, 1), order="C"))

    return Entries(numbered(len(images)), read, classes, _digest(facts, classes))


def _checked_array(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Callable[[], Any]:
    """Return what reads an array of an npz; its header is read, and believed, only so far."""
    with archive.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = header(opened)
        skipped = opened.tell()
    claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    stored = member.compress_type == zipfile.ZIP_STORED
    packed = max(member.compress_size, 1)
    if claimed > member.file_size or (not stored and claimed > min(MAX_ARRAY, MAX_RATIO * packed)):
        raise InputError(
            f"{member.filename} in {path} claims {claimed:,} bytes",
            "it is damaged, or too large: make a zip with cmtool data prepare",
        )

    def read() -> Any:
        if not stored or dtype.hasobject:
            with archive.open(member) as opened:
                return np.lib.format.read_array(opened, allow_pickle=False)
        with path.open("rb") as file:
            file.seek(member.header_offset)
            _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            start = file.tell() + name_bytes + extra_bytes + skipped
        order: Any = "F" if fortran else "C"
        return np.memmap(path, dtype, "r", start, tuple(shape), order)

    return read


def numbered(count: int) -> Names:
    """Return the numbers 0 to count - 1 as names."""
    return Names(map(str, range(count)))


def cifar_entries(path: Path) -> Entries:
    """Return the 50,000 training images of cifar-10-python.tar.gz, batch after batch.

    Its batches are pickles; they are read without executing them.
    """
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.size > MAX_MEMBER:
                    raise ValueError(f"{member.name!r} has {member.size:,} bytes")
                name = member.name.rpartition("/")[2]
                if not member.isfile() or not name.startswith("data_batch_"):
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                rows, classes = cifar_batch(opened.read(MAX_MEMBER), member.size)
                images.append((name, rows))
                labels.append((name, classes))
    except (
        tarfile.TarError, OSError, EOFError, ValueError, LookupError, TypeError, zlib.error
    ) as error:  # fmt: skip
        raise InputError(f"{path} is not CIFAR-10's archive: {error}", "fetch it again") from None
    if not images:
        raise InputError(f"{path} holds no data_batch_1 ...", "give cifar-10-python.tar.gz")
    rows = np.concatenate([array for _, array in sorted(images, key=lambda pair: pair[0])])
    classes = [label for _, part in sorted(labels, key=lambda pair: pair[0]) for label in part]
    pictures = torch.from_numpy(rows.reshape(-1, 3, 32, 32))
    facts = [hashlib.sha256(rows.tobytes()).hexdigest()]
    names = numbered(len(classes))
    return Entries(names, lambda i: pictures[i], classes, _digest(facts, classes))


def _digest(facts: Iterable[str], labels: Sequence[int] | None) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()[:16]
