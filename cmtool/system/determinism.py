"""Computing on a GPU so that the same work gives the same bits; on a CPU it does by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from cmtool.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Settings of cuBLAS's work space with which its sums have one order."""
SIGN = "does not have a deterministic implementation"
"""What torch says of an operation that cannot be had so."""


@contextmanager
def deterministic(device: str, *, wanted: bool) -> Iterator[None]:
    """Compute the same bits each time inside the block, if that is wanted; on a GPU it costs time.

    cuDNN and cuBLAS take algorithms whose sums have one order, chosen by the shapes alone, and
    torch refuses operations that have none. What was set before is put back after the block.
    Raises UserError where cuBLAS is at work already, which asks only once, and for an Apple GPU.
    """
    kind = torch.device(device).type
    if not wanted or kind == "cpu":
        yield
        return
    if kind != "cuda":
        hint = "take --device cpu, where every run is, or leave train.deterministic out"
        raise UserError(f"train.deterministic on {device}", hint)
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory)
    mode, space = torch.get_deterministic_debug_mode(), os.environ.get(WORKSPACE)
    try:
        if space not in FIXED:
            os.environ[WORKSPACE] = FIXED[0]
        cudnn.benchmark, cudnn.deterministic = False, True
        memory.fill_uninitialized_memory = False  # ours is never read before it is written
        torch.use_deterministic_algorithms(True)
        check_product(device)
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = before
        torch.set_deterministic_debug_mode(mode)
        if space is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = space


def check_product(device: str) -> None:
    """Raise UserError if torch refuses a matrix product: cuBLAS began before it was told."""
    a = torch.ones(2, 2, device=device)
    try:
        a @ a
    except RuntimeError as error:
        if WORKSPACE not in str(error):
            raise
        what = "train.deterministic in a process that has used the GPU already"
        raise UserError(what, f"begin the process with {WORKSPACE}={FIXED[0]}") from None


def refused(error: RuntimeError) -> UserError | None:
    """Return the error to show if torch's means an operation that has no one order of its sums."""
    if SIGN not in str(error):
        return None
    name = str(error).split(SIGN)[0].strip()
    what = f"train.deterministic: {name} cannot be computed so on this device"
    return UserError(what, "--set train.deterministic=false")
