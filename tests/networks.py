"""Small networks of every kind, with attention, classes and dropout where they have them."""

import torch
from torch import nn

from cmtool.core.networks import NETWORKS
from cmtool.core.networks.adm import AdmOptions
from cmtool.core.networks.edm2 import Edm2Options
from cmtool.core.networks.mlp import MlpOptions
from cmtool.core.networks.song import SongOptions
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label

OPTIONS = {
    "adm": AdmOptions(model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                      attention_levels=(1,), head_channels=8, norm_groups=4, dropout=0.3),
    "edm2": Edm2Options(model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,),
                        head_channels=8, dropout=0.3),
    "mlp": MlpOptions(width=16, depth=2),
    "song": SongOptions(model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,),
                        embedding="fourier", channel_mult_noise=2, fourier_scale=2.0,
                        encoder="residual", resample_filter=(1, 3, 3, 1), dropout=0.3),
}  # fmt: skip


def network(name, channels=3, num_classes=10, scalings=consistency_scalings):
    """A small network of random weights, none of them zero, in training mode."""
    kind = NETWORKS[name]
    module = kind.build(OPTIONS[name], channels, num_classes)
    for i, p in enumerate(module.parameters()):
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    return Preconditioned(module, scalings, log_label, sigma_data=0.5, sigma_min=0.3)
