"""Evaluation: features, streamed Gaussian statistics, and the Frechet distance between two sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.errors import InputError


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of `num` features, float64."""

    mean: Tensor
    covariance: Tensor
    num: int


class GaussianSums:
    """Running sums of features in float64; memory does not grow with the number of images."""

    def __init__(self) -> None:
        self.num = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.outer = torch.zeros((), dtype=torch.float64)
        self.origin = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (B, D); the first batch's mean is subtracted from all, for accuracy."""
        rows = features.detach().double().cpu()
        if self.num == 0:
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.num += rows.shape[0]
        self.total = self.total + rows.sum(0)
        self.outer = self.outer + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """Return mean and covariance (over N - 1). Raises InputError for fewer than 2 images."""
        if self.num < 2:
            raise InputError(
                f"{self.num} image{'s' * (self.num != 1)} to evaluate",
                "a Frechet distance needs 2 or more, and means little under 1,000",
            )
        shift = self.total / self.num
        covariance = (self.outer - self.num * torch.outer(shift, shift)) / (self.num - 1)
        return Gaussian(self.origin + shift, (covariance + covariance.T) / 2, self.num)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: exact for singular covariances too. Raises InputError for different dimensions or
    values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics of {a.mean.numel()} and of {b.mean.numel()} features",
            "both sides must come from the same feature network",
        )
    for side in (a, b):
        if not (torch.isfinite(side.mean).all() and torch.isfinite(side.covariance).all()):
            raise InputError("the feature statistics are not finite", "look for NaN in the images")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    )
    return max(float(distance), 0.0)


class DigitsFeatures(nn.Module):
    """The classifier whose last hidden layer is the feature space of `fd-digits`.

    It learns the class and the paper and ink colours together, so that the features see shape
    and colour both. `forward` returns features; `heads` returns logits and colours.
    """

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, self.WIDTH),
            nn.SiLU(),
        )
        self.classes = nn.Linear(self.WIDTH, 10)
        self.colours = nn.Linear(self.WIDTH, 6)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 64) of images (B, 3, 8, 8) in [-1, 1]. Raises InputError else."""
        if images.shape[1:] != (3, 8, 8):
            c, h, w = images.shape[1:]
            raise InputError(
                f"fd-digits needs RGB images of 8x8, not {w}x{h} with {c} channels",
                "it compares with the bundled digits only",
            )
        features: Tensor = self.layers(images)
        return features

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (B, 10) and paper and ink colours (B, 6) in [-1, 1]."""
        features = self(images)
        return self.classes(features), self.colours(features)


@torch.no_grad()
def statistics(features: nn.Module, images: Iterable[Tensor]) -> Gaussian:
    """Return the Gaussian of the features of batches of images (B, C, H, W) in [-1, 1]."""
    sums = GaussianSums()
    for batch in images:
        sums.add(features(batch))
    return sums.gaussian()
