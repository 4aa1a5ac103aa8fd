"""What the user can put right. Every other exception is a bug and ends in a traceback.

The classes are the exit codes of the command line; nothing here imports anything of cmtool.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import ClassVar


class UserError(Exception):
    """Wrong usage or configuration: `what` names the bad value, `hint` the remedy."""

    exit_code: ClassVar[int] = 2
    rank: int | None = None
    """Which of several processes met it, where only one did."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class InputError(UserError):
    """An input that cannot be used: missing, corrupt, refused, or of the wrong shape."""

    exit_code = 3


class MissingError(UserError):
    """Something optional is missing: a weight file, an extra package."""

    exit_code = 4


class ResourceError(UserError):
    """The machine ran out of something: memory, disk, time."""

    exit_code = 5


class DivergedError(UserError):
    """Training met too many non-finite steps in a row."""

    exit_code = 6


class BusyError(UserError):
    """Another process holds the run folder."""

    exit_code = 7


class ThresholdError(UserError):
    """A threshold the user asked for was not met."""

    exit_code = 8


class Stopped(UserError):
    """A signal ended the work after everything was saved; exit code 128 + the signal's number."""

    def __init__(self, what: str, hint: str = "", signal_number: int = 0) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number  # type: ignore[misc]  # per instance: one per signal


class Paused(UserError):
    """The work stopped on purpose, with everything saved, and can go on."""

    exit_code = 75


def nearest(bad: str, good: Iterable[str]) -> str:
    """Return "did you mean X? " when a good name is close to the bad one, then the good names."""
    names = sorted(good)
    close = difflib.get_close_matches(bad, names, n=1, cutoff=0.5)
    lead = f"did you mean {close[0]!r}? " if close else ""
    return f"{lead}choose from {', '.join(names)}"


def is_full(error: Exception) -> bool:
    """Tell whether an error of a write means that the disk, or a quota, is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(
        f"os error {n})" in str(error) for n in full
    )
