"""A training checkpoint, a folder of safetensors and JSON: from a state, and back.

It is written to `.tmp-*`, every file synced, the manifest (sizes and hashes) last, and then
renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from cmtool.errors import DivergedError, InputError, ResourceError, UserError, is_full
from cmtool.formats.checkpoints import (
    MANIFEST,
    Score,
    discard,
    point_to,
    prune,
    record_best,
    verify,
)
from cmtool.formats.native import read_weights, write_weights
from cmtool.system.files import file_facts, sync, write_json
from cmtool.system.parallel import fill, whole
from cmtool.training.state import TrainState, counters, set_counters

MAX_FAILURES = 3
MARGIN = 1.05
"""Room a checkpoint needs on the disk, over the bytes of its tensors."""
SLOW = 20.0
"""Seconds of a save from which a warning is due: whoever sends a signal often kills after 30."""


class Snapshot(NamedTuple):
    """The tensors of a state by file, on the CPU, that training no longer changes."""

    step: int
    files: dict[str, dict[str, Tensor]]
    counters: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for tensors in self.files.values() for t in tensors.values())


def take_snapshot(state: TrainState, reuse: Snapshot | None = None) -> Snapshot:
    """Return a copy of a state; into the memory of an earlier one, where that fits.

    Of a sharded state it is whole; the other processes `take_part` meanwhile.
    """
    files: dict[str, dict[str, Tensor]] = {}
    on_gpu = False
    for file, tensors in state_tensors(state).items():
        files[file] = {}
        kept = reuse.files.get(file, {}) if reuse else {}
        for name, tensor in tensors.items():
            old = kept.get(name)
            fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
            buffer = old if fits and old is not None else _buffer(tensor)
            files[file][name] = buffer.copy_(whole(tensor.detach()), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    return Snapshot(state.step, files, counters(state))


def take_part(state: TrainState) -> None:
    """Give the leading process, which takes a snapshot of a sharded state, this one's parts."""
    for tensors in state_tensors(state).values():
        for tensor in tensors.values():
            whole(tensor.detach())


def _buffer(like: Tensor) -> Tensor:
    """Return memory for a copy of a tensor; page-locked for a GPU's, which copies faster then."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def save_checkpoint(folder: Path, state: TrainState, about: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNN` atomically and return it.

    Raises ResourceError when the disk is full (nothing is left behind), DivergedError rather than
    saving parameters that are not finite.
    """
    final = write_checkpoint(folder, take_snapshot(state), about)
    point_to(folder, final)
    return final


def write_checkpoint(folder: Path, snapshot: Snapshot, about: dict[str, Any]) -> Path:
    """Write a snapshot atomically as `folder/step-NNNNNNN` and return it.

    Raises DivergedError rather than saving numbers that are not finite, ResourceError when the
    disk is full or fails; then nothing is left behind.
    """
    _check_finite(snapshot)
    final = folder / f"step-{snapshot.step:07d}"
    temporary = folder / f".tmp-{snapshot.step}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for name, tensors in snapshot.files.items():
            header = {**about, "weights": name, "step": snapshot.step}
            write_weights(temporary / f"{name}.safetensors", tensors, header)
        write_json(temporary / "state.json", snapshot.counters)
        manifest = {file.name: file_facts(file) for file in sorted(temporary.iterdir())}
        for file in temporary.iterdir():
            sync(file)
        write_json(temporary / MANIFEST, {"format": 1, "step": snapshot.step, "files": manifest})
        sync(temporary / MANIFEST)
        sync(temporary)
        if final.exists():
            discard(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, safetensors.SafetensorError, ResourceError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full(error) or isinstance(error, ResourceError):
            raise _no_room(final, "free some") from None
        raise ResourceError(
            f"cannot write checkpoint {final.name}: {error}", "the checkpoints before it are intact"
        ) from None
    return final


def _no_room(final: Path, hint: str) -> ResourceError:
    return ResourceError(
        f"no room on the disk for checkpoint {final.name}",
        f"{hint}; the checkpoints before it are intact",
    )


def make_room(folder: Path, snapshot: Snapshot, keep: int) -> None:
    """See that the disk has room for a snapshot, if need be by pruning to the newest `keep`.

    Raises ResourceError when that is not enough. A quota may still surprise the writer.
    """
    needed = int(snapshot.num_bytes * MARGIN)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free >= needed:
        return
    prune(folder, keep)
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = f"free some: it needs {needed / 1e6:,.1f} MB and has {free / 1e6:,.1f}"
        raise _no_room(folder / f"step-{snapshot.step:07d}", hint)


class Saver:
    """Writes checkpoints behind training's back: a step waits for the copy only.

    A disk that is full is told of and tried again at the next checkpoint, three times in a row.
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
        self.saved = -1
        self.seconds = 0.0
        self.snapshot: Snapshot | None = None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.remarks: list[str] = []
        self.failures = 0

    def prepare(self, state: TrainState) -> None:
        """Make the memory of the copies, behind training's back: new memory is slow to touch."""
        files = state_tensors(state)
        self._start(lambda: self._make_buffers(files))

    def save(self, state: TrainState, *, wait: bool, score: Score | None = None) -> None:
        """Save a state; when `wait`, return after it is on the disk, and fail if it is not.

        With a `score` it is kept as one of the best, if it is one.
        """
        self.finish(final=False)
        snapshot = self.snapshot = take_snapshot(state, self.snapshot)
        self._start(lambda: self._write(snapshot, score))
        if wait:
            self.finish(final=True)

    def poll(self) -> None:
        """Tell, or raise, what went wrong with a write that has ended meanwhile; wait for none."""
        if self.thread is not None and not self.thread.is_alive():
            self.finish(final=False)

    def finish(self, *, final: bool) -> None:
        """Wait for a write that goes on. Raises what went wrong with it, if that is the end."""
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
        """Wait for a write that goes on, and tell what went wrong with it; what ends is ending."""
        try:
            self.finish(final=False)
        except Exception as error:  # the end has a cause of its own
            self.note(f"while saving: {error}")

    def _start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread, which a second Ctrl-C does not wait for."""
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def _make_buffers(self, like: dict[str, dict[str, Tensor]]) -> None:
        files: dict[str, dict[str, Tensor]] = {}
        try:
            for file, tensors in like.items():
                files[file] = {name: _buffer(tensor).zero_() for name, tensor in tensors.items()}
        except Exception as error:  # shown by whoever waits for this thread
            self.error = error
        self.snapshot = Snapshot(-1, files, {})

    def _write(self, snapshot: Snapshot, score: Score | None) -> None:
        start = time.monotonic()
        try:
            make_room(self.folder, snapshot, self.keep)
            final = write_checkpoint(self.folder, snapshot, self.about)
        except OSError as error:
            self.error = ResourceError(
                f"cannot write to {self.folder}: {error.strerror}", "check its rights"
            )
            return
        except Exception as error:  # shown by whoever waits for this thread
            self.error = error
            return
        self.saved, self.failures = snapshot.step, 0
        self.seconds = time.monotonic() - start
        if self.seconds > SLOW:
            self.remarks.append(
                f"saving took {self.seconds:.0f} s: see that whoever stops this run waits as long"
            )
        try:
            verify(final)
            if score is not None:
                record_best(self.folder, final.name, score, self.keep_best)
            prune(self.folder, self.keep, snapshot.step)
            point_to(self.folder, final)
        except (OSError, UserError) as error:  # the checkpoint is whole without them
            self.remarks.append(f"after saving {final.name}: {error}")


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Set `state` to the tensors and step of a verified checkpoint. Raises InputError."""
    wanted = state_tensors(state, fill_optimizer=True)
    for name, tensors in wanted.items():
        stored = read_weights(path / f"{name}.safetensors")
        if name == "optimizer" and not stored:  # saved where a stage begins, with moments forgotten
            state.optimizer.state.clear()
            continue
        if stored.keys() != tensors.keys():
            odd = sorted(stored.keys() ^ tensors.keys())[0]
            raise InputError(
                f"{path / name}.safetensors does not fit this run: {odd}",
                "resume with the preset the run was started with",
            )
        with torch.no_grad():
            for key, tensor in tensors.items():
                fill(tensor, stored[key])
    set_counters(state, json.loads((path / "state.json").read_text()))


def state_tensors(
    state: TrainState, *, fill_optimizer: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a state by file name: model, target, one per EMA, optimizer.

    With `fill_optimizer` an optimizer that has not stepped yet gets its buffers first, so that
    they can be loaded into.
    """
    files = {"model": dict(state.student.network.state_dict())}
    if state.target is not None:
        files["target"] = dict(state.target.network.state_dict())
    for name, ema in state.emas.items():
        files[f"ema-{name}" if name != "ema" else "ema"] = dict(ema.model.network.state_dict())
    if fill_optimizer and not state.optimizer.state:
        _fill_buffers(state)
    names: dict[Tensor, str] = {p: name for name, p in state.student.network.named_parameters()}
    if state.own is not None:
        files["method"] = dict(state.own.state_dict())
        names |= {p: f"method/{name}" for name, p in state.own.named_parameters()}
    files["optimizer"] = {
        f"{names[p]}.{key}": value
        for p, buffers in state.optimizer.state.items()
        for key, value in buffers.items()
    }
    return files


def _fill_buffers(state: TrainState) -> None:
    """Make the optimizer create its buffers, by a step with zero gradients and rate 0."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in state.optimizer.param_groups]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    state.optimizer.step()
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)


def _check_finite(snapshot: Snapshot) -> None:
    for file, tensors in snapshot.files.items():
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                raise DivergedError(
                    f"{file}: {name} is not finite at step {snapshot.step}",
                    "resume from the last checkpoint with a lower train.lr",
                )
