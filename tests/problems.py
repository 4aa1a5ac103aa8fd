"""Problems with known answers: Gaussian data, for which denoiser and consistency map are exact."""

from dataclasses import dataclass

import torch

from cmtool.core.tensors import expand


@dataclass(frozen=True)
class Gaussian:
    """Data N(m, s^2) in every pixel, with eps = 0.3 so that every term of every formula counts."""

    m: float = 0.4
    s: float = 0.7
    eps: float = 0.3

    def denoiser(self, x, sigma, labels=None):
        variance = expand(sigma**2, x)
        return (self.s**2 * x + variance * self.m) / (self.s**2 + variance)

    def consistency(self, x, sigma, labels=None):
        scale = (self.s**2 + self.eps**2) / (self.s**2 + expand(sigma**2, x))
        return self.m + (x - self.m) * scale.sqrt()

    def at(self, x, sigma, sigma_next):
        """The point at sigma_next on the path through (x, sigma)."""
        scale = (self.s**2 + sigma_next**2) / (self.s**2 + sigma**2)
        return self.m + (x - self.m) * scale**0.5


def randn_like_from(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def slope(sizes, errors):
    """The order of convergence: minus the slope of log error against log size."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
