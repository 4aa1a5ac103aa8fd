"""DDPM++ and NCSN++ of Song et al. (2021), as EDM configures them (Karras et al. 2022, App. F).

DDPM++ is a positional embedding, plain encoder and decoder and box filter; NCSN++ is Fourier
features, a residual encoder and the filter (1, 3, 3, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.networks.layers import (
    AttentionBlock,
    Dropout,
    GroupNorm32,
    Linear32,
    check_options,
    check_size,
    checkpointed,
    downsampled,
    low_pass,
    one_hot,
    sinusoidal_embedding,
    upsampled,
    warp,
)

SKIP_SCALE = math.sqrt(0.5)
"""Sums of two paths are scaled back to the variance of one."""


@dataclass(frozen=True)
class SongOptions:
    """What a preset may set under `model.network`."""

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    """Levels with self-attention; 0 is full resolution, each further level halves it."""
    embedding: Literal["positional", "fourier"] = "positional"
    fourier_scale: float = 16.0
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    augment_dim: int = 0
    """Length of the augmentation labels (EDM's CIFAR-10, FFHQ and AFHQ models: 9), 0 for none."""
    learn_sigma: bool = False
    """The network also returns a variance, which is dropped (iDDPM)."""
    two_time: bool = False
    """The network also takes the label of the level that it jumps to: a flow map."""
    dropout: float = 0.0


def group_norm(channels: int) -> GroupNorm32:
    """Return a norm of at most 32 groups of at least 4 channels."""
    return GroupNorm32(min(32, channels // 4), channels, eps=1e-6)


class SongBlock(nn.Module):
    """Norm, SiLU, conv, twice, the embedding added in between; then, perhaps, attention."""

    low_pass: Tensor | None

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        o: SongOptions,
        *,
        resample: str = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.resample = resample
        self.register_buffer("low_pass", low_pass(o.resample_filter), persistent=False)
        self.norm0 = group_norm(channels)
        self.conv0 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.affine = Linear32(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.dropout = Dropout(o.dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels, out_channels, kernel_size=1)
            if resample or channels != out_channels
            else nn.Identity()
        )
        self.attention = (
            AttentionBlock(out_channels, out_channels, group_norm(out_channels))
            if attention
            else None
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, out_channels, H', W') for x (B, channels, H, W) and emb (B, emb_channels)."""
        return checkpointed(self.residual, x, emb, self.recompute)

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return what `forward` does."""
        h = self.conv0(self.resampled(self.norm0(x, silu=True)))
        h = self.norm1(h, added=self.affine(emb), silu=True)
        h = self.conv1(self.dropout(h))
        x = (self.skip(self.resampled(x)) + h) * SKIP_SCALE
        if self.attention is not None:
            x = self.attention(x) * SKIP_SCALE
        return x

    def resampled(self, x: Tensor) -> Tensor:
        """Return x filtered to twice or half the resolution, or as it is."""
        if self.resample == "up":
            return upsampled(x, self.low_pass)
        return downsampled(x, self.low_pass) if self.resample == "down" else x


class EncoderLevel(nn.Module):
    """One resolution on the way down: an entry that halves (but at level 0), then blocks.

    The picture itself (`aux`) travels beside the features and is added in: by a 1x1 convolution of
    its downsampled self ("skip"), or by a downsampling 3x3 convolution whose sum goes on as the
    next picture ("residual").
    """

    low_pass: Tensor | None

    def __init__(
        self, entry: nn.Module, blocks: list[SongBlock], aux: nn.Conv2d | None, o: SongOptions
    ) -> None:
        super().__init__()
        self.entry = entry
        self.aux = aux
        self.blocks = nn.ModuleList(blocks)
        self.residual = o.encoder == "residual"
        self.register_buffer("low_pass", low_pass(o.resample_filter), persistent=False)

    def forward(
        self, x: Tensor, aux: Tensor, emb: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the picture, both (B, *, H, W); `skips` gains every stage."""
        x = self.entry(x, emb) if isinstance(self.entry, SongBlock) else self.entry(x)
        if self.aux is not None and self.residual:
            # convolve with room for the filter, then filter: a border EDM's weights rely on
            pad = 1 if self.low_pass is None else len(self.low_pass) // 2
            wide = F.conv2d(aux, self.aux.weight, self.aux.bias, padding=pad)
            x = aux = (x + downsampled(wide, self.low_pass, padding=0)) * SKIP_SCALE
        elif self.aux is not None:
            aux = downsampled(aux, self.low_pass)
            x = x + self.aux(aux)
        skips.append(x)
        for block in self.blocks:
            x = block(x, emb)
            skips.append(x)
        return x, aux


class DecoderLevel(nn.Module):
    """One resolution on the way up: an entry (in0 and in1 at the bottom, else up), then blocks."""

    low_pass: Tensor | None

    def __init__(
        self,
        entry: list[SongBlock],
        blocks: list[SongBlock],
        head: nn.Sequential | None,
        o: SongOptions,
    ) -> None:
        super().__init__()
        self.entry = nn.ModuleList(entry)
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.register_buffer("low_pass", low_pass(o.resample_filter), persistent=False)

    def forward(
        self, x: Tensor, out: Tensor | None, emb: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the features and the picture so far; each block takes the last of `skips`."""
        for block in self.entry:
            x = block(x, emb)
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        if self.head is not None:
            picture = self.head(x)
            out = picture if out is None else picture + upsampled(out, self.low_pass)
        return x, out


class Song(nn.Module):
    """The U-Net; published weights want the noise label ln(sigma) / 4."""

    frequencies: Tensor

    def __init__(self, options: SongOptions, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        o = options
        widths = (channels, o.model_channels, o.channel_mult_emb, o.channel_mult_noise)
        check_options(widths, o.channel_mult, o.num_blocks, o.attention_levels)
        if len(o.resample_filter) % 2 or sum(o.resample_filter) <= 0:
            raise ValueError("resample_filter must be even in length, with a positive sum")
        width = o.model_channels
        noise_channels = width * o.channel_mult_noise
        emb_channels = width * o.channel_mult_emb
        self.options = o
        self.two_time = o.two_time
        self.channels = channels
        self.num_classes = num_classes
        out_channels = channels * (2 if o.learn_sigma else 1)

        self.make_embedding(noise_channels, emb_channels)

        def block(c_in: int, c_out: int, resample: str = "", attention: bool = False) -> SongBlock:
            return SongBlock(c_in, c_out, emb_channels, o, resample=resample, attention=attention)

        top = len(o.channel_mult) - 1
        c, c_aux = width, channels
        self.enc = nn.ModuleList()
        skips = []
        for level, mult in enumerate(o.channel_mult):
            entry = block(c, c, "down") if level else nn.Conv2d(channels, width, 3, padding=1)
            aux = None
            if level and o.encoder != "standard":
                aux = nn.Conv2d(c_aux, c, 3) if o.encoder == "residual" else nn.Conv2d(c_aux, c, 1)
                c_aux = c if o.encoder == "residual" else c_aux
            skips.append(c)
            blocks = []
            for _ in range(o.num_blocks):
                blocks.append(block(c, width * mult, attention=level in o.attention_levels))
                c = width * mult
                skips.append(c)
            self.enc.append(EncoderLevel(entry, blocks, aux, o))

        self.dec = nn.ModuleList()  # from the lowest resolution to the highest
        for level, mult in reversed(list(enumerate(o.channel_mult))):
            start = (
                [block(c, c, "up")] if level < top else [block(c, c, attention=True), block(c, c)]
            )
            blocks = []
            for index in range(o.num_blocks + 1):
                last = index == o.num_blocks
                attention = last and level in o.attention_levels
                blocks.append(block(c + skips.pop(), width * mult, attention=attention))
                c = width * mult
            head = None
            if level == 0 or o.decoder == "skip":
                conv = nn.Conv2d(c, out_channels, 3, padding=1)
                head = nn.Sequential(group_norm(c), nn.SiLU(), conv)
            self.dec.append(DecoderLevel(start, blocks, head, o))
        initialise(self)

    def make_embedding(self, noise_channels: int, emb_channels: int) -> None:
        """Make the layers that embed noise label, class and warps."""
        o = self.options
        if o.embedding == "fourier":
            random = torch.randn(noise_channels // 2)
            self.register_buffer("frequencies", random * o.fourier_scale)
        if self.num_classes:
            self.map_label = Linear32(self.num_classes, noise_channels)
        if o.augment_dim:
            self.map_augment = Linear32(o.augment_dim, noise_channels, bias=False)
        self.map_layer0 = Linear32(noise_channels * (1 + o.two_time), emb_channels)
        self.map_layer1 = Linear32(emb_channels, emb_channels)

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
        `label_to` (B,) is the noise label of the level that a two-time network jumps to.
        Raises InputError for a size the levels do not divide, for labels given to an
        unconditional network, and for none given to a conditional one.
        """
        check_size(x.shape[-2], x.shape[-1], len(self.options.channel_mult) - 1)
        classes = one_hot(labels, self.num_classes, x)
        emb = self.embed(noise_label, classes, augment_labels, label_to)
        h, aux = x, x
        skips: list[Tensor] = []
        for encoder in self.enc:
            h, aux = encoder(h, aux, emb, skips)
        out = None
        for decoder in self.dec:
            h, out = decoder(h, out, emb, skips)
        assert isinstance(out, Tensor)
        return out[:, : self.channels]

    def waves(self, noise_label: Tensor) -> Tensor:
        """Return the features [sin, cos] of a noise label (B,), (B, noise_channels)."""
        o = self.options
        if o.embedding == "fourier":
            angles = noise_label[:, None] * (2 * math.pi * self.frequencies)
            return torch.cat([angles.sin(), angles.cos()], dim=1)
        width = o.model_channels * o.channel_mult_noise
        cos, sin = sinusoidal_embedding(noise_label, width, end_point=True).chunk(2, dim=1)
        return torch.cat([sin, cos], dim=1)

    def embed(
        self,
        noise_label: Tensor,
        classes: Tensor | None,
        augment_labels: Tensor | None,
        label_to: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding (B, emb_channels), activated, of level, one-hot class and warp.

        A two-time network hears how far it jumps, as the difference of the labels.
        """
        o = self.options
        emb = self.waves(noise_label)
        if classes is not None:
            emb = emb + self.map_label(classes * math.sqrt(self.num_classes))
        if o.augment_dim:
            emb = emb + self.map_augment(warp(augment_labels, o.augment_dim, emb))
        if label_to is not None:
            emb = torch.cat([emb, self.waves(noise_label - label_to)], dim=1)
        activated: Tensor = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        return activated


def initialise(network: nn.Module) -> None:
    """Set weights by Xavier's uniform law, biases to zero; outputs of residual paths near zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    small: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, SongBlock):
            small.append(module.conv1)
        if isinstance(module, AttentionBlock):
            small.append(module.proj_out)
            module.qkv.weight.data.mul_(math.sqrt(0.2))
        if isinstance(module, DecoderLevel) and module.head is not None:
            small.append(module.head[-1])
    for module in small:
        assert isinstance(module, nn.Conv2d)
        module.weight.data.mul_(1e-5)
