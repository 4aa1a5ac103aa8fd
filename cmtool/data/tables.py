"""Tables of parquet, or of arrow as Hugging Face's `datasets` saves them.

The only importer of pyarrow.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cmtool.data.archives import DAMAGE, MAX_ARRAY, MAX_RATIO
from cmtool.data.entries import MAX_IMAGES, MAX_MEMBER
from cmtool.errors import InputError, MissingError
from cmtool.system.files import opened_input

AGAIN = "fetch it again"
ROWS = 16
"""Rows that are unpacked at a time: a dictionary may make each of them large."""
KEPT_FILES = 16
PARQUET, STREAM, OWN = b"PAR1", b"\xff\xff\xff\xff", ("cache-", "indices")
"""How tables begin, and the names of files that `datasets` keeps beside its own."""
ARROW_DAMAGE = (*DAMAGE, RuntimeError, MemoryError, TypeError, AttributeError, ArithmeticError)
"""What pyarrow raises for a damaged file, beside exceptions of its own."""


class Column(NamedTuple):
    """A column, or a field in one: its name in the schema, and that of the field."""

    name: str
    field: str = ""

    @property
    def path(self) -> str:
        """The name by which parquet knows it."""
        return f"{self.name}.{self.field}" if self.field else self.name


class Part(NamedTuple):
    """Rows that are unpacked together: of a file by its number, the group in it, how many rows."""

    file: int
    group: int
    rows: int


class Stream(NamedTuple):
    """A stream of arrow that is mapped into memory: its batches are views of the file."""

    schema: Any
    batches: list[Any]


def is_table(path: Path) -> bool:
    """Tell whether a file begins as parquet does, or is a stream of arrow by its name too."""
    with path.open("rb") as opened:
        start = opened.read(4)
    return start == PARQUET or (start == STREAM and path.suffix == ".arrow")


def is_table_name(name: str) -> bool:
    """Tell whether a file is a table by its name, and not one that `datasets` keeps for itself."""
    own = name.rpartition("/")[2].startswith(OWN)
    return name.endswith(".parquet") or (name.endswith(".arrow") and not own)


class Tables:
    """Parquet files, or streams of arrow, that are opened in any process when they are needed.

    `largest` is the bytes that the largest of the groups of rows unpacks to that were looked at.
    Raises MissingError without the parquet extra.
    """

    def __init__(self, paths: Sequence[Path], source: str) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            what = f"{source} is a table, which needs another package"
            raise MissingError(what, "pip install 'cmtool[parquet]'") from None
        self.paths, self.source, self.largest = paths, source, 0
        self.opened: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.schema = self._schema(0)

    def file(self, number: int) -> Any:
        """Return a ParquetFile, or a Stream."""
        key = (os.getpid(), number)  # pyarrow promises nothing after a fork
        if key not in self.opened:
            while len(self.opened) >= KEPT_FILES:
                self.opened.popitem(last=False)
            with naming(self.paths[number]):
                self.opened[key] = _opened(self.paths[number])
        self.opened.move_to_end(key)
        return self.opened[key]

    def _schema(self, number: int) -> Any:
        file = self.file(number)
        with naming(self.paths[number]):
            schema = file.schema if isinstance(file, Stream) else file.schema_arrow
            _ = schema.names  # raises for names that are no text
            return schema

    def binary_columns(self) -> dict[str, Column]:
        """Return the columns that may hold files: of bytes, or of a struct with a field of them."""
        from pyarrow import types

        def is_binary(kind: Any) -> bool:
            return bool(types.is_binary(kind) or types.is_large_binary(kind))

        found = {}
        for field in self.schema:
            kind = field.type
            at = kind.get_field_index("bytes") if types.is_struct(kind) else -1
            if at >= 0 and is_binary(kind.field(at).type):
                found[field.name] = Column(field.name, "bytes")
            if is_binary(kind):
                found[field.name] = Column(field.name)
        return found

    def class_columns(self) -> list[str]:
        """Return the columns that may hold classes: whole numbers or texts."""
        from pyarrow import types

        def is_usable(kind: Any) -> bool:
            kind = kind.value_type if types.is_dictionary(kind) else kind
            return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

        return [field.name for field in self.schema if is_usable(field.type)]

    def has_paths(self, column: Column) -> bool:
        """Tell whether there is a path beside each file of a column."""
        kind = self.schema.field(column.name).type
        return column.field != "" and kind.get_field_index("path") >= 0

    def parts(self, column: Column) -> list[Part]:
        """Return the groups of rows of all files.

        Raises InputError for a group that claims too much, for files of other columns, and where
        there are no rows.
        """
        parts: list[Part] = []
        for number, path in enumerate(self.paths):
            kinds = [s.field(column.name).type if s.names.count(column.name) == 1 else None
                     for s in (self.schema, self._schema(number))]  # fmt: skip
            if None in kinds or kinds[0] != kinds[1]:
                what = f"{path} has another column {column.name!r} than {self.paths[0]}, or none"
                raise InputError(what, f"give one of them: {path}")
            file, size = self.file(number), path.stat().st_size
            if isinstance(file, Stream):
                parts += (Part(number, i, len(b)) for i, b in enumerate(file.batches))
                continue
            with naming(path):
                for group in range(file.metadata.num_row_groups):
                    parts.append(Part(number, group, self._checked(file, group, size)))
        total = sum(part.rows for part in parts)
        if not 0 < total <= MAX_IMAGES:
            raise InputError(f"{self.source} has {total:,} rows", f"give 1 to {MAX_IMAGES:,}")
        return [part for part in parts if part.rows]

    def _checked(self, file: Any, group: int, size: int) -> int:
        """Return the rows of a group of parquet. Raises ValueError for what it cannot have.

        Its columns are not asked: of some damaged ones, to look at them ends the process.
        """
        facts = file.metadata.row_group(group)
        rows, unpacked = int(facts.num_rows), int(facts.total_byte_size)
        if not 0 <= unpacked <= MAX_RATIO * size:
            raise ValueError(f"group {group} of its rows claims {unpacked:,} bytes")
        if not 0 <= rows <= 64 * size:
            raise ValueError(f"group {group} claims {rows:,} rows")
        self.largest = max(self.largest, unpacked)
        return rows

    def batches(self, part: Part, column: Column, rows: int = ROWS) -> Iterator[Any]:
        """Yield the column, some rows at a time. Raises InputError for a damaged file."""
        import pyarrow.compute as pc

        file, path, count = self.file(part.file), self.paths[part.file], 0
        with naming(path):
            if isinstance(file, Stream):
                found: Any = [file.batches[part.group]]
            else:
                found = file.iter_batches(
                    rows, row_groups=[part.group], columns=[column.path], use_threads=False
                )
            for batch in found:
                values = batch.column(column.name)
                count += len(values)
                yield pc.struct_field(values, column.field) if column.field else values
            if count != part.rows:
                raise ValueError(f"a group has {count:,} rows and claims {part.rows:,}")

    def files(self, part: Part, column: Column) -> Iterator[tuple[Any, list[int]]]:
        """Yield a column of bytes, some rows at a time, with the length of each value."""
        import pyarrow.compute as pc

        total, most = 0, min(MAX_ARRAY, MAX_RATIO * self.paths[part.file].stat().st_size)
        for values in self.batches(part, column):
            with naming(self.paths[part.file]):
                lengths = [length or 0 for length in pc.binary_length(values).to_pylist()]
                total += sum(lengths)
                if max(lengths, default=0) > MAX_MEMBER:
                    raise ValueError(f"an image of it has more than {MAX_MEMBER:,} bytes")
                if total > most:
                    raise ValueError(f"a group of its rows unpacks to more than {most:,} bytes")
            yield values, lengths


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise InputError with the name of the file for what pyarrow raises."""
    import pyarrow

    try:
        yield
    except (*ARROW_DAMAGE, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is damaged: {reason}", AGAIN) from None


def _opened(path: Path) -> Any:
    """Return a ParquetFile, or the Stream of an arrow file, whose offsets are checked."""
    import pyarrow
    from pyarrow import ipc, parquet

    opened_input(path, AGAIN).close()  # a pipe would be waited for
    if path.suffix != ".arrow":
        return parquet.ParquetFile(str(path), page_checksum_verification=True)
    before, batches = pyarrow.total_allocated_bytes(), []
    reader = ipc.open_stream(pyarrow.memory_map(str(path)))
    for batch in reader:
        batch.validate(full=True)
        batches.append(batch)
        if pyarrow.total_allocated_bytes() - before > MAX_ARRAY:
            raise ValueError(f"it unpacks to more than {MAX_ARRAY:,} bytes")
    return Stream(reader.schema, batches)
