"""Weight files of others in their real format, filled with random numbers."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from cmtool.evaluation.inception import BLOCKS, EPS, SIDE, STEM, Conv, Inception


class ConvNorm(nn.Module):
    def __init__(self, conv, kernel, stride, padding):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(conv, *kernel))
        for name in ("beta", "mean", "var"):
            setattr(self, name, nn.Parameter(torch.empty(conv)))
        self.stride, self.padding = stride, padding

    def forward(self, x):
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, bias=self.beta, eps=EPS))


class Layers(nn.Module):
    """The layers by the names of the file, norms unfolded."""

    def __init__(self):
        super().__init__()
        for key, conv in Inception().convs.items():
            at = self
            *path, last = key.split("-")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            norm = ConvNorm(0, (0,), conv.stride, conv.padding)
            norm.weight = nn.Parameter(torch.empty_like(conv.weight))
            for name in ("beta", "mean", "var"):
                setattr(norm, name, nn.Parameter(torch.empty(conv.out_channels)))
            at.add_module(last, norm)

    def run(self, prefix, chain, x):
        for layer in chain:
            if isinstance(layer, Conv):
                x = self.get_submodule(prefix + layer.name)(x)
            elif isinstance(layer, tuple):
                x = torch.cat([self.run(prefix, branch, x) for branch in layer], 1)
            else:
                x = layer(x)
        return x

    def forward(self, x):
        x = self.run("", STEM, x)
        for name, block in BLOCKS.items():
            x = self.run(f"{name}.", block, x)
        return F.adaptive_avg_pool2d(x, 1)


class Detector(nn.Module):
    """The published file: a resize, the layers, and class probabilities."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.layers = torch.fx.symbolic_trace(Layers())
        self.output = nn.Linear(2048, 1008)
        self.gain = gain

    def forward(
        self, img, return_features: bool = False, use_fp16: bool = False,
        no_output_bias: bool = False,
    ):  # fmt: skip
        batch, channels, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += 1.0 / width - 1.0 / 299
        theta[1, 2] += 1.0 / height - 1.0 / 299
        theta = theta.unsqueeze(0).repeat([batch, 1, 1])
        grid = F.affine_grid(theta, [batch, channels, 299, 299], align_corners=False)
        x = F.grid_sample(
            img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        features = self.layers((x - 128) / 128).reshape(batch, 2048) * self.gain
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return F.softmax(F.linear(features, self.output.weight, bias), dim=1)


def detector(gain=1.0, seed=0):
    """A detector of random weights that keep the scale of what passes through."""
    module = Detector(gain).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "weight":
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5, generator=generator)
        elif leaf == "var":
            nn.init.uniform_(p, 0.5, 1.5, generator=generator)
        else:
            nn.init.normal_(p, std=0.1, generator=generator)
    return module


def write_detector(path, gain=1.0, seed=0):
    """Write a TorchScript file like inception-2015-12-05.pt; return its module."""
    module = detector(gain, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return module


assert SIDE == 299
