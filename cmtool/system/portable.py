"""What some systems lack, Windows most of it: signals, flags, locks, reading at a place, fork."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import ModuleType

fcntl: ModuleType | None = None
resource: ModuleType | None = None
with suppress(ImportError):
    import fcntl
with suppress(ImportError):
    import resource

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Signals that ask a command to end in good order."""


def signals(names: tuple[str, ...] = STOPPING) -> list[signal.Signals]:
    """Return the signals of these names that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def is_nohup(number: int) -> bool:
    """Tell whether a signal is the end of a terminal, and nohup said that it does not matter."""
    hangup = getattr(signal, "SIGHUP", None)
    return number == hangup and signal.getsignal(number) == signal.SIG_IGN


def flags(*names: str) -> int:
    """Return the flags of `os.open` of these names; one that a system lacks plays no part."""
    found = 0
    for name in names:
        found |= getattr(os, name, 0)
    return found


def read_at(descriptor: int, count: int, place: int) -> bytes:
    """Return `count` bytes of a file, or fewer at its end, from a place on."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, place)
    os.lseek(descriptor, place, os.SEEK_SET)
    return os.read(descriptor, count)


def write_at(descriptor: int, content: bytes, place: int) -> int:
    """Write at a place of a file; return how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, place)
    os.lseek(descriptor, place, os.SEEK_SET)
    return os.write(descriptor, content)


def lock(descriptor: int) -> None:
    """Lock a file for this process. Raises BlockingIOError if another has it.

    Raises OSError where there are no locks.
    """
    if fcntl is None:
        raise OSError("this system has no such locks")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def has_fork() -> bool:
    """Tell whether processes can share what this one has in memory."""
    return hasattr(os, "fork")


def peak_resident() -> int:
    """Return the most bytes of main memory that this process has held, 0 where nobody says it."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def sync_flags(is_folder: bool) -> int | None:
    """Return how to open what is to be synced to the disk; None for folders where none can be."""
    if os.name != "nt":
        return os.O_RDONLY
    return None if is_folder else os.O_RDWR
