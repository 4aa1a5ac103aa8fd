"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, config G; equations are that paper's).

Every layer keeps the variance of what passes through it: weights are normalised wherever they are
used, sums and concatenations are scaled, and there are neither norms nor biases.

In training each weight is also replaced by its normalised self (eq. 66). The forward pass does not
do this: `MPLayer.normalise` does, and whoever trains calls it at the start and once a step. So a
pass without gradients, a frozen copy or a pass that is computed again changes no
weight, and two rounds of accumulation are the same run as two processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.networks.cpu.attention import attend
from cmtool.core.networks.layers import (
    Dropout,
    check_options,
    check_size,
    checkpointed,
    downsampled,
    is_autocast,
    low_pass,
    one_hot,
    upsampled,
)
from cmtool.core.tensors import local

EPS = 1e-4
SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
"""model_channels of the networks that EDM2 names so; all else is the default."""


@dataclass(frozen=True)
class Edm2Options:
    """What a preset may set under `model.network`."""

    model_channels: int = 192
    """EDM2-XS has 128, S 192, M 256, L 320, XL 384, XXL 448."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_levels: tuple[int, ...] = (2, 3)
    """Levels with self-attention; 0 is full resolution, each further level halves it."""
    head_channels: int = 64
    """Blocks of fewer channels have no attention."""
    channel_mult_noise: int = 0
    """Width of the noise features as a multiple of model_channels; 0 is channel_mult[0]."""
    channel_mult_emb: int = 0
    """Width of the embedding as a multiple of model_channels; 0 is the largest of channel_mult."""
    label_balance: float = 0.5
    """Share of the class in its sum with the noise embedding."""
    concat_balance: float = 0.5
    """Share of the encoder's features where they are joined with the decoder's."""
    res_balance: float = 0.3
    """Share of the residual path in its sum with the main one."""
    attention_balance: float = 0.3
    clip: float = 256.0
    """Activations are clamped to it at the end of each block."""
    resample_filter: tuple[int, ...] = (1, 1)
    dropout: float = 0.0
    dropout_res: int = 0
    """Resolution in pixels at which, and below which, dropout acts; 0 is everywhere (ECT: 16)."""


def unit(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return x divided by its root mean square over `dim`, in x's dtype (eq. 30 and 47).

    The root mean square is float32 or better; EPS is added to it.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    size = math.prod([x.shape[d] for d in dim])  # of a list: the compiler knows no generators here
    return x / (EPS + norm / math.sqrt(size)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Return SiLU, scaled to keep the variance of unit noise (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return (1 - t) a + t b, scaled to keep the variance (eq. 88)."""
    return torch.lerp(a, b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return a and b (B, *, H, W) as one, with shares 1 - t and t of the variance (eq. 103)."""
    size_a, size_b = a.shape[1], b.shape[1]
    scale = math.sqrt((size_a + size_b) / ((1 - t) ** 2 + t**2))
    parts = (a * (scale * (1 - t) / math.sqrt(size_a)), b * (scale * t / math.sqrt(size_b)))
    return torch.cat(parts, dim=1)


class MPLayer(nn.Module):
    """A layer whose weight (out, in, ...) is normalised row by row wherever it is used (eq. 47)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape).normal_())

    @torch.no_grad()
    def normalise(self) -> None:
        """Replace the weight by its normalised self (eq. 66); a sharded one part by part."""
        for weight in local([self.weight]):  # shards are whole rows
            weight.copy_(rows(weight))

    def scaled(self, gain: Tensor | None) -> Tensor:
        """Return the weight that is used: it keeps the variance, times `gain` (1,)."""
        weight = rows(self.weight)
        fan_in = math.sqrt(math.prod(weight.shape[1:]))
        return weight / fan_in if gain is None else weight * (gain / fan_in)


def rows(weight: Tensor) -> Tensor:
    """Return a weight (out, in, ...) with rows of root mean square 1."""
    return unit(weight, tuple(range(1, weight.ndim)))


class MPConv(MPLayer):
    """A convolution without bias that keeps the variance; its padding keeps the resolution."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__((out_channels, channels, kernel, kernel))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return (B, out_channels, H, W), times `gain` (1,), for x (B, channels, H, W)."""
        return F.conv2d(x, self.scaled(gain), padding=self.weight.shape[-1] // 2)


class MPLinear(MPLayer):
    """A linear layer without bias that keeps the variance, float32 under autocast too."""

    def __init__(self, features: int, out_features: int) -> None:
        super().__init__((out_features, features))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return (B, out_features), times `gain` (1,), for x (B, features)."""
        if not is_autocast(x):
            return F.linear(x.to(self.weight.dtype), self.scaled(gain))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.scaled(gain))


class MPFourier(nn.Module):
    """Random Fourier features of unit variance (eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(features).normal_(0, 2 * math.pi))
        self.register_buffer("phases", torch.empty(features).uniform_(0, 2 * math.pi))

    def forward(self, noise_label: Tensor) -> Tensor:
        """Return (B, features) for noise_label (B,)."""
        angles = noise_label.to(self.freqs.dtype)[:, None] * self.freqs + self.phases
        return angles.cos() * math.sqrt(2)


class LogVariance(nn.Module):
    """u(sigma), the learned log-variance of a teacher's error: what weights its loss (eq. 21).

    It belongs to the loss: a network samples without it.
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.fourier = MPFourier(features)
        self.linear = MPLinear(features, 1)

    def forward(self, noise_label: Tensor) -> Tensor:
        """Return u (B,) for noise_label = ln(sigma) / 4, (B,)."""
        u: Tensor = self.linear(self.fourier(noise_label))
        return u[:, 0]


class MPAttention(nn.Module):
    """Self-attention over the pixels, by the angles of queries and keys alone.

    The rows of qkv are all queries, all keys, all values; each of those heads x head channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W)."""
        b, c, h, w = x.shape
        pixels = self.qkv(x).permute(0, 2, 3, 1)  # (B, H, W, 3 C)
        heads = pixels.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = unit(heads, (4,)).permute(2, 0, 3, 1, 4)  # (B, heads, H W, d)
        out = attend(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        projected: Tensor = self.proj(out.permute(0, 3, 1, 2))
        return projected


class Edm2Block(nn.Module):
    """Resample, a residual path with the embedding as a gain, attention perhaps, a sum (Fig. 21).

    A block of the encoder normalises each pixel first, and widens before its residual path; one of
    the decoder widens after it, and may take features of the encoder.
    """

    low_pass: Tensor | None

    def __init__(
        self,
        side: Literal["enc", "dec"],
        channels: int,
        out_channels: int,
        emb_channels: int,
        o: Edm2Options,
        *,
        resample: str = "",
        attention: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.options = o
        self.side = side
        self.resample = resample
        self.register_buffer("low_pass", low_pass(o.resample_filter), persistent=False)
        self.takes_skip = takes_skip
        heads = out_channels // o.head_channels if attention else 0
        inner = out_channels if side == "enc" else channels
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = MPConv(inner, out_channels, 3)
        self.emb_linear = MPLinear(emb_channels, out_channels)
        self.dropout = Dropout(o.dropout)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(channels, out_channels, 1) if channels != out_channels else None
        self.attention = MPAttention(out_channels, heads) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, out_channels, H', W') for x (B, channels, H, W) and emb (B, emb_channels)."""
        return checkpointed(self.residual, x, emb, self.recompute)

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return what `forward` does."""
        o = self.options
        if self.resample:
            x = (upsampled if self.resample == "up" else downsampled)(x, self.low_pass)
        if self.side == "enc":
            x = unit(self.widened(x), (1,))
        y = self.conv_res0(mp_silu(x))
        gain = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * gain[:, :, None, None].to(y.dtype))
        if not o.dropout_res or max(y.shape[-2:]) <= o.dropout_res:
            y = self.dropout(y)
        y = self.conv_res1(y)
        if self.side == "dec":
            x = self.widened(x)
        x = mp_sum(x, y, o.res_balance)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), o.attention_balance)
        return x.clamp(-o.clip, o.clip)

    def widened(self, x: Tensor) -> Tensor:
        """Return x (B, channels, H, W) with out_channels."""
        return x if self.conv_skip is None else self.conv_skip(x)


class Edm2(nn.Module):
    """EDM2's U-Net; published weights want the noise label ln(sigma) / 4 (`log`)."""

    def __init__(self, options: Edm2Options, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        o = options
        check_options((channels, o.model_channels, o.head_channels), o.channel_mult, o.num_blocks,
                      o.attention_levels)  # fmt: skip
        if len(o.resample_filter) % 2 or sum(o.resample_filter) <= 0:
            raise ValueError("resample_filter must be even in length, with a positive sum")
        self.options = o
        self.channels = channels
        self.num_classes = num_classes
        noise_channels = o.model_channels * (o.channel_mult_noise or o.channel_mult[0])
        emb_channels = o.model_channels * (o.channel_mult_emb or max(o.channel_mult))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPLinear(noise_channels, emb_channels)
        if num_classes:
            self.emb_label = MPLinear(num_classes, emb_channels)
        self.enc, skips = encoder(o, channels, emb_channels)
        self.dec = decoder(o, skips, emb_channels)
        self.out_conv = MPConv(o.model_channels * o.channel_mult[0], channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None.

        None is "no class" for a conditional network too. Raises InputError for a size the levels
        do not divide, and for labels given to an unconditional network.
        """
        o = self.options
        check_size(x.shape[-2], x.shape[-1], len(o.channel_mult) - 1)
        emb = self.embed(noise_label, labels)
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        skips = []
        for block in self.enc:
            h = block(h, emb) if isinstance(block, Edm2Block) else block(h)
            skips.append(h)
        for block in self.dec:
            assert isinstance(block, Edm2Block)
            h = block(mp_cat(h, skips.pop(), o.concat_balance) if block.takes_skip else h, emb)
        out: Tensor = self.out_conv(h, self.out_gain)
        return out

    def embed(self, noise_label: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding (B, emb_channels), activated, of level and class."""
        emb: Tensor = self.emb_noise(self.emb_fourier(noise_label))
        if self.num_classes and labels is None:
            classes = emb.new_zeros(len(emb), self.num_classes)
            emb = mp_sum(emb, self.emb_label(classes), self.options.label_balance)
        elif (known := one_hot(labels, self.num_classes, emb)) is not None:
            classes = known * math.sqrt(self.num_classes)
            emb = mp_sum(emb, self.emb_label(classes), self.options.label_balance)
        return mp_silu(emb)


def encoder(o: Edm2Options, channels: int, emb_channels: int) -> tuple[nn.ModuleList, list[int]]:
    """Return the way down: a convolution, then blocks; and the channels after each of them."""
    c = o.model_channels * o.channel_mult[0]
    blocks: list[nn.Module] = [MPConv(channels + 1, c, 3)]
    skips = [c]
    for level, mult in enumerate(o.channel_mult):
        if level:
            blocks.append(Edm2Block("enc", c, c, emb_channels, o, resample="down"))
            skips.append(c)
        attention = level in o.attention_levels
        for _ in range(o.num_blocks):
            out = o.model_channels * mult
            blocks.append(Edm2Block("enc", c, out, emb_channels, o, attention=attention))
            c = out
            skips.append(c)
    return nn.ModuleList(blocks), skips


def decoder(o: Edm2Options, skips: list[int], emb_channels: int) -> nn.ModuleList:
    """Return the way up, from the lowest resolution; its blocks take the `skips` from the end."""
    skips = list(skips)
    c = skips[-1]
    blocks: list[nn.Module] = []
    top = len(o.channel_mult) - 1
    for level, mult in reversed(list(enumerate(o.channel_mult))):
        if level == top:
            blocks += [Edm2Block("dec", c, c, emb_channels, o, attention=True),
                       Edm2Block("dec", c, c, emb_channels, o)]  # fmt: skip
        else:
            blocks.append(Edm2Block("dec", c, c, emb_channels, o, resample="up"))
        for _ in range(o.num_blocks + 1):
            out = o.model_channels * mult
            blocks.append(
                Edm2Block(
                    "dec", c + skips.pop(), out, emb_channels, o,
                    attention=level in o.attention_levels, takes_skip=True,
                )
            )  # fmt: skip
            c = out
    return nn.ModuleList(blocks)
