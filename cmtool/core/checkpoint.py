"""Training checkpoints: a folder of safetensors and JSON that exists whole or not at all.

A checkpoint is written to `.tmp-*`, every file synced, the manifest (sizes and hashes) last, and
then renamed. A folder without a complete manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from cmtool.core.dist import fill, whole
from cmtool.core.formats.native import read_table, read_weights, write_weights
from cmtool.core.trainer import TrainState, counters, set_counters
from cmtool.errors import DivergedError, InputError, ResourceError, UserError, is_full

MANIFEST = "manifest.json"
BEST = "best.json"
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
            _sync(file)
        write_json(temporary / MANIFEST, {"format": 1, "step": snapshot.step, "files": manifest})
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():
            discard(final)
        temporary.rename(final)
        _sync(folder)
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


def point_to(folder: Path, final: Path) -> None:
    """Name the newest checkpoint in latest.json, for people and scripts; resuming looks itself."""
    write_json(folder / "latest.json", {"checkpoint": final.name}, durable=True)


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
    """Set `state` to a checkpoint's tensors and step. Raises InputError when it is damaged."""
    verify(path)
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


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders step-N under `folder`, by N."""
    found = [
        p for p in folder.glob("step-*") if p.is_dir() and re.fullmatch("[0-9]{1,18}", p.name[5:])
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and why newer ones were passed over."""
    complaints = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except InputError as error:
            complaints.append(error.what)
            continue
        return path, complaints
    return None, complaints


def verify(path: Path) -> None:
    """Raise InputError unless every file of the checkpoint has the size and hash it was given."""
    try:
        manifest = dict(read_table(path / MANIFEST)["files"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{path} is not a whole checkpoint: no manifest", "use another") from None
    for name, facts in manifest.items():
        file = path / name
        if not file.is_file() or file_facts(file) != facts:
            raise InputError(f"{file} is damaged", "use the checkpoint before it")


class Score(NamedTuple):
    """A checkpoint's value by some metric over `num` images; the lower the better."""

    metric: str
    num: int
    value: float


def record_best(folder: Path, name: str, score: Score, keep: int) -> None:
    """Put a checkpoint's score into best.json, if it is one of the best `keep`."""
    ranked = {**best(folder, score), name: score.value}
    if not math.isfinite(score.value):
        del ranked[name]
    kept = dict(sorted(ranked.items(), key=lambda item: (item[1], item[0]))[:keep])
    facts = {"metric": score.metric, "num": score.num, "checkpoint": next(iter(kept), None)}
    write_json(folder / BEST, {**facts, "best": kept}, durable=True)


def is_best(folder: Path, score: Score, keep: int) -> bool:
    """Tell whether a score is better than one of the best `keep` checkpoints that are there."""
    if not keep or not math.isfinite(score.value):
        return False
    values = sorted(best(folder, score).values())
    return len(values) < keep or score.value < values[keep - 1]


def best(folder: Path, like: Score | None = None) -> dict[str, float]:
    """Return the checkpoints that best.json names, and their values.

    Those only that are there, and by the metric and number of images of `like`, if given.
    """
    try:
        facts = read_table(folder / BEST)
        found = {str(name): float(value) for name, value in facts["best"].items()}
        other = like and (facts["metric"], facts["num"]) != (like.metric, like.num)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {} if other else {n: v for n, v in found.items() if (folder / n / MANIFEST).is_file()}


def prune(folder: Path, keep: int, newest: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best ones.

    Those after step `newest` do not count and stay: a resumed run passed them over as damaged.
    """
    found = checkpoints(folder)
    if newest is not None:
        found = [path for path in found if int(path.name[5:]) <= newest]
    spared = best(folder)
    for old in found[:-keep]:
        if old.name not in spared:
            discard(old)


def prune_all(folder: Path) -> None:
    """Remove every checkpoint of a run that is to be overwritten."""
    for old in checkpoints(folder):
        discard(old)
    for name in ("latest.json", BEST):
        (folder / name).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a checkpoint, which is no longer one from the first moment on."""
    doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_temporary(folder: Path) -> None:
    """Remove half-written checkpoints; call it only while holding the run's lock."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


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


def file_facts(file: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Write JSON by way of a temporary file, so that a reader never sees half of it."""
    text = json.dumps(content, indent=1, sort_keys=True)
    write_atomic(path, text.encode() + b"\n", durable=durable)


def write_atomic(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file by way of a temporary one beside it.

    A killed process leaves the old file or the new one; a `durable` file, at the price of waiting
    for the disk, is the new one after a power cut too. Raises InputError for a special file,
    ResourceError when the disk is full.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file", "give another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_full(error):
            raise ResourceError(f"no room on the disk for {path}", "free some") from None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
