"""Evaluation: Gaussian statistics of features, and what is computed from features of two sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import InputError

UNITS, DIGIT, MAX_ROWS = 2.0**24, 2**19, 2**14
"""Of the sums: units in 1, the base of its digits, and rows whose products float64 sums exactly."""

NEGATIVE, SKEW = 1e-3, 1e-4
"""What rounding may do to a covariance (in a file of float32), relative to its largest: how far
below 0 it may put an eigenvalue, and by how much a value and its mirror image may differ."""


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of `num` features, float64."""

    mean: Tensor
    covariance: Tensor
    num: int


class GaussianSums:
    """Sums of features and of their products: exact, so that nothing depends on their order.

    Features are taken as multiples of 2^-24 below 2^14, in two digits of 19 bits; sums of products
    of digits are whole numbers that fit int64. Neither batches, nor the number of processes, nor
    the order of images change a bit, and memory does not grow with the number of images.
    """

    def __init__(self, width: int) -> None:
        self.num = 0
        shapes = [(width,)] * 2 + [(width, width)] * 3
        self.sums = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
        """Of the digits (high, low), and of their products (high high, high low, low low)."""

    def add(self, features: Tensor) -> None:
        """Add features (B, D). Raises InputError for what is not finite, or not below 2^14."""
        for rows in features.detach().double().split(MAX_ROWS):
            units = (rows * UNITS).round()
            if not bool((units.abs() < DIGIT**2).all()):  # NaN is not, either
                raise InputError(
                    "the features are not finite, or above 16,384", "look for NaN in the images"
                )
            high = (units / DIGIT).round()
            low = units - high * DIGIT
            parts = (high.sum(0), low.sum(0), high.T @ high, high.T @ low, low.T @ low)
            self.num += len(rows)
            for total, part in zip(self.sums, parts, strict=True):
                total += part.long().cpu()

    def share(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put, for every sum, what `total` makes of it: that of all processes."""
        self.num = int(total(torch.tensor(self.num)))
        self.sums = [total(part) for part in self.sums]

    def gaussian(self) -> Gaussian:
        """Return mean and covariance (over N - 1). Raises InputError for fewer than 2 images."""
        if self.num < 2:
            raise InputError(
                f"{self.num} image{'s' * (self.num != 1)} to evaluate",
                "statistics need 2 or more, and mean little under 1,000",
            )
        high, low, high_high, high_low, low_low = self.sums
        n = self.num
        # both digits less a whole number near their mean, still without rounding
        a, b = ((digit.double() / n).round().long() for digit in (high, low))
        high_high = high_high - torch.outer(a, high) - torch.outer(high - n * a, a)
        high_low = high_low - torch.outer(a, low) - torch.outer(high - n * a, b)
        low_low = low_low - torch.outer(b, low) - torch.outer(low - n * b, b)
        products = high_high.double() * DIGIT**2 + low_low.double()
        products += (high_low + high_low.T).double() * DIGIT
        left = (high - n * a).double() * DIGIT + (low - n * b).double()
        covariance = (products - torch.outer(left, left) / n) / (n - 1) / UNITS**2
        mean = (a.double() * DIGIT + b.double() + left / n) / UNITS
        return Gaussian(mean, covariance, n)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of A B, which are those of the
    symmetric R^T B R with A = R R^T: by Cholesky, or by the eigenvectors of an A that is singular.
    Raises InputError for different dimensions, values that are not finite, and no covariances.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics of {a.mean.numel()} and of {b.mean.numel()} features",
            "both sides must come from the same feature network",
        )
    for side in (a, b):
        if not (torch.isfinite(side.mean).all() and torch.isfinite(side.covariance).all()):
            raise InputError("the feature statistics are not finite", "look for NaN in the images")
        skew = (side.covariance - side.covariance.T).abs().max()
        if skew > SKEW * side.covariance.abs().max():
            raise InputError("a covariance is not symmetric", "its statistics are damaged")
    root = root_of(a.covariance)
    values = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    _check_positive(values, 1e-6 * float(a.covariance.norm() * b.covariance.norm()))
    cross = values.clamp(min=0).sqrt().sum()
    distance = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    )
    return max(float(distance), 0.0)


def root_of(covariance: Tensor) -> Tensor:
    """Return R with R R^T = covariance (D, D): its Cholesky factor, or one of a singular matrix.

    Raises InputError for eigenvalues that are negative beyond rounding.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = factor.diagonal()
    if not failed and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    _check_positive(values)
    return vectors * values.clamp(min=0).sqrt()


def _check_positive(values: Tensor, rounding: float = 0.0) -> None:
    """Raise InputError for ascending eigenvalues that those of covariances cannot be."""
    if float(values[0]) < -NEGATIVE * max(float(values[-1]), 0.0) - rounding:
        raise InputError(
            "a covariance has negative eigenvalues", "its statistics are damaged: make them again"
        )


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """Return the KID of features a (N, D) and b (M, D), unbiased (Binkowski et al. 2018).

    The mean over random subsets of `size` of the squared MMD with the kernel (x^T y / D + 1)^3.
    Its error is over the subsets: there is none where each is all of both sets. Raises InputError
    for fewer than 2 images, and for features that are not finite.
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
    differ = subsets > 1 and m < max(len(a), len(b))
    error = float(spread.std()) / math.sqrt(subsets) if differ else math.nan
    return Estimate(float(spread.mean()), error)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, *, split: int = 5000) -> Estimate:
    """Return exp(E KL(p(y|x) | p(y))) of class logits (N, K) (Salimans et al. 2016).

    The mean over splits of `split` images, in order; its error is over the splits. Raises
    InputError for logits that are not finite.
    """
    _check_finite(logits)
    scores = []
    for part in logits.double().split(split):
        p = part.softmax(1)
        entropies = torch.special.entr(p).sum(1)  # 0 of what is 0
        scores.append(float((torch.special.entr(p.mean(0)).sum() - entropies.mean()).exp()))
    spread = torch.tensor(scores, dtype=torch.float64)
    error = float(spread.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return Estimate(float(spread.mean()), error)


class PrecisionRecall(NamedTuple):
    """Shares of images that lie where the other set is dense."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor, made: Tensor, *, k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Return precision and recall of features real (N, D) and made (M, D).

    Kynkaanniemi et al. (2019): an image is covered by a set when it lies within the distance of
    one of its members to that member's k-th nearest neighbour. Distances are taken in float64,
    `chunk` rows and columns at a time. Raises InputError for k images or fewer, and for features
    that are not finite.
    """
    _check_features(real, made, least=k + 1)
    return PrecisionRecall(
        _covered(made, real, _radii(real, k, chunk), chunk),
        _covered(real, made, _radii(made, k, chunk), chunk),
    )


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Return each row's squared distance to its k-th nearest other row, (N,)."""
    found = []
    for part in features.split(chunk):
        nearest = torch.empty(len(part), 0, dtype=torch.float64, device=part.device)
        for others in features.split(chunk):
            nearest = torch.cat([nearest, _squared(part, others)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        found.append(nearest.amax(1))
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Return the share of points within the radius of any centre."""
    hits = 0
    for part in points.split(chunk):
        covered = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for some, within in zip(centres.split(chunk), radii.split(chunk), strict=True):
            covered |= (_squared(part, some) <= within).any(1)
        hits += int(covered.sum())
    return hits / len(points)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N, M), by one product; 0 where they are lost in its rounding.

    So it is 0 between equal rows.
    """
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = norms - 2 * a @ b.T
    return torch.where(squared < 1e-12 * norms, 0.0, squared)


def _check_features(a: Tensor, b: Tensor, least: int = 2) -> None:
    """Raise InputError for sets that are too small, of different features, or not finite."""
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"{a.shape[1]} and {b.shape[1]} features an image", "use one feature network"
        )
    few = min(len(a), len(b))
    if few < least:
        raise InputError(
            f"{few} image{'s' * (few != 1)} to evaluate", f"give {least} or more on each side"
        )
    _check_finite(a)
    _check_finite(b)


def _check_finite(features: Tensor) -> None:
    """Raise InputError for NaN, or infinity."""
    if not bool(torch.isfinite(features).all()):
        raise InputError(
            "the features are not finite", "look for a damaged weight file, or statistics"
        )
