"""Errors that the user can fix. Every other exception is a bug and ends in a traceback.

Each class is an exit code of the command line. This file imports nothing of cmtool.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import ClassVar


class UserError(Exception):
    """Wrong usage or configuration: `what` names the bad value, `hint` says what to do."""

    exit_code: ClassVar[int] = 2
    rank: int | None = None
    """The process that met the error, if only one of several did."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # for users of the Python API, who see a traceback


class InputError(UserError):
    """An input that cannot be used: missing, corrupt, refused, or of the wrong shape."""

    exit_code = 3


class MissingError(UserError):
    """Something optional is missing: a weight file, an extra package."""

    exit_code = 4


class ResourceError(UserError):
    """The machine has too little of something: memory, disk, time."""

    exit_code = 5


class DivergedError(UserError):
    """Training met too many non-finite steps in a row."""

    exit_code = 6


class BusyError(UserError):
    """Another process holds the run folder."""

    exit_code = 7


class ThresholdError(UserError):
    """A value did not meet the threshold that the user gave."""

    exit_code = 8


class Stopped(UserError):
    """A signal ended the work after everything was saved; exit code 128 + the signal's number."""

    def __init__(self, what: str, hint: str = "", signal_number: int = 0) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number  # type: ignore[misc]  # per instance: one per signal


class Paused(UserError):
    """The work stopped on purpose, after everything was saved. It can be resumed."""

    exit_code = 75


def nearest(bad: str, good: Iterable[str]) -> str:
    """Return a hint: "did you mean X?" if a good name is close to the bad one, then all names."""
    names = sorted(good)
    close = difflib.get_close_matches(bad, names, n=1, cutoff=0.5)
    lead = f"did you mean {close[0]!r}? " if close else ""
    return f"{lead}choose from {', '.join(names)}"


def is_full(error: Exception) -> bool:
    """Tell whether an error means that the disk, or a quota of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(
        f"os error {n})" in str(error) for n in full
    )
