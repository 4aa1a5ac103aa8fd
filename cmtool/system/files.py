"""Files that are read within bounds and without waiting, and written whole; and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cmtool.errors import InputError, ResourceError, is_full
from cmtool.system.portable import flags, sync_flags

SPECIAL = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)
"""What opening says of a link that is not followed, a pipe without a reader, a socket, a device."""

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems say that cannot wait for the list of files of a folder."""


def opened(path: Path, mode: str = "rb", buffering: int = -1) -> IO[Any]:
    """Open a regular file, in a binary mode.

    The name must not be a link, and a pipe is not waited for. Raises InputError for these and every
    other special file, OSError as `open` does.
    """
    more = flags("O_NOFOLLOW", "O_NONBLOCK")
    what, hint = f"{path} is not a regular file", "remove it, or give another path"
    try:
        file = open(  # noqa: SIM115  # the caller closes it
            path, mode, buffering, opener=lambda name, own: os.open(name, own | more, 0o666)
        )
    except OSError as error:
        if error.errno in SPECIAL:
            raise InputError(what, hint) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(what, hint)
    return file


def is_regular(path: Path) -> bool:
    """Tell whether a path is a regular file itself, not by a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_own(path: Path, most: int = 1 << 20) -> bytes:
    """Return what is in a regular file that is `opened`. Raises InputError if it is longer."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size  # Python takes all the memory that it is asked for
        content: bytes = file.read(min(size, most) + 1)
    if len(content) > most:
        raise InputError(f"{path} has more than {most:,} bytes", "remove it, or give another path")
    return content


def file_facts(file: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def read_regular(path: str | Path, limit: int, hint: str = "check the path") -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises InputError, with the hint, for a file that cannot be read, for one that is larger, and
    for a folder, pipe or device: those are not waited for.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise InputError(f"{path} is not a regular file", hint)
            most = min(limit, max(facts.st_size, 1 << 16))  # files of /proc say that they have 0
            content = file.read(most + 1) if facts.st_size <= limit else None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}", hint) from None
    if content is None or len(content) > most:
        size = max(facts.st_size, most + 1)
        raise InputError(f"{path} has {size:,} bytes; at most {limit:,} are read", hint)
    return content


def opened_input(path: Path, hint: str) -> IO[bytes]:
    """Open a regular file, or one that a link leads to, to read parts of it.

    Raises InputError, with the hint, for what cannot be opened; a pipe is not waited for.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  # the caller closes it
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}", hint) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path} is not a regular file", hint)
    return file


def expanded(name: str) -> Path:
    """Return the path of a name, ~ as the home folder: a shell leaves it as it is in quotes."""
    try:
        return Path(name) if os.path.lexists(name) else Path(name).expanduser()
    except (RuntimeError, ValueError):  # nobody's home; a NUL
        return Path(name)


def _without_waiting(path: str, own: int) -> int:
    """Open a file; of a fifo, do not wait for somebody to write to it."""
    return os.open(path, own | flags("O_NONBLOCK"))


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Write JSON by way of a temporary file, so that a reader never sees half of it."""
    text = json.dumps(content, indent=1, sort_keys=True)
    write_atomic(path, text.encode() + b"\n", durable=durable)


def write_atomic(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file by way of a temporary one beside it.

    A killed process leaves the old file or the new one. A `durable` file survives a power cut too,
    at the price of waiting for the disk. Raises InputError for a special file, ResourceError when
    the disk is full.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file", "give another name")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if durable:
            sync(temporary)
    if durable:
        sync(path.parent)


def sync(path: Path) -> bool:
    """Wait until a file, or the list of files of a folder, is on the disk.

    Return False for a folder of a file system that cannot do it.
    """
    how = sync_flags(path.is_dir())
    if how is None:
        return False
    descriptor = os.open(path, how)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in NO_SYNC and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def check_temporary() -> None:
    """Raise ResourceError if no folder takes temporary files, which torch and its workers need."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        what = "no folder for temporary files can be written to"
        raise ResourceError(what, "name one that can: export TMPDIR=FOLDER") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it becomes `path` if the block succeeds.

    Raises ResourceError when the disk is full, and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link of that name would be written through
        with opened(temporary, "xb"):
            pass
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if is_full(error):
            raise ResourceError(f"no room on the disk for {path}", "free disk space") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
