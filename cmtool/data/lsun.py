"""Images of an LSUN database, which is an lmdb. The only importer of lmdb."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from cmtool.data.entries import Entries, Labels, Names, fingerprint
from cmtool.data.labels import unnamed
from cmtool.errors import InputError, MissingError

AGAIN = "fetch the database again"
META = struct.Struct("<II16xI92xQQ")
"""Of a meta page, from its 16th byte: magic, version, size of a page, last page, transaction."""
MAGIC, VERSION, MIN_PAGE = 0xBEEFC0DE, 1, 256


def check_whole(file: Path) -> None:
    """Raise InputError for a database that is none, or is cut short: to read it ends the process.

    LMDB maps the file, and takes its own word for its length.
    """
    with file.open("rb") as opened:
        start = opened.read(16 + META.size)
        if len(start) < 16 + META.size or META.unpack_from(start, 16)[:2] != (MAGIC, VERSION):
            raise InputError(f"{file} is not an lmdb", AGAIN)
        metas = [META.unpack_from(start, 16)]
        page = metas[0][2]
        if page < MIN_PAGE:
            raise InputError(f"{file} is not an lmdb", AGAIN)
        opened.seek(page + 16)
        second = opened.read(META.size)
        if len(second) == META.size and META.unpack(second)[0] == MAGIC:
            metas.append(META.unpack(second))
        last = max(metas, key=lambda meta: meta[4])[3]
        size = opened.seek(0, os.SEEK_END)
    if size < (last + 1) * page:
        what = f"{file} has {size:,} bytes of the {(last + 1) * page:,} that it speaks of"
        raise InputError(what, AGAIN)


def lmdb_entries(path: Path, rule: str = "auto") -> Entries:
    """Return the images of an LSUN database folder, which have no classes.

    Raises MissingError without the lmdb extra.
    """
    try:
        import lmdb
    except ImportError:
        what = f"{path} is an lmdb, which needs another package"
        raise MissingError(what, "pip install 'cmtool[lmdb]'") from None
    check_whole(path / "data.mdb")
    opened: dict[int, Any] = {}

    def environment() -> Any:
        if os.getpid() not in opened:  # an environment does not survive a fork
            opened[os.getpid()] = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        return opened[os.getpid()]

    try:
        with environment().begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            names = Names(bytes(key).decode("utf-8", "surrogateescape") for key in keys)
    except lmdb.Error as error:
        raise InputError(f"{path} is not an lmdb that can be read: {error}", AGAIN) from None
    if not len(names):
        raise InputError(f"no images in {path}", AGAIN)

    def read(index: int) -> bytes:
        name = names[index]
        try:
            with environment().begin() as transaction:
                found = transaction.get(name.encode("utf-8", "surrogateescape"))
        except lmdb.Error as error:
            raise InputError(f"{name!r} in {path} cannot be read: {error}", AGAIN) from None
        if found is None:
            raise InputError(f"{name!r} is no longer in {path}", AGAIN)
        return bytes(found)

    labels = unnamed(str(path), Labels(), rule)
    return Entries(names, read, labels, fingerprint((names[i] for i in range(len(names))), None))
