"""What ends a run before its last step: a signal, the end of its time, a parent that is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cmtool.data.batches import BatchFn
from cmtool.errors import Paused, Stopped, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PAUSE = 1000
"""A reason to stop that is not a signal: the time is up."""


class Stop:
    """Knows whether to stop: a signal has come, the time is up, or the parent is gone.

    A signal is noted, and the run stops after the step. While `at_once`, before the first step or
    between two steps, the signal raises Stopped. A second Ctrl-C ends the process without saving.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.process, self.parent = os.getpid(), os.getppid()
        self.caught: list[int] = []
        self.at_once = True

    def reason(self) -> int:
        """Return the reason to stop now: the number of a signal, PAUSE, or 0 for none."""
        if self.caught:
            return self.caught[0]
        if os.getppid() != self.parent:  # torchrun was killed and left us behind
            return signal.SIGTERM
        late = self.deadline is not None and time.monotonic() > self.deadline
        return PAUSE if late else 0

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self.process:  # a data worker: a terminal sends Ctrl-C to it too
            return
        if self.caught and number == signal.SIGINT:
            raise SystemExit(130)
        self.caught.append(number)
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.caught:
            raise Stopped(
                f"stopped by signal {self.caught[0]} before the first step",
                "run the same command again; add --resume if its folder holds a run already",
                self.caught[0],
            )

    def interruptible(self, fetch: BatchFn) -> BatchFn:
        """Return `fetch` made so that a signal ends it at once: no step is half done then.

        Images may come late, and whoever sends a signal often kills 30 seconds later.
        """

        def microbatch(step: int, shard: int) -> object:
            self.at_once = True
            try:
                self.check()
                return fetch(step, shard)
            finally:
                self.at_once = False

        return microbatch  # type: ignore[return-value]


@contextmanager
def stop_signals(max_seconds: float | None) -> Iterator[Stop]:
    """Handle the signals that stop a run, and the end of its time, during a block."""
    stop = Stop(None if max_seconds is None else time.monotonic() + max_seconds)
    before = [signal.signal(number, stop.note) for number in SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def stopped(reason: int, step: int, seconds: float, out: Path) -> UserError:
    """Return the error that ends a run which was stopped after `seconds` of saving."""
    hint = f"go on with --resume --out {out}"
    if reason == PAUSE:
        return Paused(f"the time is up; saved step {step}, in {seconds:.1f} s", hint)
    what = f"stopped by signal {reason} after saving step {step}, in {seconds:.1f} s"
    return Stopped(what, hint, reason)
