"""A training checkpoint, a folder of safetensors and JSON: from a state, and back.

It is written to a folder `.tmp-*`, which is renamed when all files are on the disk. The manifest
(sizes and hashes) is the last of them. Training waits for a copy of its tensors, not for the disk.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from cmtool import __version__
from cmtool.errors import DivergedError, InputError, ResourceError, UserError, is_full
from cmtool.formats import checkpoints
from cmtool.formats.checkpoints import MANIFEST, Score
from cmtool.formats.native import named_classes, read_weights, write_weights
from cmtool.presets.schema import Preset
from cmtool.system.dist import Group
from cmtool.system.files import file_facts, sync, write_json
from cmtool.system.parallel import fill, whole
from cmtool.system.pinned import buffers
from cmtool.system.records import read_facts
from cmtool.training.records import Counters
from cmtool.training.state import TrainState, counters, set_counters

Note = Callable[[str], None]
Files = dict[str, dict[str, Tensor]]

MAX_FAILURES = 3
MARGIN = 1.05
"""Room that a checkpoint needs on the disk, as a multiple of the bytes of its tensors."""
SLOW = 20.0
"""Seconds of a save from which a warning is due: whoever sends a signal often kills after 30."""


class Snapshot(NamedTuple):
    """A copy of a state's tensors by file, on the CPU, that training does not change."""

    step: int
    files: Files
    counters: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for tensors in self.files.values() for t in tensors.values())


def take_snapshot(state: TrainState, reuse: Snapshot | None = None) -> Snapshot:
    """Return a copy of a state, in the memory of an earlier copy where that fits.

    The copy of a sharded state is whole: the other processes call `take_part` meanwhile.
    """
    found = state_tensors(state)
    files = make_buffers(found, reuse.files if reuse else {})
    for file, tensors in found.items():
        for name, tensor in tensors.items():
            files[file][name].copy_(whole(tensor.detach()), non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Snapshot(state.step, files, counters(state))


def take_part(state: TrainState) -> None:
    """Give this process's parts of a sharded state to the leading one, which takes a snapshot."""
    for tensors in state_tensors(state).values():
        for tensor in tensors.values():
            whole(tensor.detach())


def make_buffers(like: Files, reuse: Files) -> Files:
    """Return memory for copies of tensors by file, that of earlier copies where it fits."""
    tensors = {(file, name): t for file, some in like.items() for name, t in some.items()}
    own = {(file, name): t for file, some in reuse.items() for name, t in some.items()}
    fitting = {
        key: own[key]
        for key, t in tensors.items()
        if key in own and (own[key].shape, own[key].dtype) == (t.shape, t.dtype)
    }
    new = buffers({key: t for key, t in tensors.items() if key not in fitting})
    files: Files = {file: {} for file in like}
    for file, name in tensors:
        files[file][name] = (fitting if (file, name) in fitting else new)[file, name]
    return files


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
        facts = {"format": 1, "step": snapshot.step, "files": manifest}
        write_json(temporary / MANIFEST, facts, durable=True)
        if final.exists():
            checkpoints.discard(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, safetensors.SafetensorError, ResourceError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full(error) or isinstance(error, ResourceError):
            raise no_room(final.name, "free disk space") from None
        what = f"cannot write checkpoint {final.name}: {error}"
        raise ResourceError(what, "the checkpoints before it are intact") from None
    return final


def _check_finite(snapshot: Snapshot) -> None:
    for file, tensors in snapshot.files.items():
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                what = f"{file}: {name} is not finite at step {snapshot.step}"
                raise DivergedError(what, "resume from the last checkpoint with a lower train.lr")


def make_room(folder: Path, snapshot: Snapshot, keep: int) -> None:
    """Check that the disk has room for a snapshot; if not, prune to the newest `keep` checkpoints.

    Raises ResourceError when that is not enough. A quota may still stop the writer.
    """
    needed = int(snapshot.num_bytes * MARGIN)
    folder.mkdir(parents=True, exist_ok=True)
    if _free(folder) >= needed:
        return
    checkpoints.prune(folder, keep, snapshot.step)
    free = _free(folder)
    if free < needed:
        hint = f"free disk space: it needs {needed / 1e6:,.1f} MB and has {free / 1e6:,.1f}"
        raise no_room(f"step-{snapshot.step:07d}", hint)


def _free(folder: Path) -> float:
    """Return how many bytes are free; infinity where a file system does not say its size."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return free if total else math.inf


def no_room(name: str, hint: str) -> ResourceError:
    """Return the error for a checkpoint that finds no room."""
    what = f"no room on the disk for checkpoint {name}"
    return ResourceError(what, f"{hint}; the checkpoints before it are intact")


def about_model(preset: Preset, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the header of a file of weights says of its model."""
    names = named_classes(class_names[: preset.model.num_classes])
    about = {"kind": preset.kind, "preset": preset.model_dump(mode="json"), "cmtool": __version__}
    return {**about, **names}


class Saver:
    """Writes checkpoints in a thread of its own.

    On a full disk the run goes on, and the next checkpoint is tried; MAX_FAILURES in a
    row end the run.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, keep: int, keep_best: int = 0, note: Note
    ) -> None:
        self.folder, self.about, self.note = folder, about, note
        self.keep, self.keep_best = keep, keep_best
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
        like = state_tensors(state)
        self._start(lambda: self._make_buffers(like))

    def save(self, state: TrainState, *, wait: bool, score: Score | None = None) -> None:
        """Save a state; with `wait`, return when it is on the disk, and raise if it is not.

        With a `score` it is kept as one of the best, if it is one.
        """
        self.finish(final=False)
        snapshot = self.snapshot = take_snapshot(state, self.snapshot)
        self._start(lambda: self._write(snapshot, score))
        if wait:
            self.finish(final=True)

    def would_keep(self, score: Score) -> bool:
        """Tell whether a checkpoint with this score would be kept for it."""
        self.finish(final=False)  # it may be about to write what best.json names
        return checkpoints.is_best(self.folder, score, self.keep_best)

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
        """Run `work` in a thread, for which a second Ctrl-C does not wait."""

        def run() -> None:
            try:
                work()
            except OSError as error:
                what = f"cannot write to {self.folder}: {error.strerror}"
                self.error = ResourceError(what, "check its permissions")
            except Exception as error:  # finish() raises it in the main thread
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def _make_buffers(self, like: Files) -> None:
        files = make_buffers(like, {})
        for tensors in files.values():
            for tensor in tensors.values():
                tensor.zero_()
        self.snapshot = Snapshot(-1, files, {})

    def _write(self, snapshot: Snapshot, score: Score | None) -> None:
        start = time.monotonic()
        make_room(self.folder, snapshot, self.keep)
        final = write_checkpoint(self.folder, snapshot, self.about)
        self.saved, self.failures = snapshot.step, 0
        self.seconds = time.monotonic() - start
        if self.seconds > SLOW:
            advice = "give a stopped run as long before it is killed"
            self.remarks.append(f"saving took {self.seconds:.0f} s: {advice}")
        try:
            checkpoints.verify(final)
            if score is not None:
                checkpoints.record_best(self.folder, final.name, score, self.keep_best)
            checkpoints.prune(self.folder, self.keep, snapshot.step)
            checkpoints.point_to(self.folder, final)
        except (OSError, UserError) as error:  # the checkpoint is whole without them
            self.remarks.append(f"after saving {final.name}: {error}")


def load_newest(folder: Path, state: TrainState, group: Group, note: Note) -> None:
    """Set `state` to the newest undamaged checkpoint, which the leading process finds."""
    newest, complaints = group.agreed(lambda: checkpoints.newest_checkpoint(folder), "resume")
    for complaint in complaints:
        note(f"not used: {complaint}")
    if newest is None:
        note("no checkpoint yet: starting at step 0")
    else:
        load_checkpoint(newest, state)
        note(f"resumed from {newest}")


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Set `state` to the tensors and step of a verified checkpoint. Raises InputError."""
    for name, tensors in state_tensors(state, fill_optimizer=True).items():
        stored = read_weights(path / f"{name}.safetensors")
        if name == "optimizer" and not stored:  # saved before the first step of a stage
            state.optimizer.state.clear()
            continue
        if stored.keys() != tensors.keys():
            unmatched = min(stored.keys() ^ tensors.keys())
            what = f"{path / name}.safetensors does not fit this run: {unmatched}"
            raise InputError(what, "resume with the preset the run was started with")
        with torch.no_grad():
            for key, tensor in tensors.items():
                fill(tensor, stored[key])
    set_counters(state, read_counters(path))


def read_counters(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors. Raises InputError that names the file."""
    facts = read_facts(path / "state.json", Counters)
    if facts is None or facts.step != int(path.name[5:]):
        what = f"{path / 'state.json'} is not that of {path.name}"
        raise InputError(what, "remove this checkpoint to go on from the one before it")
    return facts.model_dump()


def state_tensors(state: TrainState, *, fill_optimizer: bool = False) -> Files:
    """Return the tensors of a state by file name: model, target, one per EMA, optimizer.

    With `fill_optimizer`, an optimizer that has not stepped yet first gets the buffers that a
    checkpoint is loaded into.
    """
    files = {"model": dict(state.student.network.state_dict())}
    if state.target is not None:
        files["target"] = dict(state.target.network.state_dict())
    for name, ema in state.emas.items():
        files[f"ema-{name}" if name != "ema" else "ema"] = dict(ema.model.network.state_dict())
    if fill_optimizer and not state.optimizer.state:
        _make_moments(state)
    names: dict[Tensor, str] = {p: name for name, p in state.student.network.named_parameters()}
    if state.own is not None:
        files["method"] = dict(state.own.state_dict())
        names |= {p: f"method/{name}" for name, p in state.own.named_parameters()}
    moments = state.optimizer.state.items()
    files["optimizer"] = {f"{names[p]}.{key}": t for p, own in moments for key, t in own.items()}
    return files


def _make_moments(state: TrainState) -> None:
    """Make the optimizer create its buffers: take a step with zero gradients and rate 0."""
    groups = state.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    state.optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
