"""Building blocks of the U-Nets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, in x's dtype."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def zero_init(module: nn.Conv2d) -> nn.Conv2d:
    """Return the module with its weights and bias set to zero: a block that starts as identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def sinusoidal_embedding(label: Tensor, dim: int) -> Tensor:
    """Return [cos, sin] of label times 10000^(-i / (dim // 2)): (B,) -> (B, dim).

    The convention of the ADM U-Net: no end point, cosines first, a zero column when dim is odd.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=label.device) * (-math.log(10000) / half)
    ).to(label.dtype)
    angles = label[:, None] * frequencies[None]  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for (B, heads, tokens, d).

    On a CPU two batched products beat the fused kernel up to about 1,000 tokens; elsewhere the
    fused kernel is used.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = logits.float().softmax(-1) if logits.dtype == torch.bfloat16 else logits.softmax(-1)
    return weights.to(v.dtype) @ v
