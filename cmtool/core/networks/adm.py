"""The ADM U-Net of Dhariwal & Nichol (2021), as the consistency-model release configures it.

Parameter names and the (q, k, v)-by-thirds layout are those of the release, so that its weights
load without renaming. EDM's DhariwalUNet and diffusers' UNet2DModel express the same network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.networks.layers import (
    AttentionBlock,
    Dropout,
    GroupNorm32,
    Linear32,
    check_labels,
    check_options,
    check_size,
    checkpointed,
    class_embedding,
    downsampled,
    sinusoidal_embedding,
    upsampled,
    warp,
    zero_init,
)


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
    double_norm: bool = False
    """Scale and shift are normalised over channels, which keeps df/dt small (sCM)."""
    resblock_updown: bool = True
    """Resample inside residual blocks; if false by convolutions of their own."""
    norm_groups: int = 32
    min_group_channels: int = 1
    """Norms of fewer than norm_groups times so many channels have fewer groups (4 in EDM)."""
    middle_norm: bool = True
    """A norm before the attention in the middle; early diffusers exports lack it."""
    middle_attention: bool = True
    """Attention in the middle; EDM has none where the lowest level is narrower than a head."""
    learn_sigma: bool = False
    """The network also returns a variance, which is dropped (iDDPM)."""
    augment_dim: int = 0
    """Length of the augmentation labels (EDM), 0 for none."""
    two_time: bool = False
    """The network also takes the label of the level that it jumps to: a flow map."""
    dropout: float = 0.0

    def group_norm(self, channels: int) -> GroupNorm32:
        """Return the norm for so many channels."""
        groups = min(self.norm_groups, channels // self.min_group_channels)
        return GroupNorm32(groups, channels, eps=1e-5)

    def attention(self, channels: int, *, norm: bool = True) -> AttentionBlock:
        """Return a new attention block, which starts as identity."""
        block = AttentionBlock(
            channels, self.head_channels, self.group_norm(channels) if norm else nn.Identity()
        )
        zero_init(block.proj_out)
        return block

    def middle(self, channels: int) -> nn.Module:
        """Return what is between the two blocks in the middle."""
        if not self.middle_attention:
            return NoAttention()
        return self.attention(channels, norm=self.middle_norm)


def pixel_norm(x: Tensor) -> Tensor:
    """Return x (B, C) over the root mean square of its channels."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, with the embedding in between; `resample` is up, down or none."""

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, o: AdmOptions, resample: str = ""
    ) -> None:
        super().__init__()
        if o.double_norm and not o.scale_shift:
            raise ValueError("double_norm normalises scale and shift: it needs scale_shift")
        self.recompute = False
        self.resample = resample
        self.scale_shift = o.scale_shift
        self.double_norm = o.double_norm
        emb_width = 2 * out_channels if o.scale_shift else out_channels
        self.in_layers = nn.Sequential(
            o.group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear32(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            o.group_norm(out_channels),
            nn.SiLU(),
            Dropout(o.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity()
            if channels == out_channels
            else nn.Conv2d(channels, out_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, out_channels, H', W') for x (B, channels, H, W), emb = silu(embedding)."""
        return checkpointed(self.residual, x, emb, self.recompute)

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return what `forward` does."""
        norm, _, conv = self.in_layers
        h = conv(resampled(norm(x, silu=True), self.resample))
        x = resampled(x, self.resample)
        _, linear = self.emb_layers  # its SiLU is the same for all blocks, and done once
        emb_out = linear(emb)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb_out.chunk(2, dim=1)
            if self.double_norm:  # norm(h) pnorm(scale) + pnorm(shift) (Lu & Song 2025, sec. 4.1)
                scale, shift = pixel_norm(scale) - 1, pixel_norm(shift)
            h = norm(h, scale, shift, silu=True)
        else:
            h = norm(h, added=emb_out, silu=True)
        h = conv(dropout(h))
        skip: Tensor = self.skip_connection(x)
        return skip + h


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


class NoAttention(nn.Module):
    """What stands in the middle without attention: the names of the blocks around it stay."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return x."""
        return x


class Adm(nn.Module):
    """The U-Net; published weights want the noise label 250 ln(sigma)."""

    def __init__(self, options: AdmOptions, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.options = o = options
        widths = (channels, o.model_channels, o.head_channels, o.min_group_channels)
        check_options(widths, o.channel_mult, o.num_res_blocks, o.attention_levels)
        width = o.model_channels
        emb_channels = 4 * width
        self.two_time = o.two_time
        self.channels = channels
        self.num_classes = num_classes
        self.time_embed = nn.Sequential(
            Linear32(width * (1 + o.two_time), emb_channels),
            nn.SiLU(),
            Linear32(emb_channels, emb_channels),
        )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        if o.augment_dim:
            self.augment_emb = Linear32(o.augment_dim, width, bias=False)
            nn.init.zeros_(self.augment_emb.weight)

        def res(c_in: int, c_out: int, resample: str = "") -> ResBlock:
            return ResBlock(c_in, c_out, emb_channels, o, resample)

        def attention(level: int, c: int) -> list[nn.Module]:
            return [o.attention(c)] if level in o.attention_levels else []

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

        self.middle_block = nn.ModuleList([res(c, c), o.middle(c), res(c, c)])

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
            o.group_norm(c),
            nn.SiLU(),
            zero_init(nn.Conv2d(c, channels * (2 if o.learn_sigma else 1), 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        label_to: Tensor | None = None,
    ) -> Tensor:
        """Return F (B, C, H, W) for x (B, C, H, W), noise_label (B,) and labels (B,) or None.

        `augment_labels` (B, augment_dim) say how training images were warped; None is not at all.
        `label_to` (B,) is the noise label of the level that a two-time network jumps to: it hears
        the difference of the two.
        Raises InputError for a size the levels do not divide, for labels given to an
        unconditional network, and for none given to a conditional one.
        """
        check_size(x.shape[-2], x.shape[-1], len(self.options.channel_mult) - 1)
        check_labels(labels, self.num_classes)
        emb = sinusoidal_embedding(noise_label, self.options.model_channels)
        if self.options.augment_dim:
            emb = emb + self.augment_emb(warp(augment_labels, self.options.augment_dim, emb))
        if label_to is not None:
            width = self.options.model_channels
            emb = torch.cat([emb, sinusoidal_embedding(noise_label - label_to, width)], dim=1)
        emb = self.time_embed(emb)
        if labels is not None:
            emb = emb + class_embedding(self.label_emb, labels)
        emb = F.silu(emb)
        h = x
        skips = []
        for entry in children(self.input_blocks):
            h = run(entry, h, emb)
            skips.append(h)
        h = run(children_of(self.middle_block), h, emb)
        for entry in children(self.output_blocks):
            h = run(entry, torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h)
        return out[:, : self.channels]


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
    return upsampled(x) if how == "up" else downsampled(x) if how == "down" else x
