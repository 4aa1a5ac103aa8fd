"""The ADM U-Net of Dhariwal & Nichol (2021), as the consistency-model release configures it.

Parameter names and the (q, k, v)-by-thirds layout are those of the release, so that its weights
load without renaming; diffusers' UNet2DModel expresses the same network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.networks.layers import GroupNorm32, attend, sinusoidal_embedding, zero_init
from cmtool.errors import InputError


@dataclass(frozen=True)
class AdmOptions:
    """What a preset may set under `model.network`."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_levels: tuple[int, ...] = (1, 2, 3)
    """Levels with self-attention; 0 is full resolution, each further level halves it."""
    head_channels: int = 64
    scale_shift: bool = True
    """The embedding scales and shifts the second norm; if false it is added before it."""
    resblock_updown: bool = True
    """Resample inside residual blocks; if false by convolutions of their own."""
    norm_groups: int = 32
    dropout: float = 0.0


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, with the embedding in between; `resample` is up, down or none."""

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, o: AdmOptions, resample: str = ""
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = o.scale_shift
        emb_width = 2 * out_channels if o.scale_shift else out_channels
        self.in_layers = nn.Sequential(
            GroupNorm32(o.norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(o.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(o.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity()
            if channels == out_channels
            else nn.Conv2d(channels, out_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, out_channels, H', W') for x (B, channels, H, W) and emb (B, emb_channels)."""
        norm, activation, conv = self.in_layers
        h = conv(resampled(activation(norm(x)), self.resample))
        x = resampled(x, self.resample)
        emb_out = self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb_out)
        for layer in rest:
            h = layer(h)
        skip: Tensor = self.skip_connection(x)
        return skip + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, o: AdmOptions) -> None:
        super().__init__()
        if channels % o.head_channels:
            raise ValueError(
                f"{channels} channels are no multiple of head_channels {o.head_channels}"
            )
        self.num_heads = channels // o.head_channels
        self.norm = GroupNorm32(o.norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, kernel_size=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, C, H, W); the embedding is not used."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))
        heads = qkv.reshape(b, 3, self.num_heads, c // self.num_heads, h * w).transpose(-1, -2)
        q, k, v = heads.unbind(1)  # (B, heads, H W, d)
        out = attend(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        projected: Tensor = self.proj_out(out)
        return x + projected


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, C, H / 2, W / 2)."""
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, C, 2 H, 2 W)."""
        out: Tensor = self.conv(resampled(x, "up"))
        return out


class Stem(nn.Conv2d):
    """The first convolution; like every entry it is called with the embedding, and ignores it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # takes emb too
        """Return (B, model_channels, H, W)."""
        return super().forward(x)


class Adm(nn.Module):
    """The U-Net; published weights want the noise label 250 ln(sigma)."""

    def __init__(self, options: AdmOptions, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        o = options
        width = o.model_channels
        emb_channels = 4 * width
        self.options = o
        self.num_classes = num_classes
        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def res(c_in: int, c_out: int, resample: str = "") -> ResBlock:
            return ResBlock(c_in, c_out, emb_channels, o, resample)

        def attention(level: int, c: int) -> list[nn.Module]:
            return [AttentionBlock(c, o)] if level in o.attention_levels else []

        top = len(o.channel_mult) - 1
        c = width * o.channel_mult[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(channels, c, 3, padding=1)])])
        skips = [c]
        for level, mult in enumerate(o.channel_mult):
            for _ in range(o.num_res_blocks):
                c_out = width * mult
                self.input_blocks.append(nn.ModuleList([res(c, c_out), *attention(level, c_out)]))
                c = c_out
                skips.append(c)
            if level < top:
                down = res(c, c, "down") if o.resblock_updown else Downsample(c)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)

        self.middle_block = nn.ModuleList([res(c, c), AttentionBlock(c, o), res(c, c)])

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(o.channel_mult))):
            for index in range(o.num_res_blocks + 1):
                c_out = width * mult
                entry = [res(c + skips.pop(), c_out), *attention(level, c_out)]
                c = c_out
                if level > 0 and index == o.num_res_blocks:
                    entry.append(res(c, c, "up") if o.resblock_updown else Upsample(c))
                self.output_blocks.append(nn.ModuleList(entry))

        self.out = nn.Sequential(
            GroupNorm32(o.norm_groups, c),
            nn.SiLU(),
            zero_init(nn.Conv2d(c, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None.

        Raises InputError for a size the levels do not divide, for labels given to an
        unconditional network, and for none given to a conditional one.
        """
        check_size(x.shape[-2], x.shape[-1], len(self.options.channel_mult) - 1)
        emb = self.time_embed(sinusoidal_embedding(noise_label, self.options.model_channels))
        if self.num_classes:
            if labels is None:
                raise InputError(
                    f"the model knows {self.num_classes} classes and was given none",
                    "pass labels, one class index per image",
                )
            emb = emb + self.label_emb(labels)
        elif labels is not None:
            raise InputError("labels given to an unconditional model", "leave them out")
        h = x
        skips = []
        for entry in children(self.input_blocks):
            h = run(entry, h, emb)
            skips.append(h)
        h = run(children_of(self.middle_block), h, emb)
        for entry in children(self.output_blocks):
            h = run(entry, torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h)
        return out


def children(blocks: nn.ModuleList) -> Iterator[list[nn.Module]]:
    """Yield the modules of each entry of a list of lists."""
    for entry in blocks:
        assert isinstance(entry, nn.ModuleList)
        yield list(entry)


def children_of(entry: nn.ModuleList) -> list[nn.Module]:
    """Return the modules of one entry."""
    return list(entry)


def run(entry: list[nn.Module], h: Tensor, emb: Tensor) -> Tensor:
    """Return h after the modules of one entry, each called with (h, emb)."""
    for module in entry:
        h = module(h, emb)
    return h


def resampled(x: Tensor, how: str) -> Tensor:
    """Return x at twice ("up", nearest) or half ("down", 2x2 mean) the resolution, or as it is."""
    if how == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    if how == "down":
        return F.avg_pool2d(x, 2)
    return x


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
