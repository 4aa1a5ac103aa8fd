"""Distances d(x, y) between two images of a loss; each takes (B, C, H, W) twice and returns (B,).

The paper writes sums over pixels; its code, and so cmtool, takes means for l1 and l2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.types import Distance
from cmtool.errors import MissingError


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference."""
    return (x - y).abs().flatten(1).mean(1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference (no root)."""
    return (x - y).square().flatten(1).mean(1)


def l2_32(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of both images resized to 32x32 (bilinear)."""
    return l2(*(F.interpolate(i, (32, 32), mode="bilinear", align_corners=False) for i in (x, y)))


def linf(x: Tensor, y: Tensor) -> Tensor:
    """Return the largest absolute difference."""
    return (x - y).abs().flatten(1).amax(1)


def pseudo_huber(x: Tensor, y: Tensor, *, c: float | None = None) -> Tensor:
    """Return sqrt(|x - y|^2 + c^2) - c with the norm over the whole image.

    c is 0.00054 sqrt(D) for D values an image when None (Song & Dhariwal 2023, sec. 3.3). With
    c = 0 it is the norm, whose gradient at 0 is taken as 0 (Geng et al. 2024).
    """
    scale = 0.00054 * math.sqrt(x[0].numel()) if c is None else c
    if scale == 0:
        return torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return ((x - y).square().flatten(1).sum(1) + scale**2).sqrt() - scale


class Trunk(NamedTuple):
    """A feature network of LPIPS: torchvision's weight file, and its size."""

    file: str
    megabytes: int


TRUNKS = {
    "vgg": Trunk("vgg16-397923af.pth", 528),
    "alex": Trunk("alexnet-owt-7be5be79.pth", 233),
    "squeeze": Trunk("squeezenet1_1-b8a52dc0.pth", 5),
}


def lpips(
    x: Tensor,
    y: Tensor,
    *,
    net: Literal["vgg", "alex", "squeeze"] = "vgg",
    pooling: Literal["avg", "max"] = "avg",
    resize: Literal["below_256", "always", "never"] = "below_256",
) -> Tensor:
    """Return LPIPS (Zhang et al. 2018), in float32, of images in [-1, 1] that are not clamped.

    The PyTorch release has average pooling, and resizes to 224 (bilinear) what is below 256; the
    JAX release of the CIFAR-10 models has max pooling, and always resizes. Raises MissingError,
    naming the file and where it comes from, when the weights of the feature network are missing.
    The first call on a device loads them, which no transform of torch.func allows inside.
    """
    network = _lpips_network(net, pooling, x.device)
    if resize == "always" or (resize == "below_256" and x.shape[-1] < 256):
        x, y = (F.interpolate(i, (224, 224), mode="bilinear", align_corners=False) for i in (x, y))
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # meta has none
        return network(x.float(), y.float()).flatten()


@lru_cache
def _lpips_network(net: str, pooling: str, device: torch.device) -> nn.Module:
    """Return the lpips package's network with torchvision's weights, in eval mode."""
    trunk = TRUNKS[net]
    file = Path(torch.hub.get_dir()) / "checkpoints" / trunk.file
    remedy = (
        f"cmtool weights get lpips-{net} ({trunk.megabytes} MB from"
        f" https://download.pytorch.org/models/{trunk.file}), or take another distance:"
        " --set loss.distance=pseudo_huber"
    )
    if not file.is_file():
        raise MissingError(f"LPIPS ({net}) needs {file}, which is missing", remedy)
    try:
        stored = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # a page, a half download: torch's reader fails in many ways
        raise MissingError(f"{file} is damaged", f"delete it, then {remedy}") from None

    import lpips as package  # seconds, so only where it is used

    with warnings.catch_warnings():  # of torchvision, about how the package calls it
        warnings.filterwarnings("ignore", message=".*pretrained.*|.*weight enum.*")
        network = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({ours: stored[theirs] for ours, theirs in names.items()})
    except (KeyError, RuntimeError, TypeError):
        raise MissingError(
            f"{file} does not hold the weights of {net}", f"delete it, then {remedy}"
        ) from None
    if pooling == "avg":
        for part in network.net.children():
            for name, module in part.named_children():
                if isinstance(module, nn.MaxPool2d):
                    size, stride, ceil = module.kernel_size, module.stride, module.ceil_mode
                    part.add_module(name, nn.AvgPool2d(size, stride, ceil_mode=ceil))
    return network.eval().requires_grad_(False).to(device)


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "l1": l1,
    "l2": l2,
    "l2_32": l2_32,
    "linf": linf,
    "lpips": lpips,
    "pseudo_huber": pseudo_huber,
}

NORMS: frozenset[Distance] = frozenset({l1, linf})
"""Those that are a norm of x - y: they have a kink at x = y, where the others have a curvature."""


def is_norm(distance: Distance) -> bool:
    """Tell whether a distance, with options bound or not, is one of NORMS."""
    return (distance.func if isinstance(distance, partial) else distance) in NORMS
