"""Our weight file: safetensors, with one JSON object about the model in its header.

Such a file is a whole model. The object has the keys kind, weights, step, preset and cmtool.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmtool.errors import InputError

KEY = "cmtool"
MAX_HEADER = 4 << 20
MAX_NAMES = 200_000
"""Letters that the names of all classes may have."""
MAX_TENSORS = 20_000
AGAIN = "download or make the file again"


def write_weights(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write the tensors with `about` in the header, straight to `path` (the caller is atomic)."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={KEY: json.dumps(about, sort_keys=True)})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes files only their owner can read


def named_classes(names: Sequence[str]) -> dict[str, list[str]]:
    """Return what `about` says of the names of a model's classes: nothing if they are numbers.

    Nor does it where they would take the room of the header.
    """
    is_plain = list(names) == [str(number) for number in range(len(names))]
    if is_plain or sum(map(len, names)) > MAX_NAMES:
        return {}
    return {"class_names": list(names)}


def class_names_in(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of classes in `about`, or in a run's record; none if it has none."""
    names = about.get("class_names")
    is_listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if names is not None and is_listed else ()


def read_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, memory-mapped. Raises InputError."""
    first_bytes(path)
    try:
        return load_file(path, device=device)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", AGAIN) from None


def read_about(path: Path) -> dict[str, Any]:
    """Return what the header says of the model. Raises InputError for a file that is not ours."""
    try:
        about = json.loads(check_header(path)[KEY])
    except (LookupError, TypeError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        what = f"{path} does not say which model it holds"
        raise InputError(what, "give a file written by cmtool")
    return about


def check_header(path: Path) -> dict[str, Any]:
    """Return the metadata of a safetensors file. Raises InputError if a tensor comes twice.

    The library takes the last of two; it checks everything else when it opens the file.
    """
    first_bytes(path)
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = opened.read(min(size, MAX_HEADER))
        header = json.loads(content, object_pairs_hook=_unique)
        with safetensors.safe_open(path, "pt"):
            pass
    except (safetensors.SafetensorError, OSError, MemoryError, ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path} cannot be read: {reason or 'it is too large'}", AGAIN) from None
    if len(header) > MAX_TENSORS:
        raise InputError(f"{path} describes {len(header):,} tensors", AGAIN)
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header gives a name twice")
    return table


def read_table(path: Path, *, most: int = 1 << 20) -> dict[str, Any]:
    """Return the object in a JSON file of at most so many bytes.

    Raises ValueError for any other file. A larger file is not read, nor is a pipe or a device.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size > most:
        raise ValueError(f"{path.name} is too large")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def first_bytes(path: Path) -> bytes:
    """Return a file's first 64 bytes. Raises InputError for a page, an LFS pointer, or none."""
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check the path")
    try:
        with path.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise InputError(what, "check its permissions") from None
    if not start:
        raise InputError(f"{path} is empty", AGAIN)
    header, is_table = int.from_bytes(start[:8], "little"), start[8:9] == b"{"
    may_be_page = not is_table or header > MAX_HEADER  # 15,392 is written as a space and a <
    if may_be_page and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise InputError(f"{path} is an HTML page, not a checkpoint", "download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not a checkpoint", "run git lfs pull")
    if is_table and header > MAX_HEADER:
        raise InputError(f"{path} has a header of {header:,} bytes", "give a file of weights")
    return start
