"""Two networks of one kind, each for its own noise levels (TCM, Lee et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cmtool.core.rng import same_dropout


class Truncated(nn.Module):
    """A frozen network for the levels below a transition, one that learns for all others.

    `label` is the noise label of the transition, and labels grow with the level. A batch with
    levels on both sides goes whole through both networks, with the same dropout masks; any other
    goes through one. On a GPU each batch goes through both in training: to ask on which side its
    levels lie, the host would wait for the device in every pass.
    """

    def __init__(self, below: nn.Module, above: nn.Module, label: float) -> None:
        super().__init__()
        self.below = below.requires_grad_(False)
        self.above = above
        self.label = label

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the two networks, each by itself: the masks they share are kept between them."""
        self.below.compile(*args, **options)
        self.above.compile(*args, **options)

    def forward(
        self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None, **more: Tensor
    ) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None."""
        is_below = noise_label < self.label
        if not (self.training and x.is_cuda):
            if not is_below.any():
                return self.above(x, noise_label, labels, **more)
            if is_below.all():
                return self.below(x, noise_label, labels, **more)
        with same_dropout() as replay:
            above = self.above(x, noise_label, labels, **more)
            replay()
            below = self.below(x, noise_label, labels, **more)
        return torch.where(is_below[:, None, None, None], below, above)
