"""Readers of weight files. The content of a file tells its format, not its name.

A foreign format is one file here and one entry in FORMATS.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmtool.errors import InputError, UserError
from cmtool.formats import diffusers_dir, edm_pkl, jcm_msgpack, native, openai_pt
from cmtool.formats.foreign import Foreign

MAX_BYTES = 16 << 30
DAMAGE = (
    ValueError, TypeError, AttributeError, LookupError, EOFError, ArithmeticError, MemoryError,
    RecursionError, RuntimeError, struct.error, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip
"""What a reader may raise for a damaged file; the user sees a message and no traceback."""


class Format(NamedTuple):
    """The title of a format, which of its files are read, and how it is recognised and read.

    `is_it(path, its first bytes; empty for a folder)`; `read(path, weights, known)`, where `known`
    is what the user says of the model.
    """

    title: str
    reads: str
    is_it: Callable[[Path, bytes], bool]
    read: Callable[[Path, str, Mapping[str, Any]], Foreign]


MSGPACK = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9-\xdb]", re.DOTALL)
"""A table whose first key is text: PNG and HDF5 begin with the byte of a table too."""
ZIP = b"PK\x03\x04"
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How a zip archive starts, and a pickle of each protocol from 2 to 5."""

FORMATS: dict[str, Format] = {
    "diffusers": Format(
        "diffusers pipeline",
        "ConsistencyModelPipeline folders, and UNet2DModel folders alone",
        lambda path, start: diffusers_dir.is_it(path),
        diffusers_dir.read,
    ),
    "openai": Format(
        "ADM state dict",
        "state dicts of the ADM U-Net, as in the consistency-model release",
        lambda path, start: start.startswith((ZIP, openai_pt.LEGACY)) or start[8:9] == b"{",
        openai_pt.read,
    ),
    "edm": Format(
        "EDM pickle",
        "snapshots of EDM, EDM2, ECT and TCM in pixels; no latents, and no training states",
        lambda path, start: start.startswith(PICKLES),
        edm_pkl.read,
    ),
    "jcm": Format(
        "JAX checkpoint",
        "CIFAR-10 checkpoints of the JAX release",
        lambda path, start: MSGPACK.match(start) is not None,
        jcm_msgpack.read,
    ),
}


def identify(path: Path) -> str:
    """Return "native" or the first key of FORMATS whose test holds. Raises InputError if none."""
    start = b"" if path.is_dir() else native.first_bytes(path)
    if start[8:9] == b"{" and native.KEY in native.check_header(path):
        return "native"
    for name, kind in FORMATS.items():
        if kind.is_it(path, start):
            return name
    hint = f"it reads its own format, and: {', '.join(kind.title for kind in FORMATS.values())}"
    raise InputError(f"{path} is not a model that cmtool knows", hint)


def read_foreign(name: str, path: Path, weights: str, known: Mapping[str, Any]) -> Foreign:
    """Return the model of a file of the format FORMATS[name]. Raises InputError."""
    kind = FORMATS[name]
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 30} GiB", "give a file of weights")
    try:
        return kind.read(path, weights, known)
    except UserError:
        raise
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        hint = f"download or convert it again; cmtool reads {kind.reads}"
        raise InputError(f"{path} is not a usable {kind.title}: {reason}", hint) from None
