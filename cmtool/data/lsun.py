"""Images of an LSUN database, which is an lmdb. The only importer of lmdb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cmtool.data.entries import Entries, Names, fingerprint
from cmtool.errors import InputError, MissingError


def lmdb_entries(path: Path) -> Entries:
    """Return the images of an LSUN database folder. Raises MissingError without the lmdb extra."""
    try:
        import lmdb
    except ImportError:
        what = f"{path} is an lmdb, which needs another package"
        raise MissingError(what, "pip install 'cmtool[lmdb]'") from None
    opened: dict[int, Any] = {}

    def environment() -> Any:
        if os.getpid() not in opened:  # an environment does not survive a fork
            opened[os.getpid()] = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        return opened[os.getpid()]

    with environment().begin() as transaction:
        keys = transaction.cursor().iternext(keys=True, values=False)
        names = Names(bytes(key).decode("utf-8", "surrogateescape") for key in keys)
    if not len(names):
        raise InputError(f"no images in {path}", "fetch the database again")

    def read(index: int) -> bytes:
        with environment().begin() as transaction:
            return bytes(transaction.get(names[index].encode("utf-8", "surrogateescape")))

    return Entries(names, read, None, fingerprint((names[i] for i in range(len(names))), None))
