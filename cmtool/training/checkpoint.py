"""A training checkpoint, a folder of safetensors and JSON: from a state, and back.

It is written to a folder `.tmp-*`, which is renamed when all files are on the disk. The manifest
(sizes and hashes) is the last of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from cmtool.errors import DivergedError, InputError, ResourceError, is_full
from cmtool.formats.checkpoints import MANIFEST, discard, newest_checkpoint
from cmtool.formats.native import read_weights, write_weights
from cmtool.system.dist import Group
from cmtool.system.files import file_facts, sync, write_json
from cmtool.system.parallel import fill, whole
from cmtool.training.state import TrainState, counters, set_counters


class Snapshot(NamedTuple):
    """A copy of a state's tensors by file, on the CPU, that training does not change."""

    step: int
    files: dict[str, dict[str, Tensor]]
    counters: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for tensors in self.files.values() for t in tensors.values())


def take_snapshot(state: TrainState, reuse: Snapshot | None = None) -> Snapshot:
    """Return a copy of a state, in the memory of an earlier copy where that fits.

    The copy of a sharded state is whole: the other processes call `take_part` meanwhile.
    """
    files: dict[str, dict[str, Tensor]] = {}
    on_gpu = False
    for file, tensors in state_tensors(state).items():
        files[file] = {}
        kept = reuse.files.get(file, {}) if reuse else {}
        for name, tensor in tensors.items():
            old = kept.get(name)
            fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
            buffer = old if fits and old is not None else make_buffer(tensor)
            files[file][name] = buffer.copy_(whole(tensor.detach()), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    return Snapshot(state.step, files, counters(state))


def take_part(state: TrainState) -> None:
    """Give this process's parts of a sharded state to the leading one, which takes a snapshot."""
    for tensors in state_tensors(state).values():
        for tensor in tensors.values():
            whole(tensor.detach())


def make_buffer(like: Tensor) -> Tensor:
    """Return memory for a copy of a tensor; page-locked for one on a GPU, which copies faster."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


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
            raise no_room(final.name, "free disk space") from None
        raise ResourceError(
            f"cannot write checkpoint {final.name}: {error}", "the checkpoints before it are intact"
        ) from None
    return final


def no_room(name: str, hint: str) -> ResourceError:
    """Return the error for a checkpoint that finds no room."""
    return ResourceError(
        f"no room on the disk for checkpoint {name}",
        f"{hint}; the checkpoints before it are intact",
    )


def load_newest(folder: Path, state: TrainState, group: Group, note: Callable[[str], None]) -> None:
    """Set `state` to the newest undamaged checkpoint, which the leading process finds."""
    newest, complaints = group.agreed(lambda: newest_checkpoint(folder), "resume")
    for complaint in complaints:
        note(f"not used: {complaint}")
    if newest is None:
        note("no checkpoint yet: starting at step 0")
    else:
        load_checkpoint(newest, state)
        note(f"resumed from {newest}")


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Set `state` to the tensors and step of a verified checkpoint. Raises InputError."""
    wanted = state_tensors(state, fill_optimizer=True)
    for name, tensors in wanted.items():
        stored = read_weights(path / f"{name}.safetensors")
        if (
            name == "optimizer" and not stored
        ):  # saved at the start of a stage, before its first step
            state.optimizer.state.clear()
            continue
        if stored.keys() != tensors.keys():
            unmatched = sorted(stored.keys() ^ tensors.keys())[0]
            raise InputError(
                f"{path / name}.safetensors does not fit this run: {unmatched}",
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
    files["optimizer"] = {
        f"{names[p]}.{key}": value
        for p, buffers in state.optimizer.state.items()
        for key, value in buffers.items()
    }
    return files


def _make_moments(state: TrainState) -> None:
    """Make the optimizer create its buffers: take a step with zero gradients and rate 0."""
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
