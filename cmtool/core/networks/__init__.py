"""Raw networks F(x, noise_label, labels): a frozen Options dataclass and a module each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from cmtool.core.networks.adm import Adm, AdmOptions, ResBlock
from cmtool.core.networks.edm2 import Edm2, Edm2Block, Edm2Options
from cmtool.core.networks.layers import AttentionBlock
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.networks.song import Song, SongBlock, SongOptions


class NetworkKind(NamedTuple):
    """What a registry row holds: the options a preset may set, and how to build the module."""

    options: type[Any]
    build: Callable[..., nn.Module]
    """`(options, channels, num_classes) -> module`."""
    blocks: tuple[type[nn.Module], ...] = ()
    """Modules with an attribute `recompute`: True computes them again in the backward pass."""


NETWORKS: dict[str, NetworkKind] = {
    "adm": NetworkKind(AdmOptions, Adm, (ResBlock, AttentionBlock)),
    "edm2": NetworkKind(Edm2Options, Edm2, (Edm2Block,)),
    "mlp": NetworkKind(MlpOptions, Mlp),
    "song": NetworkKind(SongOptions, Song, (SongBlock,)),
}
