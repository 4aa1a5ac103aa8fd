"""Evaluation: features, streamed Gaussian statistics, and distances between two sets of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
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

    The trace of the root is the sum of the roots of the eigenvalues of A B, which are those of the
    symmetric R^T B R with A = R R^T: by Cholesky, or by the eigenvectors of an A that is singular.
    Raises InputError for different dimensions or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics of {a.mean.numel()} and of {b.mean.numel()} features",
            "both sides must come from the same feature network",
        )
    for side in (a, b):
        if not (torch.isfinite(side.mean).all() and torch.isfinite(side.covariance).all()):
            raise InputError("the feature statistics are not finite", "look for NaN in the images")
    root = root_of(a.covariance)
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    )
    return max(float(distance), 0.0)


def root_of(covariance: Tensor) -> Tensor:
    """Return R with R R^T = covariance (D, D): its Cholesky factor, or one of a singular matrix."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = factor.diagonal()
    if not failed and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """Return the KID of features a (N, D) and b (M, D), unbiased (Binkowski et al. 2018).

    The mean over random subsets of `size` of the squared MMD with the kernel (x^T y / D + 1)^3.
    Raises InputError for fewer than 2 images.
    """
    _check_features(a, b)
    m = min(len(a), len(b), size)
    draw = np.random.RandomState(seed).choice
    values = []
    for _ in range(subsets):
        y = b[torch.from_numpy(draw(len(b), m, replace=False))].double()
        x = a[torch.from_numpy(draw(len(a), m, replace=False))].double()
        within = _cubic(x, x) + _cubic(y, y)
        own = (within.sum() - within.trace()) / (m * (m - 1))
        values.append(float(own - 2 * _cubic(x, y).mean()))
    spread = torch.tensor(values, dtype=torch.float64)
    error = float(spread.std()) / math.sqrt(subsets) if subsets > 1 else math.nan
    return Estimate(float(spread.mean()), error)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, *, split: int = 5000) -> Estimate:
    """Return exp(E KL(p(y|x) | p(y))) of class logits (N, K) (Salimans et al. 2016).

    The mean over splits of `split` images, in order; its error is over the splits.
    """
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)
        marginal = log_p.exp().mean(0).log()
        scores.append(float((log_p.exp() * (log_p - marginal)).sum(1).mean().exp()))
    spread = torch.tensor(scores, dtype=torch.float64)
    error = float(spread.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return Estimate(float(spread.mean()), error)


class PrecisionRecall(NamedTuple):
    """Shares of images that lie where the other set is dense."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor, made: Tensor, *, k: int = 3, chunk: int = 2048
) -> PrecisionRecall:
    """Return precision and recall of features real (N, D) and made (M, D).

    Kynkaanniemi et al. (2019): an image is covered by a set when it lies within the distance of
    one of its members to that member's k-th nearest neighbour. Distances are taken `chunk` rows at
    a time, in float64. Raises InputError for k images or fewer.
    """
    _check_features(real, made, least=k + 1)
    return PrecisionRecall(
        _covered(made, real, _radii(real, k, chunk), chunk),
        _covered(real, made, _radii(made, k, chunk), chunk),
    )


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Return each row's squared distance to its k-th nearest other row, (N,)."""
    found = [
        _squared(part, features).kthvalue(k + 1, dim=1).values for part in features.split(chunk)
    ]
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Return the share of points within the radius of any centre."""
    hits = [(_squared(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return float(torch.cat(hits).double().mean())


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N, M); 0 between equal rows, which rounding must not part."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2


def _check_features(a: Tensor, b: Tensor, least: int = 2) -> None:
    """Raise InputError for sets that are too small, or of different features."""
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"{a.shape[1]} and {b.shape[1]} features an image", "use one feature network"
        )
    few = min(len(a), len(b))
    if few < least:
        raise InputError(f"{few} images to evaluate", f"give {least} or more")


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
