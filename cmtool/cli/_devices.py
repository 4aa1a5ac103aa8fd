"""Where a command computes: the device of this process, the precision, and torch itself."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cmtool.cli._output import processes
from cmtool.errors import ResourceError, UserError, nearest


@contextmanager
def importing_torch() -> Iterator[None]:
    """Rest the garbage collector while the block imports torch, which takes a fifth less time.

    What is imported stays until the process ends, so the collector skips it from then on. Does
    nothing if torch is imported already.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def pick_device(name: str) -> str:
    """Return the device to use; each process on a machine gets a GPU of its own.

    Raises UserError for a device that is missing or that cannot serve all processes, ResourceError
    for too few GPUs. Only the first process of each machine reports it.
    """
    with importing_torch():
        import torch
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    has_mps = torch.backends.mps.is_available()
    is_given = num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    try:
        chosen = own_device(name, num_gpus, local_rank, local_size, has_mps, is_given=is_given)
        _check_device(chosen)
    except UserError as error:
        error.rank = processes()[0] if local_rank == 0 else None
        raise
    return chosen


def own_device(
    name: str,
    num_gpus: int,
    local_rank: int,
    local_size: int,
    has_mps: bool = False,
    *,
    is_given: bool = False,
) -> str:
    """Return the device that --device means for one of `local_size` processes on a machine.

    `is_given` says that this process sees one GPU because its launcher chose it, as Slurm does
    with --gpus-per-task=1: then it is taken, and processes that got the same one find that out
    when they join. Raises UserError for one GPU named for several processes, ResourceError for too
    few GPUs.
    """
    if name == "auto":
        name = "cuda" if num_gpus else "mps" if has_mps and local_size == 1 else "cpu"
    if local_size == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        hint = "give cuda: each process takes its own GPU"
        raise UserError(f"--device {name} for {local_size} processes", hint)
    if is_given:
        return "cuda:0"
    if local_size > num_gpus:
        fewer = f"torchrun --nproc-per-node {num_gpus}, and --accumulate to keep the batch"
        hint = fewer if num_gpus else "use --device cpu"
        raise ResourceError(f"{local_size} processes on a machine with {num_gpus} GPUs", hint)
    return f"cuda:{local_rank}"


def _check_device(name: str) -> None:
    """Check that a device works, and make a GPU this process's own. Raises UserError."""
    import torch

    hint = "use auto, cpu, or a device torch sees"
    try:
        kind = torch.empty(0, device=name).device.type
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # NCCL uses it too
    except (RuntimeError, AssertionError) as error:
        what = f"device {name!r}: {str(error).splitlines()[0]}"
        raise UserError(what, hint) from None
    if kind == "meta":
        raise UserError(f"device {name!r} computes nothing", hint)


def pick_precision(name: str, device: str) -> str:
    """Return the precision of --precision on a device. Raises UserError."""
    from cmtool.system.devices import HALF, best_precision

    if name == "auto":
        return best_precision(device)
    if name not in ("fp32", *HALF):
        raise UserError(f"unknown --precision {name!r}", nearest(name, ["auto", "fp32", *HALF]))
    return name
