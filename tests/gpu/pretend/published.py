"""Steps of published configurations on the pretended card: launches, memory, bytes and time.

The bytes are those of the tensors that each operation reads and writes, which a kernel that reads
twice exceeds. The time is a model of an H100: each operation takes what its bytes take at 2.7 TB/s
or its arithmetic at a share of 790 TFLOP/s (bf16), whichever is longer; and no step is shorter than
its launches on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.gpu.pretend.card import Counted, counting
from tests.gpu.pretend.training import Training, peak_memory, training

BF16 = "train.precision=bf16"
CONFIGURATIONS = {
    "imagenet64-cd": ["imagenet64-cd-l2", "train.batch=32", BF16],
    "cifar10-cd": ["cifar10-cd-l2", "train.batch=128", BF16],
    "emoji-cmt": ["emoji-cmt", BF16],
}
"""Presets, with a batch that one card has."""
FIRST = 2
"""Steps before the one that counts: the optimizer's moments, the allocator's blocks, paths."""
BYTES_A_SECOND = 2.7e12
FLOPS_A_SECOND = 0.6 * 790e12
HOST_SECONDS_A_LAUNCH = 11e-6
"""Of eager PyTorch, over all that a step launches."""
VIEWS = {"detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided"}


class Figures(NamedTuple):
    """A step: what it launches, moves and computes, and what that takes."""

    launches: int
    waits: int
    peak_gib: float
    moved_gb: float
    tflop: float
    card_ms: float
    host_ms: float

    @property
    def step_ms(self) -> float:
        """The longer of the two: the host runs ahead of the card, or the card waits for it."""
        return max(self.card_ms, self.host_ms)


class Moved(TorchDispatchMode):
    """Adds up the bytes of tensors that operations read and write, and their modelled seconds."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code stays compiled under this mode."""
        return True

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.flops = flops
        self.bytes = 0
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it unless it is a view."""
        before = self.flops.get_total_flops()
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if func.is_view or name in VIEWS:
            return result
        read = tree_leaves((args, kwargs))
        changed = tree_leaves(
            [t for t, a in zip(args, func._schema.arguments, strict=False) if is_written(a)]
        )
        written = tree_leaves(result) if func._schema.returns else changed
        moved = bytes_of(read) + bytes_of(written)
        computed = self.flops.get_total_flops() - before
        self.bytes += moved
        self.seconds += max(moved / BYTES_A_SECOND, computed / FLOPS_A_SECOND)
        return result


def is_written(argument: Any) -> bool:
    """Tell whether an operation changes an argument in place."""
    return argument.alias_info is not None and argument.alias_info.is_write


def bytes_of(leaves: list[Any]) -> int:
    """Return the bytes of the tensors on the card among arguments or results."""
    return sum(t.numel() * t.element_size() for t in leaves if torch.is_tensor(t) and t.is_cuda)


def measured(made: Training) -> tuple[Counted, float]:
    """Return what a later step of a training did, and its most memory in GiB."""
    for _ in range(FIRST):
        next(made.steps)
    with counting() as counted, peak_memory() as peak:
        next(made.steps)
    return counted, peak[0] / 2**30


def figures(name: str) -> Figures:
    """Return the figures of a configuration."""
    made = training(*CONFIGURATIONS[name])
    counted, peak_gib = measured(made)
    with FlopCounterMode(display=False) as flops, Moved(flops) as moved:
        next(made.steps)
    return Figures(
        counted.launches, len(counted.waits), round(peak_gib, 2),
        round(moved.bytes / 1e9, 1), round(flops.get_total_flops() / 1e12, 2),
        round(moved.seconds * 1e3, 1), round(counted.launches * HOST_SECONDS_A_LAUNCH * 1e3, 1),
    )  # fmt: skip
