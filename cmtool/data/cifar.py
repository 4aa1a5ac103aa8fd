"""CIFAR-10 as its archive has it, packed or extracted; read without unpickling."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cmtool.data import archives
from cmtool.data.archives import MAX_RATIO
from cmtool.data.entries import MAX_MEMBER, Entries, Labels, fingerprint, numbered
from cmtool.data.labels import unnamed
from cmtool.errors import InputError
from cmtool.formats.safe_pickle import (
    NUMPY_TABLE,
    Array,
    Dtype,
    Global,
    Machine,
    Refused,
    expect,
)
from cmtool.system.files import read_regular

MAX_UNPACKED = 256 << 20
"""Bytes that the tarball may unpack to; CIFAR-10 has 178 million."""
MAX_MEMBERS = 100
"""Files of a tarball that are looked at; CIFAR-10 has 8, and a folder."""
DAMAGE = (
    *archives.DAMAGE, TypeError, ArithmeticError, RuntimeError, tarfile.TarError, lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged tarball raises."""
UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""How to unpack a file, by how it starts."""
COMMANDS = {b"\x1f\x8b": "gunzip -c", b"BZh": "bunzip2 -c", b"\xfd7zXZ\x00": "unxz -c"}
"""Commands that do so."""
META = "batches.meta"
"""The file with the names of the classes."""


def _latin(machine: Machine, text: Any, encoding: Any) -> str:
    """Stand in for bytes that Python 3 writes for Python 2: the text that it makes them of."""
    if encoding != "latin1":
        raise Refused(f"it encodes text as {str(encoding)[:20]!r}")
    return str(expect(text, str))


CIFAR_TABLE = {**NUMPY_TABLE, Global("_codecs", "encode"): _latin}


class Limited:
    """A stream of which at most so many bytes can be read."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.stream, self.most, self.left = stream, most, most

    def read(self, count: int) -> bytes:
        """Return at most `count` bytes. Raises ValueError beyond the limit."""
        content = self.stream.read(count)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self.most:,} bytes")
        return content


def is_packed(path: Path) -> bool:
    """Tell whether a file begins as one that gzip, bzip2 or xz has packed."""
    with path.open("rb") as opened:
        return opened.read(8).startswith(tuple(UNPACKERS))


def cifar_entries(path: Path, rule: str = "auto") -> Entries:
    """Return the 50,000 training images of cifar-10-python.tar.gz, batch after batch.

    Raises InputError for any other tarball, and for one that unpacks to far more than it has.
    """
    try:
        entries = _entries(path, _members(path), rule)
    except DAMAGE as error:
        raise InputError(f"{path} is not CIFAR-10's archive: {error}", "fetch it again") from None
    if entries is None:
        hint = "give cifar-10-python.tar.gz, or a .tar of images"
        if is_packed(path):
            hint = f"if it is a tar of images, unpack it: {_unpacking(path)}"
        raise InputError(f"{path} holds no data_batch_1 ...", hint)
    return entries


def cifar_folder(path: Path, rule: str = "auto") -> Entries | None:
    """Return the images of an extracted cifar-10-batches-py/, as those of its archive.

    None if there are none. Raises InputError for a folder that is damaged.
    """
    hint = "extract the archive again"
    files = [file for file in sorted(path.iterdir()) if _is_wanted(file.name)][:MAX_MEMBERS]
    contents = ((file.name, read_regular(file, MAX_MEMBER, hint)) for file in files)
    try:
        return _entries(path, ((name, text, len(text)) for name, text in contents), rule)
    except DAMAGE as error:
        raise InputError(f"{path} is not CIFAR-10's folder: {error}", hint) from None


def _is_wanted(name: str) -> bool:
    return name.startswith("data_batch_") or name == META


def _entries(path: Path, files: Iterable[tuple[str, bytes, int]], rule: str) -> Entries | None:
    """Return the images in files, each given by name, content and size; None if there are none."""
    batches, names = [], tuple[str, ...]()
    for name, content, size in files:
        if name == META:
            names = _class_names(content, size)
        else:
            batches.append((name, *cifar_batch(content, size)))
    if not batches:
        return None
    batches.sort(key=lambda batch: batch[0])
    rows = np.concatenate([part for _, part, _ in batches])
    classes = [label for _, _, part in batches for label in part]
    pictures = torch.from_numpy(rows.reshape(-1, 3, 32, 32))
    labels = unnamed(str(path), Labels(classes, names), rule)
    mark = fingerprint([hashlib.sha256(rows.tobytes()).hexdigest()], labels.classes)
    return Entries(numbered(len(classes)), lambda i: pictures[i], labels, mark)


def _class_names(content: bytes, size: int) -> tuple[str, ...]:
    """Return the names of the classes, none if the file does not have them."""
    with suppress(*DAMAGE):
        table = expect(Machine(size, CIFAR_TABLE).run(io.BytesIO(content), len(content)), dict)
        names = [expect(name, str) for name in expect(table.get("label_names"), list)]
        return tuple(names) if len(names) == 10 else ()
    return ()


def _unpacking(path: Path) -> str:
    """Return the command that unpacks a file beside itself, whatever its name ends in."""
    with path.open("rb") as opened:
        start = opened.read(8)
    unpack = next(word for magic, word in COMMANDS.items() if start.startswith(magic))
    target = path.with_name(re.sub(r"(\.tar)?\.\w+$", "", path.name) + ".tar")
    return f"{unpack} {shlex.quote(str(path))} > {shlex.quote(str(target))}"


def _members(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Yield the name, content and size of each file of a tarball that is wanted."""
    with path.open("rb") as opened:
        start = opened.read(8)
    unpack = next((f for magic, f in UNPACKERS.items() if start.startswith(magic)), open)
    most = min(MAX_UNPACKED, MAX_RATIO * path.stat().st_size + (1 << 20))
    with (
        unpack(path, "rb") as stream,
        tarfile.open(fileobj=Limited(stream, most), mode="r|") as t,  # type: ignore[call-overload]
    ):
        for member in itertools.islice(t, MAX_MEMBERS):
            if member.size > MAX_MEMBER or member.issparse():
                raise ValueError(f"{member.name!r} has {member.size:,} bytes, or holes")
            name = member.name.rpartition("/")[2]
            if member.isfile() and _is_wanted(name):
                file = t.extractfile(member)
                assert file is not None
                yield name, file.read(MAX_MEMBER), member.size


def cifar_batch(content: bytes, size: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the rows (N, 3072) uint8 and classes of one file of CIFAR-10's python archive.

    Raises Refused for anything else in it, ValueError and its kin for a damaged file.
    """
    stream = io.BytesIO(content)
    table = expect(Machine(size, CIFAR_TABLE).run(stream, len(content)), dict)
    rows, classes = table.get("data"), table.get("labels")
    match rows.state if isinstance(rows, Array) else None:
        case (_, (int(count), 3072), Dtype("u1"), False | 0, str(text)):
            raw = text.encode("latin-1")
        case _:
            raise Refused("its data is no table of 3,072 bytes an image")
    if len(raw) != count * 3072 or len(expect(classes, list)) != count:
        raise Refused(f"{count} images have {len(raw):,} bytes and {len(classes)} classes")
    if any(type(c) is not int or not 0 <= c <= 9 for c in classes):
        raise Refused("a class is not 0 to 9")
    return np.frombuffer(raw, np.uint8).reshape(count, 3072), classes
