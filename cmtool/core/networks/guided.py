"""A network guided by a weaker one of its kind (autoguidance, Karras et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cmtool.core.types import NO_CLASS


class Guided(nn.Module):
    """What a network says, moved away from what a weaker network of its kind says.

    F = F_guide + weight (F_main - F_guide) (Karras et al. 2024, eq. 3). F is linear in the x0 of a
    preconditioned model, so the same holds for x0. The errors that both make, the weaker one more,
    are made smaller so. If `hears_class` is False, the guide is told no class, and what a class
    changes is exaggerated too (Ho & Salimans 2022).
    """

    def __init__(
        self, main: nn.Module, guide: nn.Module, weight: float, *, hears_class: bool
    ) -> None:
        super().__init__()
        self.main = main
        self.guide = guide
        self.weight = weight
        self.hears_class = hears_class

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the two networks, each by itself."""
        self.main.compile(*args, **options)
        self.guide.compile(*args, **options)

    def forward(
        self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None, **more: Tensor
    ) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None."""
        heard = labels
        if labels is not None and not self.hears_class:
            heard = torch.full_like(labels, NO_CLASS)
        strong = self.main(x, noise_label, labels, **more)
        weak = self.guide(x, noise_label, heard, **more)
        return weak + self.weight * (strong - weak)


def main_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network; of a guided one those of the network that is guided."""
    return (network.main if isinstance(network, Guided) else network).state_dict()
