"""What depends on the device: precision, layout of weights, memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that autocast computes in; fp32 is no autocast."""

OUT_OF_MEMORY = (
    "can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory",
    "alloc_failed", "unable to find an engine", "failed to cuda calloc",
)  # fmt: skip
"""Messages of torch when a CPU has no more memory, and of CUDA's libraries (cuBLAS, cuDNN, NCCL)
when a GPU has none for their own work; torch has no exception for them."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 5 << 19


def best_precision(device: str) -> str:
    """Return bf16 for a device that computes in it, else fp32.

    These are recent GPUs, and CPUs with AVX-512 BF16 or AMX, where a step takes half to two thirds
    of its time. On other CPUs bf16 is slower than fp32.
    """
    if device.startswith("mps"):
        return "fp32"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Return a block in which convolutions and matrix products run in fp32, bf16 or fp16."""
    return torch.autocast(device_type, HALF.get(precision), enabled=precision in HALF)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build networks of shapes without numbers inside the block: on the meta device."""
    with _NoDrawing(), torch.device("meta"):
        yield


class _NoDrawing(TorchFunctionMode):
    """Leaves out random numbers; on the meta device they would import torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or return its tensor as it is."""
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions of a GPU in float32 inside the block, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def timed_convolutions(device: str, *, wanted: bool = True) -> Iterator[None]:
    """Let a GPU try its convolutions at each new shape inside the block, and take the fastest.

    The choice may differ from run to run, and the last bits with it. Without `wanted`, and on
    another device, nothing is changed.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (wanted and device.startswith("cuda"))
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def on_device(module: ModuleT, device: str) -> ModuleT:
    """Return the module on a device; on a GPU in channels_last, the layout of the images there.

    On a CPU the weights stay as they are, mapped from their file if they were, and from then on
    freed memory is kept.
    """
    if device == "cpu":
        keep_freed_memory()
        return module
    return module.to(device).to(memory_format=torch.channels_last)


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory of this process for later use.

    By default glibc gives it back to the system, which clears each page before it is used again:
    that takes a fifth of a sampler's time. Tensors above 2.5 MiB are still given back, because
    glibc seldom reuses their place, and the heap would grow by hundreds of MiB. Another C library
    is left as it is.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, KEPT_BYTES)
        set_option(M_TRIM_THRESHOLD, 1 << 30)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def free_memory(device: str) -> int | None:
    """Return the bytes that this process may still take on a device; None where nobody says it.

    Of main memory that is what the system has, and no more than a container is allowed (cgroup 2).
    """
    if device.startswith("cuda"):
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        system = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        return None
    return int(min(system, _left_of_cgroup(Path("/sys/fs/cgroup"))))


def _left_of_cgroup(folder: Path) -> float:
    """Return the bytes that a container may still take; its cache of files can be given back."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        table = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(table["inactive_file"]) + int(table["active_file"])
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return float("inf")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device, or the machine, has no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
