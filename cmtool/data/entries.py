"""What a source of images holds: the names of its images, how to read one, and their classes.

Classes come from a table beside the images, or from the folders they are in.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cmtool.data.decoding import SUFFIXES
from cmtool.errors import InputError

MAX_MEMBER = 64 << 20
"""Bytes that one image in an archive may have."""
EDM_FOLDER = 5
"""EDM's archives spread images over folders named by five digits. These are not classes."""
MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"-?[0-9]{1,18}")
SPLITS = {"train", "val", "valid", "validation", "test"}
"""Folders train and val side by side are splits, not classes."""


class Names:
    """The names of a source's images, packed into one string.

    A list of a million strings takes a hundred megabytes, in each process that reads it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        packed, ends = bytearray(), array("Q", [0])
        for name in names:
            packed += name.encode("utf-8", "surrogateescape")
            ends.append(len(packed))
        self.packed, self.ends = bytes(packed), ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        name = self.packed[self.ends[index] : self.ends[index + 1]]
        return name.decode("utf-8", "surrogateescape")


class Entries(NamedTuple):
    """What a source holds: a name per image, how to read one, labels, and a hash of it all.

    `read` gives a file's content, or the image itself (C, H, W) uint8 where it is not encoded.
    """

    names: Names
    read: Callable[[int], bytes | Tensor]
    labels: list[int] | None
    fingerprint: str


def numbered(count: int) -> Names:
    """Return the numbers 0 to count - 1 as names."""
    return Names(map(str, range(count)))


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image, and neither hidden nor macOS's own."""
    hidden = re.search(r"(^|/)(\.[^./]|__MACOSX/)", name)
    return name.lower().endswith(SUFFIXES) and hidden is None


def fingerprint(facts: Iterable[str], labels: Sequence[int] | None) -> str:
    """Return a hash of facts about a source and of its labels, to recognise it."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()[:16]


def max_table(images: int) -> int:
    """Return how many bytes a table of labels may have: 1 MiB, and 1 KiB an image."""
    return (1 << 20) + (1 << 10) * images


def find_labels(
    source: str, names: Sequence[str], read: Callable[[str], bytes | None]
) -> list[int] | None:
    """Return a class per image from dataset.json, labels.csv or the sub-folders; or None.

    `read(name)` returns a file beside the images, or None. Names of Windows, with backslashes, are
    understood. Raises InputError naming the first bad entry, and for a folder that holds train and
    other splits.
    """
    names = [name.replace("\\", "/") for name in names]
    for name, parse in LABELS.items():
        content = read(name)
        if content is not None:
            table = parse(content, f"{name} in {source}")
            return None if table is None else _looked_up(table, names, f"{name} in {source}")
    folders = [name.rpartition("/")[0] for name in names]
    classes = {folder: place for place, folder in enumerate(sorted(set(folders)))}
    if len(classes) < 2 or all(c.isdigit() and len(c) == EDM_FOLDER for c in classes):
        return None
    splits = sorted(SPLITS.intersection(folder.partition("/")[0] for folder in classes))
    if "train" in splits and len(splits) > 1:
        hint = f"give one of them: {source}/train"
        if not Path(source).is_dir():
            hint = "extract it, and give its folder train"
        raise InputError(f"{source} holds {', '.join(splits)}", hint)
    return [classes[folder] for folder in folders]


def _json_labels(content: bytes, shown: str) -> dict[str, Any] | None:
    try:
        listed = json.loads(content).get("labels")
        return None if listed is None else {_posix(name): label for name, label in listed}
    except (ValueError, TypeError, AttributeError, RecursionError):
        what = f"{shown} is not {{'labels': [[name, class], ...]}}"
        raise InputError(what, "make it again, or remove it") from None


def _csv_labels(content: bytes, shown: str) -> dict[str, Any]:
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        what = f"{shown} is not a table: {error}"
        raise InputError(what, "write name,class on each line") from None
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{shown} has other than two columns", "write name,class on each line")
    header = rows[0][1] if rows else ""
    if not NUMBER.fullmatch(header) and sum(label == header for _, label in rows) == 1:
        rows = rows[1:]  # the name in a header is not a class
    if all(NUMBER.fullmatch(label) for _, label in rows):
        return {_posix(name): int(label) for name, label in rows}
    classes = {label: place for place, label in enumerate(sorted({label for _, label in rows}))}
    return {_posix(name): classes[label] for name, label in rows}


LABELS: dict[str, Callable[[bytes, str], dict[str, Any] | None]] = {
    "dataset.json": _json_labels,
    "labels.csv": _csv_labels,
}


def _posix(name: object) -> str:
    """Return the name of a file with slashes, as archives of Windows too should have it."""
    return str(name).replace("\\", "/")


def _class(label: Any) -> int | None:
    """Return the class that a label means: a number, or a vector of one 1 among 0s; else None."""
    if isinstance(label, list) and len(label) > 1 and sorted(map(str, label)) in (
        ["0"] * (len(label) - 1) + ["1"], ["0.0"] * (len(label) - 1) + ["1.0"]
    ):  # fmt: skip
        return next(place for place, value in enumerate(label) if value)
    if type(label) is float and label.is_integer():
        label = int(label)
    return label if type(label) is int and 0 <= label < MAX_CLASSES else None


def _looked_up(table: dict[str, Any], names: Sequence[str], shown: str) -> list[int]:
    labels = []
    for name in names:
        label = _class(table.get(name))
        if label is None:
            given = repr(table.get(name))[:40]
            what = "gives no class" if name not in table else f"gives the class {given}"
            hint = f"classes are whole numbers from 0 to {MAX_CLASSES - 1:,}: correct that line"
            raise InputError(f"{shown} {what} for {name!r}", hint)
        labels.append(label)
    return labels
