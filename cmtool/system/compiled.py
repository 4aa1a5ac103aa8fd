"""Models that torch.compile may have made faster, and how they are evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module, or a part of it, was compiled in place."""
    return any(part._compiled_call_impl is not None for part in module.modules())


@contextmanager
def evaluating(f: nn.Module) -> Iterator[None]:
    """Put a model that is being trained into eval mode inside the block.

    If it is compiled, it and all others run as they are written: for the other mode, and batches of
    other sizes, each would be compiled once more.
    """
    before = f.training
    f.eval()
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled(f) else nullcontext():
            yield
    finally:
        f.train(before)
