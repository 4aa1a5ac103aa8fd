"""What ends a run before its last step: a signal, the end of its time, a failure."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from cmtool.core.paths import Draw
from cmtool.data.drawing import png_bytes
from cmtool.errors import Paused, ResourceError, Stopped, UserError
from cmtool.formats.native import write_weights
from cmtool.presets.build import can_recompute
from cmtool.system import dist
from cmtool.system.determinism import refused
from cmtool.system.devices import is_out_of_memory
from cmtool.system.files import write_atomic, write_json
from cmtool.system.portable import is_nohup, signals
from cmtool.training.fit import Diverged
from cmtool.training.plots import picture
from cmtool.training.start import Run

PAUSE = 1000
"""A reason to stop that is not a signal: the time is up."""


class Stop:
    """Knows whether to stop: a signal has come, the time is up, or torchrun is gone.

    A signal is noted, and the run stops after the step. While `at_once`, before the first step or
    between two steps, the signal raises Stopped. A second Ctrl-C ends the process without saving.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.process = os.getpid()
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.caught: list[int] = []
        self.at_once = True

    def reason(self) -> int:
        """Return the reason to stop now: the number of a signal, PAUSE, or 0 for none."""
        if self.caught:
            return self.caught[0]
        if self.torchrun not in (None, os.getppid()):  # it was killed and left us behind
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
            what = f"stopped by signal {self.caught[0]} before the first step"
            hint = "run the same command again; add --resume if its folder holds a run already"
            raise Stopped(what, hint, self.caught[0])

    def interruptible(self, fetch: Draw) -> Draw:
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
    handled = [number for number in signals() if not is_nohup(number)]
    before = [signal.signal(number, stop.note) for number in handled]
    try:
        yield stop
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)


def stopped(reason: int, step: int, seconds: float, out: Path) -> UserError:
    """Return the error that ends a run which was stopped after `seconds` of saving."""
    hint = f"go on with --resume --out {out}"
    if reason == PAUSE:
        return Paused(f"the time is up; saved step {step}, in {seconds:.1f} s", hint)
    what = f"stopped by signal {reason} after saving step {step}, in {seconds:.1f} s"
    return Stopped(what, hint, reason)


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Where torch's error means no more memory, or a lost process, raise one that says so.

    So for an operation that train.deterministic forbids.
    """
    with dist.contact(run.group, lambda: run.state.step):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and (refusal := refused(error)):
                raise refusal from None
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, run) from None


def out_of_memory(error: Exception, run: Run) -> ResourceError:
    """Return the error to show for one that means there is no more memory."""
    t, group = run.preset.train, run.group
    may_recompute = can_recompute(run.preset) and not t.checkpoint_activations
    parts = range(t.accumulate + 1, t.batch + 1)
    more = next((n for n in parts if t.batch % (n * group.world_size) == 0), None)
    remedies = [
        f"split the batch: --accumulate {more}" if more is not None else "lower train.batch",
        *(["--set train.checkpoint_activations=true"] if may_recompute else []),
        *(["--set run.sharding=fsdp"] if group.world_size > 1 and group.mesh is None else []),
    ]
    reason = str(error).splitlines()[0] if str(error) else "MemoryError"
    step, images = run.state.step, t.batch // t.accumulate // group.world_size
    what = f"out of memory after step {step}, with {images} images at a time: {reason[:200]}"
    return ResourceError(what, f"{', or '.join(remedies)}; the last checkpoint is intact")


def with_dump(error: Diverged, run: Run) -> Diverged:
    """Return the error after writing down the batch it happened with; its hint says where."""
    try:
        folder = write_failure(error, run)
    except (OSError, ResourceError, SafetensorError) as reason:
        error.hint += f"; the batch of this step cannot be written: {reason}"
    else:
        error.hint += f", and the batch of this step is in {folder}"
    return error


def write_failure(error: Diverged, run: Run) -> Path:
    """Write the batch of the step at which a run diverged, and return its folder.

    fault.json says what was not finite and gives the key (seed, step, shard) of each microbatch's
    randomness, batch.safetensors has x0, labels, sigma and loss, images.png shows x0. Each process
    but the leading one has a folder within the folder.
    """
    info, batch = error.info, error.batch
    folder = run.out / "failed" / f"step-{info.step:07d}"
    if not run.group.leads:
        folder = folder / f"rank-{run.group.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x0": batch.x0, "sigma": batch.sigma, "loss": batch.loss}
    tensors |= {} if batch.labels is None else {"labels": batch.labels}
    write_weights(folder / "batch.safetensors", tensors, {"step": info.step})
    write_atomic(folder / "images.png", png_bytes(picture(batch.x0.cpu(), 16)))
    train = run.preset.train
    keys = [[train.seed, info.step - 1, shard] for shard in batch.shards]
    facts = {"error": error.what, "step": info.step, "keys": keys, "precision": train.precision}
    write_json(folder / "fault.json", {**facts, "lr": info.lr, "n": info.n, "mu": info.mu})
    return folder
