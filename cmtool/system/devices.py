"""What is chosen by the device: the precision of the networks, and the layout of their weights."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast makes of a precision; fp32 is no autocast."""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")
"""What torch says, without an exception of its own, when a CPU has no more memory."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 5 << 19


def best_precision(device: str) -> str:
    """Return bf16 on what computes in it, else fp32: recent GPUs, CPUs with AVX-512 BF16 or AMX.

    On such a CPU a step takes half to two thirds of its time; on others bf16 is slower than fp32.
    """
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Return a block in which convolutions and matrix products run in fp32, bf16 or fp16."""
    return torch.autocast(device_type, HALF.get(precision), enabled=precision in HALF)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions of a GPU in float32 inside the block; TF32 is the default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def on_device(module: ModuleT, device: str) -> ModuleT:
    """Return the module on a device; on a GPU its weights in channels_last, as the images are.

    On a CPU convolutions take weights as they are, and weights that are mapped from a file stay
    there; memory that is freed is kept from then on.
    """
    if device == "cpu":
        keep_freed_memory()
        return module
    return module.to(device).to(memory_format=torch.channels_last)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what comes next; it does so for this process.

    By default glibc gives it back to the system, which has to clear each page before it hands it
    out again: a fifth of a sampler's time. Tensors above 2.5 MiB are given back all the same: glibc
    seldom finds the hole of one for the next, and the heap would grow by hundreds of MiB. With
    another C library nothing is changed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, KEPT_BYTES)
        set_option(M_TRIM_THRESHOLD, 1 << 30)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device, or the machine, has no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
