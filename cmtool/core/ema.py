"""Exponential moving averages of parameters: the target network's, and the ones that are kept.

The two are different things: the target makes the loss, a weights EMA is what is sampled from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmtool.core.precond import Preconditioned
from cmtool.core.tensors import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """Set average = decay average + (1 - decay) current, in place; decay 0 copies."""
    old, new = local(average), local(current)
    if decay == 0:
        torch._foreach_copy_(old, new)
    else:
        torch._foreach_lerp_(old, new, 1 - decay)


def frozen_copy(model: ModuleT) -> ModuleT:
    """Return a float32 copy of the model that takes no gradients, in the mode of the original."""
    twin = copy.deepcopy(model).float()
    return twin.requires_grad_(False)


class Ema:
    """A weights EMA with a fixed rate or a half-life in images, and optionally a ramp-up.

    With `rampup` r the half-life is at most r times the images seen so far, so that a short run
    forgets its random start (Karras et al. 2022 use 0.05).
    """

    def __init__(
        self,
        model: Preconditioned,
        *,
        rate: float | None = None,
        halflife_images: float | None = None,
        rampup: float | None = None,
    ) -> None:
        self.model = frozen_copy(model).eval()
        self.rate = rate
        self.halflife_images = halflife_images
        self.rampup = rampup

    def decay(self, batch: int, num_images: int) -> float:
        """Return the decay of an update; `num_images` were seen before the `batch` of this step.

        With a ramp-up the first update copies, as EDM's does.
        """
        if self.rate is not None and self.rampup is None:
            return self.rate
        halflife = self.halflife_images
        if halflife is None:
            assert self.rate is not None
            halflife = batch * math.log(0.5) / math.log(self.rate)
        if self.rampup is not None:
            halflife = min(halflife, self.rampup * num_images)
        return 0.5 ** (batch / max(halflife, 1e-8))
