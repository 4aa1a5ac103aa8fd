"""Optimizers, by PyTorch's fused kernels where it has them: three to six times its loop on a CPU.

A fused kernel goes through each parameter once and makes no temporaries. RAdam has none of its own:
on a GPU its loop over lists moves three times the bytes, in 27 launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, RAdam

FUSED = ("cpu", "cuda")
"""Kinds of devices with a fused Adam."""
HUGE = 1e12
"""An eps beside which no gradient counts."""


class FusedRAdam(Adam):
    """RAdam as Adam with a rate and an eps that depend on the step t, by Adam's fused kernel.

    RAdam is Adam with its rate times r(t) (Liu et al. 2020, Alg. 2) and, in PyTorch, eps added
    before the correction of the second moment's bias. While the variance of that is not tractable
    (rho(t) <= 5) it takes the corrected first moment alone, to which Adam comes with a huge eps and
    a rate as many times as large. The parameters must step together.

    The steps are counted on a GPU, and here too: to read that count the host would wait. It does so
    where something else has written it, as when a checkpoint is loaded.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler skips a step by not asking for it
        self._read: list[Count] = [Count()] * len(self.param_groups)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step."""
        given = [(group["lr"], group["eps"]) for group in self.param_groups]
        numbers = [self.count(place) + 1 for place in range(len(given))]
        for group, number in zip(self.param_groups, numbers, strict=True):
            rate, eps = rectified(number, group["betas"][1], group["eps"])
            group["lr"], group["eps"] = group["lr"] * rate, eps
        try:
            loss = super().step(closure)
        finally:
            for group, (rate, eps) in zip(self.param_groups, given, strict=True):
                group["lr"], group["eps"] = rate, eps
        counters = map(self.counter, range(len(given)))
        self._read = [Count.of(t, n) for t, n in zip(counters, numbers, strict=True)]
        return loss

    def counter(self, place: int) -> Tensor | None:
        """Return the tensor () that counts a group's steps, if it has taken one."""
        first = self.param_groups[place]["params"][0]
        return self.state[first].get("step") if first in self.state else None

    def count(self, place: int) -> int:
        """Return the steps that a group has taken."""
        counter, known = self.counter(place), self._read[place]
        if counter is None:
            return 0
        return known.number if known.is_of(counter) else int(counter)


class Count(NamedTuple):
    """What a tensor holds, and how often it had been written when it did."""

    tensor: Tensor | None = None
    version: int = 0
    number: int = 0

    @classmethod
    def of(cls, tensor: Tensor | None, number: int) -> Count:
        """Return that a tensor, if there is one, holds a number now."""
        return cls() if tensor is None else cls(tensor, tensor._version, number)

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether it is still what the tensor holds."""
        return self.tensor is tensor and self.version == tensor._version


def rectified(step: int, beta: float, eps: float) -> tuple[float, float]:
    """Return what Adam's rate is multiplied by at a step, counted from 1, and the eps it takes."""
    rho_inf = 2 / (1 - beta) - 1
    correction = 1 - beta**step
    rho = rho_inf - 2 * step * beta**step / correction
    if rho <= 5:
        return HUGE, HUGE
    top, bottom = (rho - 4) * (rho - 2) * rho_inf, (rho_inf - 4) * (rho_inf - 2) * rho
    return math.sqrt(top / bottom), eps / math.sqrt(correction)


def device_type(parameters: list[nn.Parameter]) -> str:
    """Return the kind of device the parameters are on."""
    return parameters[0].device.type


def radam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return RAdam, the optimizer of the paper."""
    given = list(parameters)
    if device_type(given) in FUSED:
        return FusedRAdam(given, lr, betas, eps, weight_decay)
    return RAdam(given, lr, betas, eps, weight_decay, foreach=True)  # of a sharded one, too


def adam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return Adam, the optimizer of EDM; its decay is part of the gradient."""
    given = list(parameters)
    fused = device_type(given) in FUSED
    return Adam(given, lr, betas, eps, weight_decay, fused=fused)


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return Adam with a decay apart from the gradient; without one it is Adam."""
    given = list(parameters)
    fused = device_type(given) in FUSED
    return AdamW(given, lr, betas, eps, weight_decay, fused=fused)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"radam": radam, "adam": adam, "adamw": adamw}
