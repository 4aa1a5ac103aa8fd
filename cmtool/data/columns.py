"""Images and classes in the columns of tables: parquet files, or folders of `datasets`."""

from __future__ import annotations

import json
import shlex
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from cmtool.data.entries import Entries, Labels, Names, numbered
from cmtool.data.labels import LABEL_KEYS, RULES, find_labels, labels_of, no_column, unnamed
from cmtool.data.tables import AGAIN, Column, Part, Stream, Tables, naming
from cmtool.errors import InputError, nearest
from cmtool.system.files import read_regular

LABEL_ROWS = 256
"""Rows of classes that are unpacked at a time."""
KEPT_BYTES = 256 << 20
"""Bytes of unpacked images that a process keeps, but for one group of rows that has more."""
SLOW_GROUP = 8 << 20
"""Bytes of a group of rows from which a note is due: each image is read with its group."""
MAX_TEXT = 1 << 12
"""Letters that a class or a name may have."""
MAX_INFO = 1 << 20
"""Bytes that dataset_info.json may have."""
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II", b"MM", b"P2", b"P3", b"P5", b"P6")
"""How files of images begin."""


def table_entries(
    paths: Sequence[Path], source: str, rule: str = "auto", column: str = ""
) -> Entries:
    """Return the images in a column of some tables, in the order of their rows.

    `column` names it where there are several, `rule` is one of labels.RULES or the column of the
    classes. Their names are the paths beside the images, if all differ, else numbers. Raises
    MissingError without the parquet extra, InputError for damaged tables and those of no images.
    """
    tables = Tables(paths, source)
    image = _image_column(tables, column)
    parts = tables.parts(image)
    ends = array("Q", accumulate(part.rows for part in parts))
    found = _names(tables, image, ends[-1])
    names = numbered(ends[-1]) if found is None else found
    labels = _labels(tables, names, rule, are_paths=found is not None)
    reader = Reader(tables, image, parts, ends)
    if len(parts) > 1 and tables.largest > SLOW_GROUP:
        fast = f"cmtool data prepare {shlex.quote(source)} images.zip"
        note = f"{source} is unpacked by {parts[0].rows:,} rows; a zip streams faster: {fast}"
        labels = labels._replace(notes=(*labels.notes, note))

    def read(index: int) -> bytes:
        content = reader(index)
        if content is None:
            what = f"row {index} of {source} has no image"
            raise InputError(what, "save the table with its images embedded")
        return content

    return Entries(names, read, labels, "", None, reader.sizes)


class Reader:
    """Reads images by number, in any process; it keeps the groups of rows that were used last."""

    def __init__(
        self, tables: Tables, column: Column, parts: Sequence[Part], ends: Sequence[int]
    ) -> None:
        self.tables, self.column, self.parts, self.ends = tables, column, parts, ends
        self.kept: OrderedDict[int, tuple[int, list[bytes | None]]] = OrderedDict()

    def __call__(self, index: int) -> bytes | None:
        """Return an image, None where there is none. Raises InputError for a damaged file."""
        number = bisect_right(self.ends, index)
        part = self.parts[number]
        row = index - (self.ends[number] - part.rows)
        if not isinstance(self.tables.file(part.file), Stream):
            return self._group(number)[row]
        (values,) = self.tables.batches(part, self.column)
        content: bytes | None = values[row].as_py()
        return content

    def _group(self, number: int) -> list[bytes | None]:
        """Return the images of a group of rows."""
        if number not in self.kept:
            rows: list[bytes | None] = []
            count = 0
            for values, lengths in self.tables.files(self.parts[number], self.column):
                rows += values.to_pylist()
                count += sum(lengths)
            self.kept[number] = count, rows
            while len(self.kept) > 1 and sum(n for n, _ in self.kept.values()) > KEPT_BYTES:
                self.kept.popitem(last=False)
        self.kept.move_to_end(number)
        return self.kept[number][1]

    def sizes(self) -> Sequence[int]:
        """Return the bytes of each image, by one pass over all files."""
        found = array("Q")
        for part in self.parts:
            for _, lengths in self.tables.files(part, self.column):
                found.extend(lengths)
        return found


def _image_column(tables: Tables, wanted: str) -> Column:
    """Return the column of the images. Raises InputError unless there is one, or it is `wanted`."""
    names, source = tables.schema.names, tables.source
    found = tables.binary_columns()
    if wanted and wanted not in names:
        raise InputError(f"{source} has no column {wanted!r}", nearest(wanted, names))
    if wanted and wanted not in found:
        kind = tables.schema.field(wanted).type
        raise InputError(f"the column {wanted!r} of {source} holds {kind}", _good(found))
    if wanted:
        return found[wanted]
    images = {name: column for name, column in found.items() if _begins(tables, column)}
    if not images:
        what = f"{source} has no column of image files, but {', '.join(names[:6]) or 'nothing'}"
        raise InputError(what, f"save images as files in a column of bytes. {_good(found)}")
    if len(images) > 1:
        first, place = next(iter(images)), shlex.quote(source)
        command = f"cmtool data info {place} --column {shlex.quote(first)}"
        raise InputError(
            f"{source} has several columns of images: {', '.join(images)}",
            f"choose one: {command}. In training, add --set data.column={first}",
        )
    return next(iter(images.values()))


def _good(columns: dict[str, Column]) -> str:
    return f"its columns of bytes: {', '.join(columns) or 'none'}"


def _begins(tables: Tables, column: Column) -> bool:
    """Tell whether the first file in a column begins as an image does."""
    for part in tables.parts(column):
        for values, _ in tables.files(part, column):
            for value in filter(None, values.to_pylist()):
                return value.startswith(STARTS)
    return False


def _names(tables: Tables, image: Column, count: int) -> Names | None:
    """Return the paths beside the images, if there are any and all differ."""
    if not tables.has_paths(image):
        return None
    paths = _values(tables, Column(image.name, "path"))
    if not all(isinstance(path, str) for path in paths) or len(set(paths)) < count:
        return None
    return Names(path.removeprefix("./") for path in paths)


def _values(tables: Tables, column: Column) -> list[Any]:
    """Return the numbers or texts in a column. Raises InputError for one that is too long."""
    found: list[Any] = []
    for part in tables.parts(column):
        for values in tables.batches(part, column, LABEL_ROWS):
            with naming(tables.paths[part.file]):
                found += values.to_pylist()
        for value in found[-part.rows :]:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                what = f"{tables.paths[part.file]} has a text of {len(value):,} letters"
                raise InputError(f"{what} in {column.path}", AGAIN)
    return found


def _labels(tables: Tables, names: Names, rule: str, are_paths: bool) -> Labels:
    """Return the class of each image: by a column, else as for files, if the names `are_paths`."""
    good, source = tables.class_columns(), tables.source
    if rule not in RULES and rule not in good:
        raise no_column(source, rule, good)
    by = rule if rule in good else next((key for key in LABEL_KEYS if key in good), None)
    if by is not None and rule in ("auto", by):
        values = _values(tables, Column(by))
        shown = f"the column {by!r} of {source}"
        return labels_of(values, names, shown, _class_names(tables, by))
    if not are_paths:
        return unnamed(source, Labels(), rule)
    return find_labels(source, [names[i] for i in range(len(names))], lambda name: None, rule)


def _class_names(tables: Tables, column: str) -> list[str]:
    """Return the names of a column's classes, as `datasets` writes them; none if there are none."""
    with suppress(InputError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        written = (tables.schema.metadata or {}).get(b"huggingface")
        if written is not None:
            features = json.loads(written)["info"]["features"]
        else:
            file = tables.paths[0].parent / "dataset_info.json"
            features = json.loads(read_regular(file, MAX_INFO))["features"]
        names = features[column]["names"]
        if all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
            return list(names)
    return []
