"""Exponential moving averages of parameters: the target network's, and the ones that are kept.

The two are different things: the target makes the loss, a weights EMA is what is sampled from. The
profile of an average is how much each earlier step counts in it. Profiles that are powers of the
step (Karras et al. 2024, sec. 3) can be chosen after training, from stored averages of others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cmtool.core.precond import Preconditioned
from cmtool.core.tensors import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """Set average = decay average + (1 - decay) current, in place; decay 0 copies."""
    old, new = local(average), local(current)
    if decay == 0:
        torch._foreach_copy_(old, new)
    else:
        torch._foreach_lerp_(old, new, 1 - decay)


def frozen_copy(model: ModuleT) -> ModuleT:
    """Return a float32 copy of the model that takes no gradients, in the mode of the original."""
    twin = copy.deepcopy(model).float()
    return twin.requires_grad_(False)


class Ema:
    """A weights EMA: of a fixed rate, of a half-life in images, or with a power as its profile.

    With `rampup` r the half-life is at most r times the images seen so far, so that a short run
    forgets its random start (Karras et al. 2022 use 0.05). A power's half-life always grows so;
    `sigma_rel` is the width of its profile as a share of the run so far (Karras et al. 2024).
    """

    def __init__(
        self,
        model: Preconditioned,
        *,
        rate: float | None = None,
        halflife_images: float | None = None,
        rampup: float | None = None,
        sigma_rel: float | None = None,
    ) -> None:
        self.model = frozen_copy(model).eval()
        self.rate = rate
        self.halflife_images = halflife_images
        self.rampup = rampup
        self.gamma = None if sigma_rel is None else gamma_of(sigma_rel)

    def decay(self, batch: int, num_images: int) -> float:
        """Return the decay of an update; `num_images` were seen before the `batch` of this step.

        With a ramp-up the first update copies, as EDM's does; so does that of a power.
        """
        if self.gamma is not None:
            return power_decay(self.gamma, (num_images + batch) / batch)
        if self.rate is not None and self.rampup is None:
            return self.rate
        halflife = self.halflife_images
        if halflife is None:
            assert self.rate is not None
            halflife = batch * math.log(0.5) / math.log(self.rate)
        if self.rampup is not None:
            halflife = min(halflife, self.rampup * num_images)
        return 0.5 ** (batch / max(halflife, 1e-8))


def power_decay(gamma: float, step: float) -> float:
    """Return (1 - 1/step)^(gamma + 1), the decay at a step >= 1 (Karras et al. 2024, eq. 127).

    After T steps, step t counts (t^(gamma+1) - (t-1)^(gamma+1)) / T^(gamma+1): nearly
    (gamma + 1) t^gamma / T^(gamma+1).
    """
    return (1 - 1 / step) ** (gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a profile by its width: the largest root of a cubic (eq. 126).

    `sigma_rel` is above 0 and at most 12^-0.5 = 0.2887, the width of a plain mean, for which it is
    0; 0.05 is 16.97, 0.10 is 6.94.
    """
    t = sigma_rel**-2
    gamma = math.sqrt(t)  # right of the root, from where Newton's steps descend to it
    for _ in range(60):
        cubic = ((gamma + 7) * gamma + 16 - t) * gamma + 12 - t
        gamma -= cubic / ((3 * gamma + 14) * gamma + 16 - t)
    return gamma


class Profile(NamedTuple):
    """Of an average with a power as its profile: the step it was taken at, and its exponent."""

    step: int
    gamma: float


def inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles (Karras et al. 2024, eq. 151).

    A profile is (gamma + 1) t^gamma / step^(gamma + 1) up to its step, and 0 after it.
    """
    if a.step > b.step:
        a, b = b, a
    ratio = (a.step / b.step) ** b.gamma / b.step
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * ratio


def posthoc_weights(stored: Sequence[Profile], wanted: Profile) -> Tensor:
    """Return the factors of stored averages whose sum is nearest to the wanted one, (n,) float64.

    Nearest are the profiles, in the integral of their squared difference (Karras et al. 2024,
    Algorithm 3); no two of `stored` may be equal. The factors sum to 1, and some are negative.
    """
    gram = [[inner_product(a, b) for b in stored] for a in stored]
    products = [inner_product(a, wanted) for a in stored]
    scale = torch.tensor([row[i] for i, row in enumerate(gram)], dtype=torch.float64).rsqrt()
    matrix = torch.tensor(gram, dtype=torch.float64) * torch.outer(scale, scale)
    right = torch.tensor(products, dtype=torch.float64) * scale
    factors = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0] * scale
    return factors / factors.sum()
