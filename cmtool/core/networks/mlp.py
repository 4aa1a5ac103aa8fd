"""A small perceptron over the channels of each pixel: for toy data of (B, C, 1, 1) points."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmtool.core.networks.layers import check_options, one_hot


@dataclass(frozen=True)
class MlpOptions:
    """What a preset may set under `model.network`."""

    width: int = 64
    depth: int = 3
    two_time: bool = False
    """The network also takes the label of the level that it jumps to: a flow map."""


class Mlp(nn.Module):
    """SiLU layers of 1x1 convolutions on [x, noise_label, one-hot class]."""

    def __init__(self, options: MlpOptions, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        check_options((channels, options.width), [1], options.depth)
        self.num_classes = num_classes
        self.two_time = options.two_time
        widths = [channels + 1 + options.two_time + num_classes, *[options.width] * options.depth]
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, kernel_size=1))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        labels: Tensor | None = None,
        *,
        label_to: Tensor | None = None,
    ) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None.

        `label_to` (B,) is the noise label of the level that a two-time network jumps to.
        """
        features = [noise_label[:, None]]
        if label_to is not None:
            features.append(label_to[:, None])
        classes = one_hot(labels, self.num_classes, x)
        if classes is not None:
            features.append(classes)
        planes = torch.cat(features, dim=1)[:, :, None, None].expand(-1, -1, *x.shape[-2:])
        out: Tensor = self.layers(torch.cat([x, planes], dim=1))
        return out
