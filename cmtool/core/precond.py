"""Preconditioning: from a raw network F to a Denoiser, x0 = c_skip x + c_out F(c_in x, c_noise)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.tensors import channels_last, doubled, expand, to_device


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


def vp_scalings(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.0) -> Scalings:
    """Return the scalings of VP and iDDPM networks, which predict noise (EDM, Table 1)."""
    return Scalings(c_skip=torch.ones_like(sigma), c_out=-sigma, c_in=1 / (sigma**2 + 1).sqrt())


def ve_scalings(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.0) -> Scalings:
    """Return the scalings of VE networks (EDM, Table 1)."""
    return Scalings(c_skip=torch.ones_like(sigma), c_out=sigma, c_in=torch.ones_like(sigma))


def flow_scalings(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.0) -> Scalings:
    """Return the scalings of a flow along straight lines, z = (1 - t) x0 + t noise.

    The network predicts u, the mean of dz/dt (MeanFlow, Geng et al. 2025): t = sigma / (1 + sigma),
    z = x / (1 + sigma) and x0 = z - t u.
    """
    keep = 1 / (1 + sigma)
    return Scalings(c_skip=keep, c_out=-sigma * keep, c_in=keep)


def flow_label(sigma: Tensor) -> Tensor:
    """Return t = sigma / (1 + sigma), the time of a flow along straight lines."""
    return sigma / (1 + sigma)


def trigflow_label(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return t = arctan(sigma / sigma_data), the time of TrigFlow (Lu & Song 2025, sec. 3.1).

    Unlike a logarithm it changes little near both ends, which keeps df/dt small there.
    """
    return torch.atan(sigma / sigma_data)


def log_label(sigma: Tensor) -> Tensor:
    """Return c_noise = ln(sigma) / 4 (Karras et al. 2022, Table 1; the JAX release)."""
    return 0.25 * torch.log(sigma)


def log_label_1000(sigma: Tensor) -> Tensor:
    """Return c_noise = 250 ln(sigma) (the PyTorch release and diffusers)."""
    return 1000 * 0.25 * torch.log(sigma + 1e-44)


def ve_label(sigma: Tensor) -> Tensor:
    """Return c_noise = ln(sigma / 2) (EDM, Table 1, VE)."""
    return torch.log(0.5 * sigma)


def vp_label(
    sigma: Tensor, *, beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000
) -> Tensor:
    """Return c_noise = (steps - 1) t(sigma) of the VP process (EDM, Table 1, VP).

    t is the inverse of sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1.
    """
    root = (beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt()
    return (steps - 1) * (root - beta_min) / beta_d


def iddpm_label(
    sigma: Tensor, *, c_1: float = 0.001, c_2: float = 0.008, steps: int = 1000
) -> Tensor:
    """Return c_noise = steps - 1 - j of the level u_j nearest to sigma (EDM, Table 1, iDDPM)."""
    levels = to_device(
        torch.tensor(iddpm_sigmas(c_1, c_2, steps), dtype=torch.float64), sigma.device
    )
    index = (doubled(sigma)[:, None] - levels).abs().argmin(1)
    return (steps - 1 - index).to(sigma.dtype)


@lru_cache
def iddpm_sigmas(c_1: float = 0.001, c_2: float = 0.008, steps: int = 1000) -> tuple[float, ...]:
    """Return u_0 > u_1 > ... > u_steps = 0, the levels of iDDPM's cosine schedule."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / (steps * (c_2 + 1))) ** 2

    levels = [0.0]
    for j in range(steps, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), c_1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return tuple(reversed(levels))


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

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        sigma_to: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Return x0 (B, C, H, W) for x (B, C, H, W), sigma (B,) and labels (B,) or None.

        `sigma_to` (B,) is heard by the network of a flow map alone; None is 0, the end of the path.
        `augment_labels` (B, 9) say how a teacher's training images were warped.
        """
        c_skip, c_out, c_in = self.scalings(sigma, self.sigma_data, self.sigma_min)
        label = self.noise_label(sigma).to(x.device, x.dtype)
        more = {} if augment_labels is None else {"augment_labels": augment_labels}
        if is_two_time(self.network):
            to = torch.zeros_like(sigma) if sigma_to is None else sigma_to
            more["label_to"] = self.noise_label(to.clamp_min(self.sigma_min)).to(label)
        raw = self.network(channels_last(expand(c_in, x) * x), label, labels, **more)
        return expand(c_skip, x) * x + expand(c_out, x) * raw.to(x.dtype)


def is_two_time(network: nn.Module) -> bool:
    """Tell whether a raw network takes a second noise label, as that of a flow map does."""
    return bool(getattr(network, "two_time", False))


SCALINGS: dict[str, ScalingsFn] = {
    "consistency": consistency_scalings,
    "edm": edm_scalings,
    "flow": flow_scalings,
    "vp": vp_scalings,
    "ve": ve_scalings,
    "iddpm": vp_scalings,
}
"""A student has its boundary f(x, sigma) = x at sigma_min (`consistency`), or at 0 (`edm`)."""

NOISE_LABELS: dict[str, Callable[..., Tensor]] = {
    "flow": flow_label,
    "trigflow": trigflow_label,
    "log": log_label,
    "log_1000": log_label_1000,
    "vp": vp_label,
    "ve": ve_label,
    "iddpm": iddpm_label,
}
