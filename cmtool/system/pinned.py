"""Main memory for copies of tensors: page-locked for those on a GPU, which then copies faster."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

ALIGNED = 64
"""Bytes at whose multiples tensors begin."""
PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as page-locked for every GPU."""
K = TypeVar("K")


class Locked(mmap.mmap):
    """Memory of its own that is page-locked until nobody has it any more; plain memory if not."""

    address = 0
    """Where it lies, if it is locked."""

    def __del__(self) -> None:
        """Unlock it, before it goes back to the system."""
        if self.address:
            with suppress(Exception):  # Python ends, and torch has gone before
                torch.cuda.cudart().cudaHostUnregister(self.address)


def buffers(like: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Return memory on the CPU for a copy of each tensor.

    That for tensors on a GPU is one piece, page-locked as a whole: torch would round each tensor up
    to a power of two. Where no memory can be locked it is plain, and copies take longer.
    """
    places, total = dict[K, int](), 0
    for key, tensor in like.items():
        if is_on_gpu(tensor):
            places[key] = total
            total += -(-tensor.nbytes // ALIGNED) * ALIGNED
    flat = locked_bytes(total, next(like[key].device for key in places)) if total else None
    found = dict[K, Tensor]()
    for key, t in like.items():
        if key in places and flat is not None and t.nbytes:
            part = flat[places[key] : places[key] + t.nbytes]
            found[key] = part.view(t.dtype).view(t.shape)
        else:
            found[key] = torch.empty(t.shape, dtype=t.dtype)
    return found


def is_on_gpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is on a GPU that copies faster into page-locked memory."""
    return tensor.is_cuda


def locked_bytes(size: int, device: torch.device) -> Tensor:
    """Return `size` bytes (size,) uint8, page-locked if that can be had."""
    memory = Locked(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if lock(flat.data_ptr(), size, device):
        memory.address = flat.data_ptr()
    return flat


def lock(address: int, size: int, device: torch.device) -> bool:
    """Page-lock memory; tell whether it could be done.

    The device is named because a thread begins with the first one as its own.
    """
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)) == 0:
            return True
        with suppress(RuntimeError):  # the next launch is told of the error, and ends it
            torch.zeros(1, device=device)
    return False
