"""Many images in one file: a zip, or ADM's npz. Nothing is extracted."""

from __future__ import annotations

import errno
import itertools
import json
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.data.entries import (
    LOOKED_FOR,
    MAX_MEMBER,
    TABLES,
    Entries,
    Labels,
    Names,
    fingerprint,
    is_image,
    left_out,
    numbered,
)
from cmtool.data.labels import MAX_CLASSES, find_labels, max_table, unnamed
from cmtool.errors import InputError
from cmtool.system.files import replacing
from cmtool.system.portable import flags, read_at

MAX_RATIO = 200
"""Bytes that one packed byte of an image may unpack to."""
MAX_ARRAY = 2 << 30
"""Bytes that a compressed array may unpack to."""
DAMAGE = (LookupError, ValueError, OSError, EOFError, struct.error, zlib.error)
"""What reading a damaged archive raises."""
ZIP_DAMAGE = (*DAMAGE, RuntimeError, zipfile.BadZipFile, lzma.LZMAError)
"""What reading a damaged zip raises, or one that is encrypted or packed in a rare way."""
NPZ_DAMAGE = (
    *ZIP_DAMAGE, SyntaxError, tokenize.TokenError, TypeError, AttributeError, ArithmeticError,
    MemoryError,
)  # fmt: skip
"""What reading a damaged npz raises: numpy parses headers as Python's literals."""
LOCAL_HEADER = struct.Struct("<4s22xHH")


class ZipReader:
    """Reads the images of a zip by number, in any process, from an index of a few bytes each.

    Python's own index takes half a kilobyte a file in each process.
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
            self.opened = (os.getpid(), os.open(self.path, flags("O_RDONLY", "O_BINARY")))
        file, start = self.opened[1], self.offset[index]
        header = read_at(file, LOCAL_HEADER.size, start)
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        start += LOCAL_HEADER.size + name_bytes + extra_bytes
        content = read_at(file, self.packed[index], start)
        if not self.stored[index]:
            most = self.size[index] + 1  # zlib takes 0 for no limit
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most)
        if signature != b"PK\x03\x04" or len(content) != self.size[index]:
            raise ValueError("its length is not the one in the list of files")
        if zlib.crc32(content) != self.crc[index]:
            raise ValueError("its checksum differs")
        return content


def zip_entries(path: Path, rule: str = "auto") -> Entries:
    """Return the images in a zip, and their classes by one of labels.RULES.

    Raises InputError for names that come twice, and for bombs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            every = archive.infolist()
            _check_inside(path, every)
            images = [member for member in every if is_image(member.filename)]
            members = sorted(images, key=lambda member: member.filename)
            tables = {}
            for name in TABLES & archive.NameToInfo.keys():
                size = archive.NameToInfo[name].file_size
                if size > max_table(len(images)):
                    hint = "a table of labels is smaller: remove or replace it"
                    raise InputError(f"{name} in {path} has {size:,} bytes", hint)
                tables[name] = archive.read(name) if rule == "auto" else b""
    except ZIP_DAMAGE as error:
        raise InputError(f"{path} is damaged: {error}", "fetch it again") from None
    if len({member.filename for member in every}) < len(every):
        raise InputError(f"{path} holds a name twice", "make the archive again")
    if not members:
        raise InputError(f"no images in {path}", LOOKED_FOR)
    for member in members:
        size, packed = member.file_size, max(member.compress_size, 1)
        if size > MAX_MEMBER or size / packed > MAX_RATIO:
            raise InputError(
                f"{member.filename!r} in {path} unpacks from {packed:,} to {size:,} bytes",
                "it cannot be an image: remove it from the archive",
            )
        is_plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not is_plain or member.flag_bits & 1:
            raise InputError(
                f"{member.filename!r} in {path} is encrypted, or packed in a rare way",
                "extract it, and give the folder",
            )
    listed = [member.filename for member in members]
    names = Names(listed)
    reader = ZipReader(path, members)

    def read(index: int) -> bytes:
        try:
            return reader(index)
        except (ValueError, OSError, struct.error, zlib.error) as error:
            what = f"{names[index]!r} in {path} is damaged: {error}"
            raise InputError(what, "replace it") from None

    labels = find_labels(str(path), listed, tables.get, rule)
    facts = (f"{name} {crc}" for name, crc in zip(listed, reader.crc, strict=True))
    others = left_out(member.filename for member in every if not member.is_dir())
    mark = fingerprint(facts, labels.classes)
    return Entries(names, read, labels, mark, others, lambda: reader.size)


def _check_inside(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Raise InputError unless the zip holds all bytes of all members."""
    size = path.stat().st_size
    for member in members:
        if member.header_offset < 0:
            raise InputError(f"{path} is damaged: its start is missing", "fetch it again")
        if member.header_offset + member.compress_size > size:
            what = f"{path} is damaged: {member.filename!r} ends beyond its {size:,} bytes"
            raise InputError(what, "fetch it again")


def npz_entries(path: Path, rule: str = "auto") -> Entries:
    """Return arr_0 (N, H, W, C) uint8 and arr_1 (N,) of an npz, as ADM's tools write them.

    What is not compressed stays in the file. Raises InputError for anything else in it. With the
    rule "none", arr_1 does not matter.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {m.filename: _checked_array(path, archive, m) for m in archive.infolist()}
            if "arr_0.npy" not in arrays:
                held = ", ".join(name.removesuffix(".npy")[:40] for name in list(arrays)[:6])
                hint = "write N x H x W x 3 of uint8 as arr_0: numpy.savez(FILE, images)"
                raise InputError(f"{path} has no arr_0, but {held or 'nothing'}", hint)
            images = arrays["arr_0.npy"]()
            has_classes = rule == "auto" and "arr_1.npy" in arrays
            labels = arrays["arr_1.npy"]() if has_classes else None
            facts = [f"{member.filename} {member.CRC}" for member in archive.infolist()]
    except InputError:
        raise
    except NPZ_DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} holds no images: {reason}", "arr_0 is N x H x W x C") from None
    is_set = images.dtype == np.uint8 and images.ndim == 4 and 0 not in images.shape
    if not is_set or images.shape[3] not in (1, 3):
        raise InputError(
            f"arr_0 of {path} is {images.dtype} {images.shape}", "it must be uint8, N x H x W x 3"
        )
    if labels is not None and (
        labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or ((labels < 0) | (labels >= MAX_CLASSES)).any()
    ):
        hint = f"it must be N whole numbers from 0 to {MAX_CLASSES - 1:,}"
        raise InputError(f"arr_1 of {path} is not a class per image", hint)
    classes = None if labels is None else labels.tolist()

    def read(index: int) -> Tensor:
        return torch.from_numpy(np.array(images[index].transpose(2, 0, 1), order="C"))

    found = unnamed(str(path), Labels(classes), rule)
    return Entries(numbered(len(images)), read, found, fingerprint(facts, classes))


def _checked_array(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Callable[[], Any]:
    """Return a function that reads an array of an npz. Its header is checked against its size."""
    with archive.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = header(opened)
        skipped = opened.tell()
    if dtype.hasobject:
        what = f"{member.filename} in {path} holds objects of Python, not numbers"
        raise InputError(what, "write N x H x W x 3 of uint8: numpy.savez(FILE, images)")
    claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    stored = member.compress_type == zipfile.ZIP_STORED
    packed = max(member.compress_size, 1)
    if claimed > member.file_size or (not stored and claimed > min(MAX_ARRAY, MAX_RATIO * packed)):
        raise InputError(
            f"{member.filename} in {path} claims {claimed:,} bytes",
            "fetch it again, or write it with numpy.savez, which does not compress",
        )

    def read() -> Any:
        if not stored:
            with archive.open(member) as opened:
                return np.lib.format.read_array(opened, allow_pickle=False)
        with path.open("rb") as file:
            file.seek(member.header_offset)
            _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            start = file.tell() + name_bytes + extra_bytes + skipped
        order: Any = "F" if fortran else "C"
        try:
            return np.memmap(path, dtype, "r", start, tuple(shape), order)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            what = f"{path} is on a file system that cannot map files into memory"
            raise InputError(what, "copy it to another disk") from None

    return read


def write_zip(path: Path, pictures: Iterable[tuple[str, bytes, int | None]]) -> int:
    """Write at least one (name, PNG, class) uncompressed, the classes as dataset.json.

    Return their number. The same pictures make the same bytes.
    """
    labels = []
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content, label in pictures:
            archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo has a fixed date
            labels.append((name, label))
        table = None if labels[0][1] is None else labels
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": table}))
    return len(labels)


def write_npz(path: Path, images: Iterable[Tensor], count: int, labels: Any) -> None:
    """Write `count` images (C, H, W) uint8 as arr_0 (N, H, W, C), and their classes as arr_1.

    Each image is written at once, so that memory does not grow with their number.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        rows = (image.numpy().transpose(1, 2, 0) for image in images)
        first = next(rows)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for row in itertools.chain([first], rows):
                member.write(row.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(labels, np.int64))
