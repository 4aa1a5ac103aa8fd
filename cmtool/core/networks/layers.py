"""Building blocks of the U-Nets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmtool.core.networks.cpu.attention import attend
from cmtool.core.networks.cpu.normalise import is_channels_last, normalised
from cmtool.core.networks.cuda.normalise import by_steps, group_norm, plus, takes
from cmtool.core.types import NO_CLASS
from cmtool.errors import InputError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

MAX_BLOCKS = 64


def checkpointed(
    inside: Callable[..., Tensor], x: Tensor, emb: Tensor | None, recompute: bool
) -> Tensor:
    """Return inside(x, emb); `recompute` computes its steps again for the backward pass.

    Dropout then draws the same masks a second time: the state of the generators is kept.
    """
    if not (recompute and torch.is_grad_enabled()):
        return inside(x, emb)
    h: Tensor = checkpoint(inside, x, emb, use_reentrant=False, preserve_rng_state=True)
    return h


def is_autocast(x: Tensor) -> bool:
    """Tell whether autocast is on for the device of x; the meta device has none.

    torch.amp.is_autocast_available, of which PyTorch 2.11 cannot make a graph, is not asked.
    """
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


class Linear32(nn.Linear):
    """A linear layer that computes in float32 under autocast too: embeddings are not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, float32."""
        if not is_autocast(x):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def rounded_copy(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Return a copy of a frozen module, for autocast to `dtype` alone: there it answers the same.

    Autocast would round the weights of its convolutions and products at each pass; here they are
    rounded once. What is computed in float32 there is so here.
    """
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and not isinstance(part, Linear32):
            part.to(dtype)
    return twin


class Dropout(nn.Dropout):
    """Dropout whose masks depend on the generator and the shape alone.

    PyTorch's draws others for images in channels_last when a pass is differentiated forwards.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its units zero and the others divided by 1 - p."""
        if not self.training or self.p == 0:
            return x
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the dtype of x."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        added: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        """Return silu(norm(x + added) (1 + scale) + shift), or that without SiLU, in x's dtype.

        x is (B, C, H, W), scale, shift and added are (B, C) or None. PyTorch's own norm is slow for
        images in channels_last, the layout in which convolutions are fast.
        """
        if x.device.type == "cpu" and is_channels_last(x):
            x = plus(x, added)
            gain, offset = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
            if scale is not None and shift is not None:
                factor = 1 + scale
                gain, offset = gain * factor, torch.addcmul(shift, offset, factor)
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
            y = normalised(pixels, gain, offset, self.num_groups, self.eps, silu)
            return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        given = (x, self.weight, self.bias, scale, shift, added)
        compute = group_norm if takes(*given) else by_steps
        return compute(*given, self.num_groups, self.eps, silu)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, with a residual connection: x + proj_out(attend(norm(x))).

    The rows of qkv are all queries, all keys, all values; each of those heads x head channels.
    `norm` may be any module, an identity too. Raises ValueError if the heads do not divide C.
    """

    def __init__(self, channels: int, head_channels: int, norm: nn.Module) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"{channels} channels are no multiple of head_channels {head_channels}"
            )
        self.recompute = False
        self.num_heads = channels // head_channels
        self.norm = norm
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W); the embedding is not used."""
        return checkpointed(self.residual, x, emb, self.recompute)

    def residual(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """Return what `forward` does."""
        b, c, h, w = x.shape
        pixels = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3 C)
        heads = pixels.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, H W, d)
        out = attend(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        projected: Tensor = self.proj_out(out.permute(0, 3, 1, 2))
        return x + projected


def zero_init(module: nn.Conv2d) -> nn.Conv2d:
    """Return the module with its weights and bias set to zero: a block that starts as identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def sinusoidal_embedding(label: Tensor, dim: int, *, end_point: bool = False) -> Tensor:
    """Return [cos, sin] of label times 10000^(-i / half), half = dim // 2: (B,) -> (B, dim).

    With `end_point` the frequencies reach 1/10000: the exponent is -i / (half - 1). A column of
    zeros is added when dim is odd.
    """
    half = dim // 2
    exact = torch.promote_types(label.dtype, torch.float32)  # a label may be 999: 6e-5 in float32
    steps = torch.arange(half, dtype=exact, device=label.device)
    decay = -math.log(10000) / (half - 1 if end_point else half)
    angles = label[:, None] * torch.exp(steps * decay).to(label.dtype)  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def one_hot(labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    """Return labels (B,) as (B, num_classes) in the dtype of `like`; None without classes.

    The row of NO_CLASS is zero. Raises InputError for labels given to an unconditional network, and
    for none given to a conditional one.
    """
    check_labels(labels, num_classes)
    if labels is None:
        return None
    return F.one_hot(labels.clamp(min=0), num_classes).to(like.dtype) * is_known(labels, like)


def class_embedding(table: nn.Embedding, labels: Tensor) -> Tensor:
    """Return the rows (B, dim) of a table for labels (B,); zeros for NO_CLASS."""
    rows: Tensor = table(labels.clamp(min=0))
    return rows * is_known(labels, rows)


def is_known(labels: Tensor, like: Tensor) -> Tensor:
    """Return 1 for a class and 0 for NO_CLASS, (B, 1) in the dtype of `like`."""
    return (labels != NO_CLASS).to(like.dtype)[:, None]


def warp(augment_labels: Tensor | None, dim: int, emb: Tensor) -> Tensor:
    """Return the augmentation labels (B, dim); zeros, which say "not warped", for None."""
    return emb.new_zeros(len(emb), dim) if augment_labels is None else augment_labels


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Raise InputError unless there are labels exactly when there are classes."""
    if num_classes and labels is None:
        raise InputError(
            f"the model knows {num_classes} classes and was given none",
            "pass labels, one class index per image",
        )
    if labels is not None and not num_classes:
        raise InputError("labels given to an unconditional model", "leave them out")


def low_pass(taps: Sequence[float]) -> Tensor | None:
    """Return the outer square (n, n) of the taps, of sum 1; None for (1, 1), which needs none.

    The taps are even in number. A network holds it as a buffer that no file has: it has numbers
    where the network is built without them, too.
    """
    if tuple(taps) == (1, 1):
        return None
    line = torch.tensor(taps, dtype=torch.float32, device="cpu") / sum(taps)
    return torch.outer(line, line)


def downsampled(x: Tensor, kernel: Tensor | None = None, *, padding: int | None = None) -> Tensor:
    """Return x (B, C, H, W) at half the resolution, by a kernel of `low_pass`.

    None is the 2x2 mean. Zeros around x make the result half its size, or `padding` of them.
    """
    if kernel is None:
        return F.avg_pool2d(x, 2)
    padding = (len(kernel) - 1) // 2 if padding is None else padding
    return F.conv2d(x, of_channels(kernel, x), stride=2, padding=padding, groups=x.shape[1])


def upsampled(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Return x (B, C, H, W) at twice the resolution; without a kernel, by the nearest pixel.

    Autocast of a GPU would turn x into float32 for that: pixels are repeated in x's own dtype.
    """
    if kernel is None and is_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.interpolate(x, scale_factor=2, mode="nearest")
    if kernel is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    wide, padding = of_channels(4 * kernel, x), (len(kernel) - 1) // 2
    return F.conv_transpose2d(x, wide, stride=2, padding=padding, groups=x.shape[1])


def of_channels(kernel: Tensor, x: Tensor) -> Tensor:
    """Return a kernel (n, n) for each channel of x (B, C, H, W), like x: (C, 1, n, n)."""
    return kernel.to(x.device, x.dtype).expand(x.shape[1], 1, -1, -1)


def check_options(
    widths: Sequence[int],
    channel_mult: Sequence[int],
    blocks: int,
    attention_levels: Sequence[int] = (),
) -> None:
    """Raise ValueError for a network without channels or levels, or with absurdly many blocks."""
    levels = len(channel_mult)
    if min(*widths, *channel_mult, 1) < 1:
        raise ValueError(f"widths {list(widths)} times {list(channel_mult[:16])} must be positive")
    if len(attention_levels) > MAX_BLOCKS:
        raise ValueError(f"{len(attention_levels)} attention_levels")
    if levels < 1 or blocks < 1:
        raise ValueError("it needs at least one level and one block a level")
    if levels * blocks > MAX_BLOCKS:
        raise ValueError(f"{levels} levels of {blocks} blocks are more than {MAX_BLOCKS}")


def check_size(height: int, width: int, halvings: int) -> None:
    """Raise InputError unless both sides can be halved so often; names the nearest sizes."""
    unit = 2**halvings
    if height % unit == 0 and width % unit == 0:
        return
    fits = sorted({max(side // unit, 1) * unit for side in (height, width)})
    fits += [side + unit for side in fits]
    raise InputError(
        f"images of {width}x{height} do not fit a network that halves them {halvings} times",
        f"use multiples of {unit}; near are {', '.join(map(str, sorted(set(fits))))}",
    )
