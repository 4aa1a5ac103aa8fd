"""Saving in the background: training waits for the copy of its tensors, not for the disk."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.errors import ResourceError, UserError
from cmtool.formats.checkpoints import Score, point_to, prune, record_best, verify
from cmtool.training.checkpoint import (
    Snapshot,
    make_buffer,
    no_room,
    state_tensors,
    take_snapshot,
    write_checkpoint,
)
from cmtool.training.state import TrainState

MAX_FAILURES = 3
"""Failed saves in a row that end the run."""
MARGIN = 1.05
"""Room that a checkpoint needs on the disk, as a multiple of the bytes of its tensors."""
SLOW = 20.0
"""Seconds of a save from which a warning is due: whoever sends a signal often kills after 30."""


class Saver:
    """Writes checkpoints in a thread of its own.

    On a full disk the run goes on, and the next checkpoint is tried; the third failure in a row
    ends the run.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        *,
        keep: int,
        keep_best: int = 0,
        note: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.about = about
        self.keep, self.keep_best = keep, keep_best
        self.note = note
        self.saved = -1  # the step of the last checkpoint written, and the time that it took
        self.seconds = 0.0
        self.is_prepared = False
        self.snapshot: Snapshot | None = None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.remarks: list[str] = []
        self.failures = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # a second Ctrl-C waits for nothing
            self.close()

    def prepare(self, state: TrainState) -> None:
        """Make the memory of the copies in the background: new memory is slow at first use."""
        self.is_prepared = True
        tensors = state_tensors(state)
        self._start(lambda: self._make_buffers(tensors))

    def save(self, state: TrainState, *, wait: bool, score: Score | None = None) -> None:
        """Save a state; with `wait`, return when it is on the disk, and raise if it is not.

        With a `score` it is kept as one of the best, if it is one.
        """
        self.finish(final=False)
        snapshot = self.snapshot = take_snapshot(state, self.snapshot)
        self._start(lambda: self._write(snapshot, score))
        if wait:
            self.finish(final=True)

    def poll(self) -> None:
        """Note, or raise, what went wrong with a write that has ended; wait for none."""
        if self.thread is not None and not self.thread.is_alive():
            self.finish(final=False)

    def finish(self, *, final: bool) -> None:
        """Wait for the write that goes on. Raises what went wrong with it if the run cannot go on.

        That is so for a `final` write, for the third failure in a row, and for all but a full disk.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        while self.remarks:
            self.note(self.remarks.pop(0))
        error, self.error = self.error, None
        if error is None:
            return
        self.failures += 1
        if final or self.failures >= MAX_FAILURES or not isinstance(error, ResourceError):
            raise error
        self.note(f"{error.what}: going on without it; {error.hint}")

    def close(self) -> None:
        """Wait for the write that goes on, and note what went wrong with it: the run is ending."""
        try:
            self.finish(final=False)
        except Exception as error:  # the end has a cause of its own
            self.note(f"while saving: {error}")

    def _start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread; a second Ctrl-C does not wait for it."""
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def _make_buffers(self, like: dict[str, dict[str, Tensor]]) -> None:
        files: dict[str, dict[str, Tensor]] = {}
        try:
            for file, tensors in like.items():
                files[file] = {name: make_buffer(t).zero_() for name, t in tensors.items()}
        except Exception as error:  # finish() raises it in the main thread
            self.error = error
        self.snapshot = Snapshot(-1, files, {})

    def _write(self, snapshot: Snapshot, score: Score | None) -> None:
        start = time.monotonic()
        try:
            make_room(self.folder, snapshot, self.keep)
            final = write_checkpoint(self.folder, snapshot, self.about)
        except OSError as error:
            self.error = ResourceError(
                f"cannot write to {self.folder}: {error.strerror}", "check its permissions"
            )
            return
        except Exception as error:  # finish() raises it in the main thread
            self.error = error
            return
        self.saved, self.failures = snapshot.step, 0
        self.seconds = time.monotonic() - start
        if self.seconds > SLOW:
            self.remarks.append(
                f"saving took {self.seconds:.0f} s: give a stopped run as long before it is killed"
            )
        try:
            verify(final)
            if score is not None:
                record_best(self.folder, final.name, score, self.keep_best)
            prune(self.folder, self.keep, snapshot.step)
            point_to(self.folder, final)
        except (OSError, UserError) as error:  # the checkpoint is whole without them
            self.remarks.append(f"after saving {final.name}: {error}")


def make_room(folder: Path, snapshot: Snapshot, keep: int) -> None:
    """Check that the disk has room for a snapshot; if not, prune to the newest `keep` checkpoints.

    Raises ResourceError when that is not enough. A quota may still stop the writer.
    """
    needed = int(snapshot.num_bytes * MARGIN)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free >= needed:
        return
    prune(folder, keep)
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = f"free disk space: it needs {needed / 1e6:,.1f} MB and has {free / 1e6:,.1f}"
        raise no_room(f"step-{snapshot.step:07d}", hint)
