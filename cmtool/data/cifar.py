"""CIFAR-10's python archive: its batches are pickles, read without executing them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmtool.data.entries import MAX_MEMBER, Entries, fingerprint, numbered
from cmtool.errors import InputError
from cmtool.formats.safe_pickle import NUMPY_TABLE, Array, Dtype, Machine, Refused, expect


def cifar_entries(path: Path) -> Entries:
    """Return the 50,000 training images of cifar-10-python.tar.gz, batch after batch."""
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
    return Entries(names, lambda i: pictures[i], classes, fingerprint(facts, classes))


def cifar_batch(content: bytes, size: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the rows (N, 3072) uint8 and classes of one file of CIFAR-10's python archive.

    Raises Refused for anything else in it, ValueError and its kin for a damaged file.
    """
    stream = io.BytesIO(content)
    table = expect(Machine(size, NUMPY_TABLE).run(stream, len(content)), dict)
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
