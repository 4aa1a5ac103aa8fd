"""Who holds a run folder, and whether the run that its status.json calls running still lives."""

from __future__ import annotations

import errno
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cmtool.errors import BusyError, UserError
from cmtool.system.files import is_regular, write_json
from cmtool.system.records import known_facts
from cmtool.training.records import Status

HEARTBEAT = 60.0
"""Seconds after which a run sets the time of its status.json anew."""
SILENCE = 600.0
"""Seconds without a heartbeat after which a run on another machine counts as killed."""
PATIENCE = 0.2
"""Seconds to wait for the lock: whoever looks whether a run lives holds it for a moment."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that have no locks."""
CAN_ONLY_FOLLOW = os.utime not in os.supports_follow_symlinks
"""So it is on Windows."""


@contextmanager
def locked(
    out: Path, note: Callable[[str], None] | None = None, *, patience: float = PATIENCE
) -> Iterator[None]:
    """Hold the run folder's lock. Raises BusyError naming the holder.

    On a file system without locks the block runs without one, and `note` tells so.
    """
    lock = FileLock(out / ".lock")
    if not _acquire(lock, patience) and note is not None:
        note(f"{out} is on a file system without locks: a second run in it will not be noticed")
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, patience: float) -> bool:
    """Return whether the file system has locks, holding this one. Raises BusyError."""
    try:
        with warnings.catch_warnings():  # some releases make do with a file, and warn
            warnings.simplefilter("ignore")
            lock.acquire(timeout=patience, poll_interval=0.02)
    except Timeout:
        raise _busy(Path(lock.lock_file).parent) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _busy(out: Path) -> BusyError:
    holder = known_facts(out / "status.json", Status)
    who = f"process {holder.pid} on {holder.host} since {holder.since}" if holder else "another"
    return BusyError(f"{out} is in use by {who}", "wait for it, or give another --out")


def refuse_busy(out: Path) -> None:
    """Raise BusyError while another process holds the run folder, before time is spent on data."""
    if (out / ".lock").is_file():
        with locked(out):
            pass


def is_held(out: Path) -> bool | None:
    """Return whether a process holds the run folder; None if that cannot be told."""
    if not is_regular(out / ".lock"):
        return False
    lock = FileLock(out / ".lock")
    try:
        has_locks = _acquire(lock, 0)
    except BusyError:
        return True
    except OSError:  # a folder of someone else
        return None
    lock.release()
    return False if has_locks else None


def read_status(out: Path) -> Status | None:
    """Return what status.json says, None if there is none; a run that is gone is `killed`.

    A killed run leaves the word running. It is gone if nobody holds its lock, or, where locks of
    another machine or file system say nothing, if its heartbeat is old.
    """
    path = out / "status.json"
    status = known_facts(path, Status)
    if status is None or status.state != "running" or _lives(path, status):
        return status
    status = known_facts(path, Status)  # it may have ended since, and let go of the lock
    if status is None or status.state != "running":
        return status
    return status.model_copy(update={"state": "killed"})


def _lives(path: Path, status: Status) -> bool:
    held = is_held(path.parent)
    if held or (held is False and status.host == platform.node()):
        return held
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime < SILENCE
    return False


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Set the time of a file anew each minute of the block, so that others see who lives."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(path, follow_symlinks=CAN_ONLY_FOLLOW)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def tell_killed(out: Path, error: UserError) -> None:
    """Write why a run ended whose leading process was killed, if it left the word running."""
    path = out / "status.json"
    with suppress(OSError, UserError):
        lock = FileLock(out / ".lock")
        if not _acquire(lock, 2.0):
            return
        try:
            status = known_facts(path, Status)
            if status is not None and status.state == "running":
                end = {"state": "failed", "exit_code": error.exit_code, "error": error.what}
                write_json(path, status.model_dump(exclude_unset=True) | end, durable=True)
        finally:
            lock.release()
