"""What training costs before it begins: the memory of a step, and its seconds."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.networks import NETWORKS
from cmtool.core.paths import PathPoints
from cmtool.errors import ResourceError, UserError
from cmtool.models import Model
from cmtool.presets.build import can_recompute
from cmtool.presets.schema import Preset
from cmtool.system.devices import HALF, free_memory
from cmtool.system.dist import Group
from cmtool.training.laps import short_laps
from cmtool.training.state import recompute_activations
from cmtool.training.utilisation import ShapesOfStep, shapes_of_step

MOMENTS = 2
"""Tensors that an optimizer keeps for each parameter."""
PROBE = 16
"""Images of a step that is timed."""
GIB = 1 << 30


class Memory(NamedTuple):
    """Bytes that training takes: of the networks, and of each image of a microbatch."""

    networks: int
    image: int

    def of(self, images: int) -> int:
        """Return the bytes with so many images in a microbatch."""
        return self.networks + self.image * images


def step_memory(preset: Preset, teacher: Model | None, device: str) -> Memory | None:
    """Return the memory of a training step, at least; None if it cannot be told.

    Networks are weights, gradients, moments, averages, target and teacher, in float32. An image's
    are the tensors that the forward pass keeps for the backward pass, found on the meta device; on
    a CPU the norm keeps less of them.
    """
    try:
        step = shapes_of_step(preset, teacher)
        if preset.train.checkpoint_activations:
            recompute_activations(step.student.network, preset.model.network.name)
        kept = _kept_for_backward(step, preset.model.network.name)
    except UserError:
        raise
    except Exception:  # a network that the meta device cannot run is trained all the same
        return None
    size = sum(p.numel() * p.element_size() for p in step.student.parameters())
    copies = 2 + MOMENTS + len(preset.train.ema) + (step.models.target is not step.student)
    each = 6 if device.startswith("cuda") and preset.train.precision in HALF else 4
    frozen = sum(p.numel() * each for p in step.teacher.parameters()) if step.teacher else 0
    kept = kept * 2 // 3 if device == "cpu" else kept
    return Memory(copies * size + frozen, kept // 2 if preset.train.precision in HALF else kept)


def _kept_for_backward(step: ShapesOfStep, name: str) -> int:
    """Return the bytes that the forward pass of one image keeps, each tensor counted once."""
    own = {p.untyped_storage()._cdata for p in step.student.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its place is not taken by another
        return tensor

    def keep_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(given[0])  # of a block that is computed again it is all that is kept

    blocks = NETWORKS[name].blocks
    for block in (part for part in step.student.modules() if isinstance(part, blocks)):
        block.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.loss()
    return sum(storage.nbytes() for storage in kept.values())


def fitting_parts(preset: Preset, memory: Memory, room: int, processes: int = 1) -> int | None:
    """Return the smallest train.accumulate with which a step fits into `room` bytes, or None."""
    images = preset.train.batch // processes
    parts = (n for n in range(1, images + 1) if images % n == 0)
    return next((n for n in parts if memory.of(images // n) <= room), None)


def check_memory(preset: Preset, teacher: Model | None, device: str, group: Group) -> None:
    """Raise ResourceError for a run that needs more memory than is free, with the way out.

    Where free memory is not known, and for models that are sharded, nothing is checked.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device == "cpu" else 1
    free = free_memory(device)
    memory = step_memory(preset, teacher, device)
    if free is None or memory is None or group.mesh is not None:
        return
    room = free // here
    room -= check_bank(preset, room, device, group.world_size)
    images = preset.train.batch // (preset.train.accumulate * group.world_size)
    if memory.of(images) <= room:
        return
    need, have = memory.of(images) / GIB, room / GIB
    what = f"training needs about {need:.1f} GiB of memory, and {have:.1f} GiB are free on {device}"
    parts = fitting_parts(preset, memory, room, group.world_size)
    if parts is not None:
        raise ResourceError(what, f"split the batch: --accumulate {parts}")
    hint = "take a smaller network, such as --set model.network.model_channels=32"
    may_recompute = can_recompute(preset) and not preset.train.checkpoint_activations
    if memory.networks < room and may_recompute:
        most = preset.train.batch // group.world_size
        hint = f"--set train.checkpoint_activations=true --accumulate {most}"
    raise ResourceError(what, hint)


def check_bank(preset: Preset, room: int, device: str, processes: int) -> int:
    """Return the bytes of the paths that a process keeps, 0 for a method that keeps none.

    Raises ResourceError if they take more than half of the room, in bytes.
    """
    if preset.loss.source.name != "paths":
        return 0
    given = {"points": PathPoints.points, "mixed": PathPoints.mixed, **preset.loss.source.options}
    paths = preset.train.batch // processes * given["mixed"]
    size = 4 * preset.model.channels * math.prod(preset.model.image_size)
    need = paths * (given["points"] + 1) * size
    if need <= room // 2:
        return need
    what = f"{paths:,} paths of the teacher need {need / GIB:.1f} GiB of memory"
    hint = f"--set train.batch={max(preset.train.batch // 2, 1)}"
    if given["mixed"] > 1:
        hint = "mix the paths of fewer batches: --set loss.source.mixed=1"
    raise ResourceError(f"{what}, and {room / GIB:.1f} GiB are free on {device}", hint)


def seconds_a_step(preset: Preset, teacher: Model | None, device: str) -> float:
    """Return the seconds that a step takes on a device, from three short ones.

    They take PROBE images each; a step of more takes as many times longer, but for its update.
    """
    images = min(preset.train.batch, PROBE)
    found = list(itertools.islice(short_laps(preset, teacher, device, images), 3))
    return min(lap.of(preset.train.batch / images).whole for lap in found[1:])


def step_times(preset: Preset, teacher: Model | None, device: str, images: int) -> Iterator[float]:
    """Yield the seconds of one step after another, of so many random images; the first is slow."""
    yield from (lap.whole for lap in short_laps(preset, teacher, device, images))
