"""Gaussians of features: sums without rounding, and the Frechet distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.errors import InputError

UNITS = 2.0**24  # units of the sums in 1
DIGIT = 2**19  # the base of their digits
MAX_ROWS = 2**14  # rows whose products of digits float64 sums exactly
NEGATIVE = 1e-3  # how far below 0 rounding may put an eigenvalue, relative to the largest
SKEW = 1e-4  # how far a covariance may be from symmetric, relative to its largest value


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of `num` features, float64."""

    mean: Tensor
    covariance: Tensor
    num: int


class GaussianSums:
    """Sums of features and of their products: exact, so that nothing depends on their order.

    Features are taken as multiples of 2^-24 below 2^14, in two digits of 19 bits; sums of products
    of digits fit int64. Neither batches, processes nor the order of images change a bit, and
    memory does not grow with the number of images. The sums are where the features are: a GPU is
    waited for once, at the end.
    """

    def __init__(self, width: int) -> None:
        self.num = 0
        self.is_sound = torch.ones((), dtype=torch.bool)
        shapes = [(width,)] * 2 + [(width, width)] * 3
        self.sums = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
        """Of the digits (high, low), and of their products (high high, high low, low low)."""

    def add(self, features: Tensor) -> None:
        """Add features (B, D). Raises InputError for what is not finite, or not below 2^14.

        Of features on a GPU `check` raises it.
        """
        self.is_sound = self.is_sound.to(features.device)
        self.sums = [total.to(features.device) for total in self.sums]
        for rows in features.detach().double().split(MAX_ROWS):
            units = (rows * UNITS).round()
            self.is_sound &= (units.abs() < DIGIT**2).all()  # NaN is not below it, either
            if features.device.type == "cpu":
                self.check()
            high = (units / DIGIT).round()
            low = units - high * DIGIT
            parts = (high.sum(0), low.sum(0), high.T @ high, high.T @ low, low.T @ low)
            self.num += len(rows)
            for total, part in zip(self.sums, parts, strict=True):
                total += part.long()

    def check(self) -> None:
        """Raise InputError if what was added is not finite, or not below 2^14."""
        if not bool(self.is_sound):
            what = "the features are not finite, or above 16,384"
            hint = "look at the feature network: its outputs must be finite and below 16,384"
            raise InputError(what, hint)

    def add_others(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other processes: `total` returns the sum over all of them."""
        self.num = int(total(torch.tensor(self.num)))
        self.sums = [total(part) for part in self.sums]

    def gaussian(self) -> Gaussian:
        """Return mean and covariance (over N - 1), on the CPU.

        Raises InputError for fewer than 2 images, and where `check` does.
        """
        self.check()
        if self.num < 2:
            hint = "give 2 or more; statistics of fewer than 1,000 mean little"
            raise InputError(f"{self.num} image{'s' * (self.num != 1)} to evaluate", hint)
        high, low, high_high, high_low, low_low = (total.cpu() for total in self.sums)
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
        what = f"statistics of {a.mean.numel()} and of {b.mean.numel()} features"
        raise InputError(what, "both sides must come from the same feature network")
    for side in (a, b):
        if not (torch.isfinite(side.mean).all() and torch.isfinite(side.covariance).all()):
            hint = "the statistics are damaged: make them again"
            raise InputError("the feature statistics are not finite", hint)
        skew = (side.covariance - side.covariance.T).abs().max()
        if skew > SKEW * side.covariance.abs().max():
            raise InputError("a covariance is not symmetric", "its statistics are damaged")
    root = root_of(a.covariance)
    values = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    _check_positive(values, 1e-6 * float(a.covariance.norm() * b.covariance.norm()))
    cross = values.clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return max(float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross), 0.0)


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
        hint = "its statistics are damaged: make them again"
        raise InputError("a covariance has negative eigenvalues", hint)
