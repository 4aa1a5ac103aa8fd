"""Classes of images: from a table beside them, their folders, or how their names begin."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cmtool.data.entries import Labels, Names, is_image
from cmtool.errors import InputError, nearest

EDM_FOLDER = 5
"""EDM's archives spread images over folders named by five digits. These are not classes."""
MAX_CLASSES = 1_000_000
LABEL_KEYS = ("label", "labels", "cls", "class")
"""Columns of tables, and keys of the .json beside an image, that hold classes."""
NUMBER = re.compile(r"\s*([+-]?[0-9]{1,18})(?:\.0*)?\s*")
TRAIN = ("train", "training")
SPLITS = {*TRAIN, "val", "valid", "validation", "test", "testing"}
"""Folders train and val side by side are splits, not classes."""
Table = tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]
"""A label by the name of an image, the names of the classes if they have any, and notes."""


def max_table(images: int) -> int:
    """Return how many bytes a table of labels may have: 1 MiB, and 1 KiB an image."""
    return (1 << 20) + (1 << 10) * images


Read = Callable[[str], bytes | None]
"""`name -> content` of a file beside the images, None if there is none."""


def find_labels(source: str, names: Sequence[str], read: Read, rule: str = "auto") -> Labels:
    """Return a class per image, or none, by one of RULES.

    `read` gives a table beside the images; with the rule "none" its content does not matter. Names
    of Windows, with backslashes, are understood. Raises InputError naming the first bad entry, for
    a folder that holds train and other splits, and for the name of a column: there are none.
    """
    if rule not in RULES:
        raise no_column(source, rule)
    return RULES[rule](source, [_posix(name) for name in names], read)


def no_column(source: str, rule: str, columns: Iterable[str] = ()) -> InputError:
    """Return the error for labels by a column that a source does not have."""
    hint = nearest(rule, [*RULES, *columns])
    return InputError(f"data.labels = {rule!r}: {source} has no such column", hint)


def unnamed(source: str, labels: Labels, rule: str) -> Labels:
    """Return the labels of images that have no file names. Raises InputError for other rules."""
    if rule not in RULES:
        raise no_column(source, rule)
    if rule in ("folders", "prefix"):
        what = f"data.labels = {rule!r}: the images in {source} have no names of files"
        raise InputError(what, other_rule(source, "auto"))
    return labels if rule == "auto" else Labels()


def other_rule(source: str, rule: str) -> str:
    """Return the hint to read classes by another rule: commands that work when they are typed."""
    place = shlex.quote(source)
    command = f"cmtool data info {place} --labels {rule}"
    return f"{command}. In training, add --set data.labels={rule}"


def _auto(source: str, names: Sequence[str], read: Read) -> Labels:
    """A table of classes beside the images (dataset.json, labels.csv, a column), else folders."""
    tables = [(name, content) for name in PARSERS if (content := read(name)) is not None]
    for name, content in tables[:1]:
        found = PARSERS[name](content, f"{name} in {source}")
        others = tuple(f"{other} in {source} is not read: {name} counts" for other, _ in tables[1:])
        if found is None:
            return Labels(notes=others)
        labels = _looked_up(found, names, f"{name} in {source}")
        return labels._replace(notes=labels.notes + others)
    folders = {name.rpartition("/")[0] for name in names}
    if all(c.isdigit() and len(c) == EDM_FOLDER for c in folders):
        return Labels(notes=_numbered(source, sorted(folders), names))
    if len(folders) < 2:
        return Labels(notes=_prefixes(source, names))
    return _folders(source, names, read)


def _folders(source: str, names: Sequence[str], read: Read) -> Labels:
    """The folder that an image is in, sorted as text; a table beside them is not read."""
    folders = [name.rpartition("/")[0] for name in names]
    classes = {folder: place for place, folder in enumerate(sorted(set(folders)))}
    _refuse_splits(source, classes)
    notes = _loose(folders) + _order(list(classes))
    return Labels([classes[folder] for folder in folders], tuple(classes), notes)


def _prefix(source: str, names: Sequence[str], read: Read) -> Labels:
    """What stands before the first _ in a file's name, sorted as text: cat of cat_01.png."""
    starts = [name.rpartition("/")[2].partition("_")[:2] for name in names]
    for name, (_, mark) in zip(names, starts, strict=True):
        if not mark:
            what = f"data.labels = 'prefix': {name!r} in {source} has no _"
            raise InputError(what, f"rename it, or try {other_rule(source, 'auto')}")
    _refuse_splits(source, {name.rpartition("/")[0] for name in names})
    classes = {start: place for place, start in enumerate(sorted({start for start, _ in starts}))}
    return Labels([classes[start] for start, _ in starts], tuple(classes))


def _none(source: str, names: Sequence[str], read: Read) -> Labels:
    """No classes, whatever there is."""
    if all(read(name) is None for name in PARSERS):
        _refuse_splits(source, {name.rpartition("/")[0] for name in names})
    return Labels()


RULES: dict[str, Callable[[str, Sequence[str], Read], Labels]] = {
    "auto": _auto,
    "folders": _folders,
    "prefix": _prefix,
    "none": _none,
}
"""How classes are found. Any other word names a column."""


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


def _numbered(source: str, folders: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where folders of five digits hold other files than EDM's archives do."""
    if len(folders) < 2 or all(re.search(r"/img[0-9]{8}\.png$", name) for name in names):
        return ()
    what = f"folders of five digits, as {folders[0]}, are not read as classes"
    return (f"{what}, for EDM's archives have such; if they are: {other_rule(source, 'folders')}",)


def _loose(folders: Sequence[str]) -> tuple[str, ...]:
    """Return a note where images lie beside the folders of the classes."""
    if (count := folders.count("")) == 0:
        return ()
    return (f"{count:,} of the images are in no folder: they are class 0, without a name",)


def _prefixes(source: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where files are named by class, as ADM's loader reads them: cat_01.png."""
    starts = Counter(name.rpartition("/")[2].partition("_")[0] for name in names if "_" in name)
    if starts.total() < len(names) or len(starts) < 2 or min(starts.values()) < 2:
        return ()
    shown = ", ".join(f"{start}_" for start in sorted(starts)[:5])
    what = f"names begin with {shown}{', ...' if len(starts) > 5 else ''}: they are not read as"
    return (f"{what} classes; if they are: {other_rule(source, 'prefix')}",)


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
    return table, tuple(classes), _odd_names(classes, shown)


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


def labels_of(values: Sequence[Any], names: Names, shown: str, known: Sequence[str] = ()) -> Labels:
    """Return the class of each image by the values of a column: numbers, or names sorted as text.

    `known` are the names of numbers. Raises InputError for the first image without a class.
    """
    texts = sorted({value for value in values if isinstance(value, str) and value.strip()})
    table = {text: int(match[1]) for text in texts if (match := NUMBER.fullmatch(text))}
    notes: tuple[str, ...] = ()
    if len(table) < len(texts):
        table, known = {text: place for place, text in enumerate(texts)}, texts
        notes = _odd_names(texts, shown)
    classes = []
    for index, value in enumerate(values):
        label = _class(table.get(value) if isinstance(value, str) else value)
        if label is None or (table and not isinstance(value, str)):
            raise _no_class(shown, names[index], value)
        classes.append(label)
    return Labels(classes, tuple(known), notes)


def _odd_names(names: Iterable[str], shown: str) -> tuple[str, ...]:
    """Return a note about the first name without a letter: it may be meant as a number."""
    for place, name in enumerate(names):
        if not any(map(str.isalpha, name)):
            return (f"{shown} has names, sorted as text: {name[:40]!r} is class {place}",)
    return ()


def _no_class(shown: str, name: str, given: Any) -> InputError:
    """Return the error for an image that has no class, or one that is none."""
    what, hint = f"gives the class {repr(given)[:40]}", "correct that line"
    if given is None:
        what, hint = "gives no class", "add it"
    hint = f"classes are whole numbers from 0 to {MAX_CLASSES - 1:,}: {hint}"
    if isinstance(given, list):
        hint = "a vector means a class if it has one 1 among 0s: write whole numbers"
    return InputError(f"{shown} {what} for {name!r}", hint)


def _looked_up(found: Table, names: Sequence[str], shown: str) -> Labels:
    """Return the class of each name. Raises InputError for the first that has none."""
    (table, known, notes), labels = found, []
    for name in names:
        label = _class(table.get(name))
        if label is None:
            raise _no_class(shown, name, table.get(name))
        labels.append(label)
    return Labels(labels, known, notes)
