"""Images in tar archives: one, or the shards of WebDataset. They stay where they are.

Of a sample `dog/7.png`, `dog/7.cls` is its class, and `dog/7.json` a table that may hold it.
"""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from cmtool.data.entries import (
    MAX_IMAGES,
    MAX_MEMBER,
    TABLES,
    Entries,
    Labels,
    Names,
    is_image,
    other_ending,
    told_left_out,
)
from cmtool.data.headers import BLOCK, Header, headers
from cmtool.data.labels import (
    LABEL_KEYS,
    RULES,
    Read,
    find_labels,
    labels_of,
    max_table,
    no_column,
    other_rule,
)
from cmtool.errors import InputError
from cmtool.system.files import opened_input
from cmtool.system.portable import read_at

AGAIN = "fetch it again, or make the archive again"
MAX_CLS = 1 << 10
"""Bytes that a .cls may have."""
MAX_JSON = 1 << 20
"""Bytes that the .json of an image may have."""


class Index:
    """Where the images of some archives lie, and what stands beside them.

    An image takes a few numbers and its name. `classes` and `tables` are by the name of a sample:
    what its .cls says, and what the wanted key of its .json does.
    """

    def __init__(self, paths: Sequence[Path], rule: str) -> None:
        self.paths, self.rule = paths, rule
        self.names: list[str] = []
        self.shard, self.start, self.size = array("L"), array("Q"), array("Q")
        self.classes: dict[str, str] = {}
        self.tables: dict[str, Any] = {}
        self.beside: dict[str, bytes] = {}
        self.others: Counter[str] = Counter()
        self.notes: tuple[str, ...] = ()
        for number in range(len(paths)):
            self._add_all(number)

    def _add_all(self, number: int) -> None:
        """Add the members of an archive. Raises InputError for one that is damaged."""
        path, end = self.paths[number], 0
        with opened_input(path, AGAIN) as file:
            file_size = os.fstat(file.fileno()).st_size
            try:
                for header in headers(file, file_size):
                    self._add(number, header, file)
                    end = header.start + header.size
            except (ValueError, OSError, OverflowError) as error:
                raise InputError(f"{path} is damaged: {error}", AGAIN) from None
        if end + BLOCK > file_size:
            self.notes += (f"{path} does not end as a tar archive does: it may be cut short",)

    def _add(self, number: int, header: Header, file: IO[bytes]) -> None:
        name = header.name.removeprefix("./")
        if header.kind == "folder":
            return
        if not is_image(name):
            if header.kind == "file" and not self._takes(name, header, file):
                self.others.update(filter(None, [other_ending(name)]))
            return
        shown = f"{name!r} in {self.paths[number]}"
        if header.kind != "file":
            hint = "pack what it stands for: tar -h --hard-dereference -cf FILE.tar FOLDER"
            raise InputError(f"{shown} is {header.kind}", hint)
        if header.size > MAX_MEMBER:
            what = f"{shown} has {header.size:,} bytes"
            raise InputError(what, "it cannot be an image: remove it from the archive")
        if len(self.names) >= MAX_IMAGES:
            what = f"{self.paths[number].parent} holds more than {MAX_IMAGES:,} images"
            raise InputError(what, "give some of the archives")
        self.names.append(name)
        self.shard.append(number)
        self.start.append(header.start)
        self.size.append(header.size)

    def _takes(self, name: str, header: Header, file: IO[bytes]) -> bool:
        """Take what a file that is no image says of classes; tell whether it may say any."""
        stem, _, ending = name.rpartition(".")
        if name in TABLES:
            if len(self.paths) == 1:
                self.beside[name] = self._content(name, header, file, max_table(1 << 20))
        elif ending == "cls" and self.rule == "auto":
            content = self._content(name, header, file, MAX_CLS)
            self.classes[stem] = content.decode("utf-8", "replace").strip()
        elif ending == "json" and (self.rule == "auto" or self.rule not in RULES):
            value = self._value(self._content(name, header, file, MAX_JSON))
            if value is None:
                return False
            self.tables[stem] = value
        else:
            return False
        return True

    def _content(self, name: str, header: Header, file: IO[bytes], most: int) -> bytes:
        if self.rule == "none":
            return b""
        if header.size > most:
            raise ValueError(f"{name!r} has {header.size:,} bytes; at most {most:,} are read")
        file.seek(header.start)
        return file.read(header.size)

    def _value(self, content: bytes) -> Any:
        """Return what a .json says of the class of its image; None if nothing."""
        try:
            table = json.loads(content)
        except (ValueError, RecursionError):
            return None
        keys = LABEL_KEYS if self.rule == "auto" else (self.rule,)
        found = (table.get(key) for key in keys) if isinstance(table, dict) else ()
        return next((value for value in found if isinstance(value, str | int | float)), None)


def tar_entries(paths: Sequence[Path], source: str, rule: str = "auto") -> Entries | None:
    """Return the images of tar archives by name, or None if there are none.

    Links, devices and sparse files that are called as images are refused, contents of other kinds
    left out; nothing is extracted or unpickled. A name that several archives have stands after the
    name of its archive. `source` is what people call it all, `rule` one of labels.RULES or a key
    of the .json files. Raises InputError.
    """
    index = Index(paths, rule)
    if not index.names:
        return None
    shown = index.names
    if len(set(shown)) < len(shown):
        marks = [os.path.relpath(path, source).removesuffix(".tar") for path in paths]
        shown = [f"{marks[s]}/{n}" for n, s in zip(shown, index.shard, strict=True)]
    places = sorted(range(len(shown)), key=shown.__getitem__)
    for before, after in itertools.pairwise(places):
        if shown[before] == shown[after]:
            raise InputError(f"{source} holds {index.names[after]!r} twice", AGAIN)
    names = Names(shown[place] for place in places)
    plain = [index.names[place] for place in places]
    labels = _labels(index, plain, names, source, _beside(index, source))
    labels = labels._replace(notes=labels.notes + index.notes)
    shard, start, size = (array(a.typecode, (a[p] for p in places)) for a in (
        index.shard, index.start, index.size
    ))  # fmt: skip

    def read(at: int) -> bytes:
        path = paths[shard[at]]
        try:
            with open(path, "rb", buffering=0) as file:  # in any process; a shard is not kept open
                content = read_at(file.fileno(), size[at], start[at])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}", AGAIN) from None
        if len(content) != size[at]:
            raise InputError(f"{path} became shorter", AGAIN)
        return content

    return Entries(names, read, labels, "", told_left_out(index.others), lambda: size)


def _beside(index: Index, source: str) -> Read:
    """Return what reads a table beside the images: in the only archive, or beside the shards."""
    folder = Path(source)

    def read(name: str) -> bytes | None:
        if len(index.paths) == 1 and not folder.is_dir():
            return index.beside.get(name)
        file = folder / name
        if not file.is_file():
            return None
        with opened_input(file, AGAIN) as opened:
            return b"" if index.rule == "none" else opened.read(max_table(len(index.names)))

    return read


def _labels(index: Index, plain: Sequence[str], names: Names, source: str, beside: Read) -> Labels:
    """Return the class of each image: by its .cls, else its .json, else as files in folders."""
    for values, ending in ((index.classes, "cls"), (index.tables, "json")):
        found = [_of_sample(values, name) for name in plain] if values else [None]
        if all(value is None for value in found):
            continue
        if None in found:
            name = names[found.index(None)]
            what = f"{name!r} in {source} has no .{ending} with its class, other images have one"
            raise InputError(what, other_rule(source, "none"))
        return labels_of(found, names, f".{ending} in {source}")
    if index.rule not in RULES:
        raise no_column(source, index.rule)
    return find_labels(source, plain, beside, index.rule)


def _of_sample(values: dict[str, Any], name: str) -> Any:
    """Return what stands beside an image: a.cls beside a.png, or beside a.left.png."""
    stem = name.rpartition(".")[0]
    folder, slash, file = name.rpartition("/")
    sample = f"{folder}{slash}{file.partition('.')[0]}"
    return values.get(stem, values.get(sample))
