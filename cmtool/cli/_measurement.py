"""What the commands of `cmtool eval` share: names on stdin, progress, processes, thresholds."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cmtool.cli._output import processes, say
from cmtool.errors import InputError, ThresholdError, UserError

if TYPE_CHECKING:
    from cmtool.system.dist import Group

TIMEOUT = 1800.0
"""Seconds without an answer after which another process counts as lost."""
EVERY = 10.0
"""Seconds between two lines of progress."""


class Threshold(NamedTuple):
    """The bounds of a value: --fail-above and --fail-below."""

    above: float | None
    below: float | None

    def check_usage(self) -> None:
        """Raise UserError for a bound that no value can pass."""
        if any(math.isnan(bound) for bound in self if bound is not None):
            raise UserError("a threshold of nan, which nothing is above or below", "give a number")

    def check(self, content: dict[str, Any]) -> None:
        """Raise ThresholdError for a value beyond a bound."""
        name, value = content["metric"], content["value"]
        hint = "train longer, or use more --steps"
        if self.above is not None and value > self.above:
            raise ThresholdError(f"{name} {value:.4f} is above {self.above:g}", hint)
        if self.below is not None and value < self.below:
            raise ThresholdError(f"{name} {value:.4f} is below {self.below:g}", hint)


def given_images(images: list[str] | None, checkpoint: str | None) -> list[str] | None:
    """Return the names of images on the command line or stdin; None if a model is measured."""
    if images and checkpoint is not None:
        raise UserError("both images and --checkpoint", "give one of them")
    piped = images is None and checkpoint is None and not sys.stdin.isatty()
    if images == ["-"] or piped:
        lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
        listed = [path for line in lines if (path := line.removesuffix("\r"))]
        if images and not listed:
            raise InputError("no paths on stdin", "pipe them in, one a line")
        return listed or None
    return images or None


def refuse_options(given: Mapping[str, Any], defaults: Mapping[str, Any], hint: str) -> None:
    """Raise UserError for an option that differs from its default, where it has no effect."""
    for name, default in defaults.items():
        if given[name] != default:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {given[name]} of images that are there", hint)


def ticker() -> Callable[[str, int, int], None]:
    """Return a function that says, every ten seconds, how far the leading process is."""
    start = last = time.monotonic()
    current = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal start, last, current
        now = time.monotonic()
        if what != current:
            current, start = what, now if current else start
        if now - last < EVERY:
            return
        last = now
        of = f" of {total:,}" if total else ""
        say(f"{what}: {done:,}{of} images, {done / (now - start):,.0f} a second, this process")

    return progress


@contextmanager
def joined(device: str, timeout: float = TIMEOUT) -> Iterator[Group]:
    """Yield the group of torchrun's processes, and leave it after the block."""
    from cmtool.system import dist

    group = dist.join(*processes(), device, timeout)
    try:
        yield group
    except RuntimeError as error:
        raise dist.lost_contact(error, group, 0) or error from None
    finally:
        dist.leave()
