"""Vision transformers whose class token is a feature space: DINOv2 for FD-DINOv2, and CLIP.

Layers and names are those of DINOv2's published files (Oquab et al. 2024), read for facts. CLIP's
(Radford et al. 2021) are brought to them: its image encoder is the same network but for its
activation, a norm before the blocks and a projection after them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.system.devices import shapes_only

HEAD_WIDTH = 64
OFFSET = 0.1  # DINOv2 adds it to the side of the grid when it resizes the embedding of places


class Scale(nn.Module):
    """A factor for each channel, which training starts near 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, width), scaled."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention of tokens, in heads of 64 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, width)."""
        b, n, width = x.shape
        parts = self.qkv(x).reshape(b, n, 3, width // HEAD_WIDTH, HEAD_WIDTH)  # (B, N, 3, heads, d)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        found = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(found.transpose(1, 2).reshape(b, n, width))
        return out


class Mlp(nn.Module):
    """Two linear layers; the activation is GELU, or CLIP's x s(1.702 x), s the sigmoid."""

    def __init__(self, width: int, inner: int, *, is_quick: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.is_quick = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            is_quick,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, width)."""
        x = self.fc1(x)
        x = x * (1.702 * x).sigmoid() if self.is_quick else F.gelu(x)
        out: Tensor = self.fc2(x)
        return out


class Block(nn.Module):
    """Attention, then the two layers, each after a norm and beside a shortcut."""

    def __init__(self, width: int, inner: int, eps: float, *, is_quick: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps), Attention(width), Scale(width)
        self.norm2, self.ls2 = nn.LayerNorm(width, eps), Scale(width)
        self.mlp = Mlp(width, inner, is_quick=is_quick)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, width)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class Patches(nn.Module):
    """The linear map of each patch of an image."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, side, side)


class VisionTransformer(nn.Module):
    """From images (B, 3, H, W), normalised, to the class token (B, width or less).

    Its sizes are those of the tensors of a file, by DINOv2's names.
    """

    def __init__(self, stored: Mapping[str, Tensor], eps: float, *, is_quick: bool = False) -> None:
        super().__init__()
        width, side = stored["cls_token"].shape[-1], stored["patch_embed.proj.weight"].shape[-1]
        inner = len(stored["blocks.0.mlp.fc1.weight"])
        numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in stored) if m]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(stored["pos_embed"].shape))
        self.patch_embed = Patches(width, side)
        self.norm_pre = nn.LayerNorm(width, eps) if "norm_pre.weight" in stored else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, inner, eps, is_quick=is_quick) for _ in range(max(numbers) + 1)
        )
        self.norm = nn.LayerNorm(width, eps)
        head = stored.get("head.weight")
        self.head = nn.Identity() if head is None else nn.Linear(width, len(head), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class token after the last norm, and after CLIP's projection, (B, width)."""
        x = self.patch_embed.proj(x)  # (B, width, h, w)
        places = placed(self.pos_embed, (x.shape[2], x.shape[3]))
        first = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([first, x.flatten(2).mT], 1) + places  # (B, 1 + h w, width)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


def placed(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the embedding of places (1, 1 + n^2, width) for a grid (h, w), (1, 1 + h w, width).

    DINOv2 resizes that of its 37x37 patches bicubic, without antialiasing, by the factors
    (h + 0.1) / n and (w + 0.1) / n.
    """
    side = math.isqrt(embedding.shape[1] - 1)
    if grid == (side, side):
        return embedding
    patches = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = [(n + OFFSET) / side for n in grid]
    resized = F.interpolate(patches, scale_factor=factors, mode="bicubic")
    return torch.cat([embedding[:, :1], resized.flatten(2).mT], 1)


def dinov2(stored: Mapping[str, Tensor]) -> VisionTransformer:
    """Return the network of a file of DINOv2.

    Raises LookupError, TypeError, ValueError or RuntimeError for tensors of another network.
    """
    wanted = {name: t.float() for name, t in stored.items() if name != "mask_token"}
    return _filled(wanted, 1e-6, is_quick=False)


RENAMED = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "transformer.resblocks": "blocks",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of the names in CLIP's files, and what DINOv2 calls the same."""


def clip_image(stored: Mapping[str, Tensor]) -> VisionTransformer:
    """Return the image encoder of a file of CLIP; its features are those that texts share.

    Raises LookupError, TypeError, ValueError or RuntimeError for tensors of another network.
    """
    wanted: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith("visual."):
            ours = name.removeprefix("visual.")
            for theirs, known in RENAMED.items():
                ours = ours.replace(theirs, known)
            wanted[ours] = tensor.detach().float()
    wanted["head.weight"] = wanted.pop("proj").T.contiguous()
    wanted["cls_token"] = wanted["cls_token"].reshape(1, 1, -1)
    wanted["pos_embed"] = wanted["pos_embed"][None]
    width = wanted["cls_token"].shape[-1]
    wanted["patch_embed.proj.bias"] = torch.zeros(width)  # it has none
    for name in [name for name in wanted if name.endswith("norm1.weight")]:
        for scale in ("ls1", "ls2"):
            wanted[name.replace("norm1.weight", f"{scale}.gamma")] = torch.ones(width)
    return _filled(wanted, 1e-5, is_quick=True)


def _filled(stored: dict[str, Tensor], eps: float, *, is_quick: bool) -> VisionTransformer:
    with shapes_only():
        network = VisionTransformer(stored, eps, is_quick=is_quick)
    network.load_state_dict(stored, assign=True)
    return network.eval().requires_grad_(False)
