"""Inception v3 as TensorFlow released it in 2015: the feature network of FID.

Layers and names are those of NVIDIA's and OpenAI's PyTorch ports, read for facts. The batch norms
after the convolutions are folded into them, which is the same map and takes less time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.system.devices import shapes_only

SIDE = 299
WIDTH = 2048
EPS = 1e-3


@dataclass(frozen=True)
class Conv:
    """A convolution; its kernel is (height, width)."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True


Layer = Conv | Callable[[Tensor], Tensor]
Chain = tuple[Layer | tuple["Chain", ...], ...]
"""Layers in a row. A tuple among them holds branches, whose outputs are concatenated."""


mean_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
max_pool_halving = partial(F.max_pool2d, kernel_size=3, stride=2)


def _row(name: str, *convs: tuple[int, tuple[int, int]], last: int = 1) -> tuple[Conv, ...]:
    """Return numbered convolutions; the last has stride `last`, and no padding if it is above 1."""
    names = [f"{name}conv"] + [f"{name}conv_{i}" for i in range(1, len(convs))]
    *first, end = (Conv(key, *conv) for key, conv in zip(names, convs, strict=True))
    return (*first, replace(end, stride=last, padded=last == 1))


def _block_a(pooled: int) -> Chain:
    return ((
        _row("", (64, (1, 1))),
        _row("tower.", (48, (1, 1)), (64, (5, 5))),
        _row("tower_1.", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        (mean_pool, *_row("tower_2.", (pooled, (1, 1)))),
    ),)  # fmt: skip


def _block_c(c: int) -> Chain:
    wide, tall = (1, 7), (7, 1)
    return ((
        _row("", (192, (1, 1))),
        _row("tower.", (c, (1, 1)), (c, wide), (192, tall)),
        _row("tower_1.", (c, (1, 1)), (c, tall), (c, wide), (c, tall), (192, wide)),
        (mean_pool, *_row("tower_2.", (192, (1, 1)))),
    ),)  # fmt: skip


def _block_e(pool: Callable[[Tensor], Tensor]) -> Chain:
    def fork(name: str) -> tuple[Chain, ...]:
        return ((Conv(f"{name}conv", 384, (1, 3)),), (Conv(f"{name}conv_1", 384, (3, 1)),))

    return ((
        _row("", (320, (1, 1))),
        (*_row("tower_", (384, (1, 1))), fork("tower_mixed_")),
        (*_row("tower_1_", (448, (1, 1)), (384, (3, 3))), fork("tower_1_mixed_")),
        (pool, *_row("tower_2_", (192, (1, 1)))),
    ),)  # fmt: skip


BLOCK_B: Chain = ((
    _row("", (384, (3, 3)), last=2),
    _row("tower.", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), last=2),
    (max_pool_halving,),
),)  # fmt: skip
BLOCK_D: Chain = ((
    _row("tower.", (192, (1, 1)), (320, (3, 3)), last=2),
    _row("tower_1.", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), last=2),
    (max_pool_halving,),
),)  # fmt: skip
STEM: Chain = (
    Conv("conv", 32, (3, 3), 2, padded=False),
    Conv("conv_1", 32, (3, 3), padded=False),
    Conv("conv_2", 64, (3, 3)),
    max_pool_halving,
    Conv("conv_3", 80, (1, 1)),
    Conv("conv_4", 192, (3, 3), padded=False),
    max_pool_halving,
)
BLOCKS: dict[str, Chain] = {
    "mixed": _block_a(32),
    "mixed_1": _block_a(64),
    "mixed_2": _block_a(64),
    "mixed_3": BLOCK_B,
    "mixed_4": _block_c(128),
    "mixed_5": _block_c(160),
    "mixed_6": _block_c(160),
    "mixed_7": _block_c(192),
    "mixed_8": BLOCK_D,
    "mixed_9": _block_e(mean_pool),
    "mixed_10": _block_e(max_pool),
}


class Inception(nn.Module):
    """From images (B, 3, 299, 299) in [-1, 1] to the 2,048 means of the last feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict()
        channels = self._build("", STEM, 3)
        for name, block in BLOCKS.items():
            channels = self._build(f"{name}.", block, channels)

    def _build(self, prefix: str, chain: Chain, channels: int) -> int:
        """Make the convolutions of a chain; return the channels that come out."""
        for layer in chain:
            if isinstance(layer, Conv):
                width, kernel, stride = layer.channels, layer.kernel, layer.stride
                padding = (kernel[0] // 2, kernel[1] // 2) if layer.padded else 0
                conv = nn.Conv2d(channels, width, kernel, stride, padding)
                self.convs[_key(prefix, layer)], channels = conv, width
            elif isinstance(layer, tuple):
                channels = sum(self._build(prefix, branch, channels) for branch in layer)
        return channels

    def _run(self, prefix: str, chain: Chain, x: Tensor) -> Tensor:
        for layer in chain:
            if isinstance(layer, Conv):
                x = F.relu_(self.convs[_key(prefix, layer)](x))
            elif isinstance(layer, tuple):
                x = torch.cat([self._run(prefix, branch, x) for branch in layer], 1)
            else:
                x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 2048)."""
        x = self._run("", STEM, x)
        for name, block in BLOCKS.items():
            x = self._run(f"{name}.", block, x)
        return x.float().mean((2, 3))


def _key(prefix: str, layer: Conv) -> str:
    """Return the name of a convolution in a ModuleDict, which takes no dots."""
    return f"{prefix}{layer.name}".replace(".", "-")


def folded(stored: Mapping[str, Tensor]) -> Inception:
    """Return the network with the weights of a port's state dict, norms folded in.

    Raises KeyError or RuntimeError for weights of another network.
    """
    with shapes_only():
        network = Inception()
    weights: dict[str, Tensor] = {}
    for key in network.convs:
        theirs = f"layers.{key.replace('-', '.')}"
        leaves = ("weight", "beta", "mean", "var")
        weight, beta, mean, var = (stored[f"{theirs}.{leaf}"].double() for leaf in leaves)
        scale = (var + EPS).rsqrt()  # W / s and beta - mean / s, for s = sqrt(var + eps)
        weights[f"convs.{key}.weight"] = (weight * scale[:, None, None, None]).float()
        weights[f"convs.{key}.bias"] = (beta - mean * scale).float()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def tf_resized(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) at 299x299 as TensorFlow 1 resizes: pixel i is at i H / 299.

    The last bits are the port's too: a sampling grid that is shifted by half a pixel's difference.
    """
    height, width = images.shape[2:]
    theta = torch.eye(2, 3, device=images.device)
    theta[0, 2] += 1 / width - 1 / SIDE
    theta[1, 2] += 1 / height - 1 / SIDE
    size = [len(images), images.shape[1], SIDE, SIDE]
    grid = F.affine_grid(theta.expand(len(images), 2, 3), size, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def clean_resized(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) of 0 to 255 at 299x299 as Pillow resizes floats, bicubic.

    Parmar et al. (2022): antialiased where it shrinks, and not rounded. In float64, as Pillow
    computes; in float32 weights are off by up to 2e-5.
    """
    if images.shape[2:] == (SIDE, SIDE):
        return images
    resized = F.interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).float()
