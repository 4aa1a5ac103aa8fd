"""Classes of images: from a table beside them, or from the folders they are in."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cmtool.data.entries import Labels, is_image
from cmtool.errors import InputError

EDM_FOLDER = 5
"""EDM's archives spread images over folders named by five digits. These are not classes."""
MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"\s*([+-]?[0-9]{1,18})(?:\.0*)?\s*")
TRAIN = ("train", "training")
SPLITS = {*TRAIN, "val", "valid", "validation", "test", "testing"}
"""Folders train and val side by side are splits, not classes."""
Table = tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]
"""A label by the name of an image, the names of the classes if they have any, and notes."""


def max_table(images: int) -> int:
    """Return how many bytes a table of labels may have: 1 MiB, and 1 KiB an image."""
    return (1 << 20) + (1 << 10) * images


def find_labels(
    source: str, names: Sequence[str], read: Callable[[str], bytes | None], wanted: bool = True
) -> Labels:
    """Return a class per image from dataset.json, labels.csv or the sub-folders, or none.

    `read(name)` returns a file beside the images, or None. Names of Windows, with backslashes, are
    understood. Unless `wanted`, the content of a table does not matter. Raises InputError naming
    the first bad entry, and for a folder that holds train and other splits.
    """
    names = [_posix(name) for name in names]
    tables = [(name, content) for name in PARSERS if (content := read(name)) is not None]
    for name, content in tables[:1]:
        found = PARSERS[name](content, f"{name} in {source}") if wanted else None
        others = tuple(f"{other} in {source} is not read: {name} counts" for other, _ in tables[1:])
        if found is None:
            return Labels(notes=others)
        labels = _looked_up(found, names, f"{name} in {source}")
        return labels._replace(notes=labels.notes + others)
    folders = [name.rpartition("/")[0] for name in names]
    classes = {folder: place for place, folder in enumerate(sorted(set(folders)))}
    if all(c.isdigit() and len(c) == EDM_FOLDER for c in classes):
        return Labels(notes=_numbered(list(classes), names))
    if len(classes) < 2:
        return Labels(notes=_prefixes(names))
    _refuse_splits(source, classes)
    notes = _loose(folders) + _order(list(classes))
    return Labels([classes[folder] for folder in folders], tuple(classes), notes)


def _refuse_splits(source: str, folders: Iterable[str]) -> None:
    """Raise InputError for a folder that holds train and other splits, in any case of letters."""
    tops = {folder.partition("/")[0] for folder in folders}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    train = next((split for split in splits if split.lower() in TRAIN), None)
    if train is None or len(splits) < 2:
        return
    hint = f"give one of them: {source}/{train}"
    if not Path(source).is_dir():
        hint = f"extract it, and give its folder {train}"
    raise InputError(f"{source} holds {', '.join(splits)}", hint)


def _numbered(folders: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where folders of five digits hold other files than EDM's archives do."""
    if len(folders) < 2 or all(re.search(r"/img[0-9]{8}\.png$", name) for name in names):
        return ()
    what = f"folders of five digits, as {folders[0]}, are not read as classes"
    return (f"{what}, for EDM's archives have such; rename them, or write labels.csv",)


def _loose(folders: Sequence[str]) -> tuple[str, ...]:
    """Return a note where images lie beside the folders of the classes."""
    if (count := folders.count("")) == 0:
        return ()
    return (f"{count:,} of the images are in no folder: they are class 0, without a name",)


def _prefixes(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where files are named by class, as ADM's loader reads them: cat_01.png."""
    starts = Counter(name.rpartition("/")[2].partition("_")[0] for name in names if "_" in name)
    if starts.total() < len(names) or len(starts) < 2 or min(starts.values()) < 2:
        return ()
    shown = ", ".join(f"{start}_" for start in sorted(starts)[:5])
    what = f"names begin with {shown}{', ...' if len(starts) > 5 else ''}: they are not read as"
    return (f"{what} classes; put each class into a folder of its own, or write labels.csv",)


def _order(folders: list[str]) -> tuple[str, ...]:
    """Return a note where the classes of folders that are numbers are other numbers."""
    if not all(map(NUMBER.fullmatch, folders)):
        return ()
    for place, folder in enumerate(folders):
        match = NUMBER.fullmatch(folder)
        if match is not None and int(match[1]) != place:
            return (f"class {place} is the folder {folder!r}: folders are sorted as text",)
    return ()


def _json_labels(content: bytes, shown: str) -> Table | None:
    try:
        listed = json.loads(content)["labels"]
        pairs = None if listed is None else [(name, label) for name, label in listed]
    except (ValueError, TypeError, LookupError, RecursionError):
        what = f"{shown} is not {{'labels': [[name, class], ...]}}"
        raise InputError(what, "make it again, or remove it") from None
    return None if pairs is None else (_table(pairs, shown), (), ())


def _csv_labels(content: bytes, shown: str) -> Table:
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline=None)
        rows = [row for row in csv.reader(text) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        what = f"{shown} is not a table: {error}"
        raise InputError(what, "write name,class on each line, in UTF-8") from None
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{shown} has other than two columns", "write name,class on each line")
    if rows and not is_image(rows[0][0]) and not NUMBER.fullmatch(rows[0][1]):
        rows = rows[1:]  # the names in a header are neither
    matches = [(name, NUMBER.fullmatch(label)) for name, label in rows]
    numbers = [(name, int(match[1])) for name, match in matches if match]
    if len(numbers) == len(rows):
        return _table(numbers, shown), (), ()
    named = [(name, label.strip()) for name, label in rows]
    classes = {label: place for place, label in enumerate(sorted({label for _, label in named}))}
    table = _table([(name, classes[label] if label else None) for name, label in named], shown)
    for name, place in classes.items():
        if not any(map(str.isalpha, name)):
            note = f"{shown} has names, sorted as text: {name[:40]!r} is class {place}"
            return table, tuple(classes), (note,)
    return table, tuple(classes), ()


PARSERS: dict[str, Callable[[bytes, str], Table | None]] = {
    "dataset.json": _json_labels,
    "labels.csv": _csv_labels,
}


def _table(pairs: Iterable[tuple[Any, Any]], shown: str) -> dict[str, Any]:
    """Return the label of each name. Raises InputError for a name of two labels."""
    table: dict[str, Any] = {}
    for name, label in pairs:
        key = _posix(name)
        if key in table and table[key] != label:
            raise InputError(f"{shown} gives {key!r} two classes", "remove one of them")
        table[key] = label
    return table


def _posix(name: object) -> str:
    """Return the name of a file with slashes, without ./, and with each accent in its letter.

    Archives of Windows have backslashes, those of macOS accents of their own.
    """
    return unicodedata.normalize("NFC", str(name).replace("\\", "/").removeprefix("./"))


def _class(label: Any) -> int | None:
    """Return the class that a label means: a number, or a vector of one 1 among 0s; else None."""
    if isinstance(label, list) and len(label) > 1 and sorted(map(str, label)) in (
        ["0"] * (len(label) - 1) + ["1"], ["0.0"] * (len(label) - 1) + ["1.0"]
    ):  # fmt: skip
        return next(place for place, value in enumerate(label) if value)
    if type(label) is float and label.is_integer():
        label = int(label)
    return label if type(label) is int and 0 <= label < MAX_CLASSES else None


def _looked_up(found: Table, names: Sequence[str], shown: str) -> Labels:
    """Return the class of each name. Raises InputError for the first that has none."""
    (table, known, notes), labels = found, []
    for name in names:
        label = _class(table.get(name))
        if label is None:
            given = repr(table.get(name))[:40]
            what, hint = f"gives the class {given}", "correct that line"
            if table.get(name) is None:
                what, hint = "gives no class", "add it"
            hint = f"classes are whole numbers from 0 to {MAX_CLASSES - 1:,}: {hint}"
            if isinstance(table.get(name), list):
                hint = "a vector means a class if it has one 1 among 0s: write whole numbers"
            raise InputError(f"{shown} {what} for {name!r}", hint)
        labels.append(label)
    return Labels(labels, known, notes)
