"""Preconditioning: from a raw network F to a Denoiser, x0 = c_skip x + c_out F(c_in x, c_noise)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.tensors import expand


class Scalings(NamedTuple):
    """c_skip, c_out and c_in, each (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


ScalingsFn = Callable[[Tensor, float, float], Scalings]
"""`(sigma, sigma_data, sigma_min) -> Scalings`."""


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.0) -> Scalings:
    """Return the scalings of a teacher (Karras et al. 2022, Table 1); sigma_min plays no part."""
    variance = sigma**2 + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / variance.sqrt(),
        c_in=1 / variance.sqrt(),
    )


def consistency_scalings(
    sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Scalings:
    """Return scalings with f(x, sigma_min) = x (Song et al. 2023, App. C).

    Only c_skip and the factor of c_out are shifted by sigma_min; the roots keep the plain sigma,
    as the published weights were trained.
    """
    shifted = sigma - sigma_min
    variance = sigma**2 + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / (shifted**2 + sigma_data**2),
        c_out=shifted * sigma_data / variance.sqrt(),
        c_in=1 / variance.sqrt(),
    )


def log_label(sigma: Tensor) -> Tensor:
    """Return c_noise = ln(sigma) / 4 (Karras et al. 2022, Table 1; the JAX release)."""
    return 0.25 * torch.log(sigma)


def log_label_1000(sigma: Tensor) -> Tensor:
    """Return c_noise = 250 ln(sigma) (the PyTorch release and diffusers)."""
    return 1000 * 0.25 * torch.log(sigma + 1e-44)


class Preconditioned(nn.Module):
    """A network with its scalings and noise label: a Denoiser.

    The scalings are computed in the dtype of sigma (float64 from a grid), applied in the dtype
    of x, and the network's answer is brought back to that dtype, whatever autocast made of it.
    """

    def __init__(
        self,
        network: nn.Module,
        scalings: ScalingsFn,
        noise_label: Callable[[Tensor], Tensor],
        *,
        sigma_data: float,
        sigma_min: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.scalings = scalings
        self.noise_label = noise_label
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return x0 (B, C, H, W) for x (B, C, H, W), sigma (B,) and labels (B,) or None."""
        c_skip, c_out, c_in = self.scalings(sigma, self.sigma_data, self.sigma_min)
        label = self.noise_label(sigma).to(x.device, x.dtype)
        raw = self.network(expand(c_in, x) * x, label, labels)
        return expand(c_skip, x) * x + expand(c_out, x) * raw.to(x.dtype)


SCALINGS: dict[str, ScalingsFn] = {"teacher": edm_scalings, "consistency": consistency_scalings}

NOISE_LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": log_label,
    "log_1000": log_label_1000,
}
