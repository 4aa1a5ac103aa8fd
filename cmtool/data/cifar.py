"""CIFAR-10's python archive: its batches are pickles, read without executing them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from cmtool.formats.safe_pickle import NUMPY_TABLE, Array, Dtype, Machine, Refused, expect


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
