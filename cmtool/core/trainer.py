"""The training loop, as a generator: it owns the step, its caller owns everything every N steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cmtool.core.data import BatchFn
from cmtool.core.dist import ALONE, Group, shared
from cmtool.core.ema import Ema, update_average
from cmtool.core.losses import Objective
from cmtool.core.noise import Curriculum
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import seeded, step_generator
from cmtool.errors import DivergedError


@dataclass
class TrainState:
    """Everything a run changes. `step` counts finished optimizer steps.

    Without a `target` the loss compares the student with itself (mu = 0) or needs none.
    """

    student: Preconditioned
    target: Preconditioned | None
    emas: dict[str, Ema]
    optimizer: Optimizer
    step: int = 0


@dataclass(frozen=True)
class FitSettings:
    """The numbers of a run. Losses are means over the global batch."""

    steps: int
    batch: int
    seed: int
    lr: float
    warmup_steps: int = 0
    decay_to: float = 1.0
    """Learning rate at the last step as a share of `lr`, reached along a cosine."""
    rounds: int = 1
    """Microbatches a step, accumulated."""
    max_grad_norm: float | None = None
    max_bad_steps: int = 5
    """Non-finite steps in a row before the run ends."""
    precision: str = "fp32"
    group: Group = ALONE


class StepInfo(NamedTuple):
    """What one step did; its tensors are on the device, for whoever wants to wait for them."""

    step: int
    loss: Tensor
    """Of each image of this process, (B,)."""
    sigma: Tensor
    """The noise level of each image, (B,)."""
    grad_norm: Tensor
    """Before clipping, ()."""
    lr: float
    n: int
    mu: float
    skipped: bool
    """The gradient was not finite, so nothing was changed."""
    waited: float
    """Seconds spent waiting for images."""


def learning_rate(settings: FitSettings, step: int, progress: float) -> float:
    """Return the rate of a step: a linear warm-up, then a cosine from lr to decay_to lr.

    `progress` in [0, 1] is the place on the cosine.
    """
    warm = min((step + 1) / settings.warmup_steps, 1.0) if settings.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * warm * (settings.decay_to + (1 - settings.decay_to) * cosine)


def waiting(learner: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return a block in which gradients are summed over processes only in the `last` round."""
    if last or not isinstance(learner, DistributedDataParallel):
        return nullcontext()
    return learner.no_sync()


def start_anew(state: TrainState) -> None:
    """Forget the optimizer's moments and set every weights EMA to the student."""
    state.optimizer.state.clear()
    for ema in state.emas.values():
        update_average(ema.model.parameters(), state.student.parameters(), 0.0)


def fit(
    state: TrainState,
    objective: Objective,
    microbatch: BatchFn,
    curriculum: Curriculum,
    settings: FitSettings,
) -> Iterator[StepInfo]:
    """Yield after each optimizer step until `settings.steps`, changing `state` in place.

    One step: the gradient of the mean loss, the optimizer, the weights EMAs, then the target
    with mu(k) (Song et al. 2023, Alg. 2 and 3; k counts finished steps). A step whose gradient
    is not finite changes nothing but the counter. Raises DivergedError after `max_bad_steps`
    of them in a row.

    The host waits for the device once a step, to read whether the gradient is finite, and before
    the optimizer; what is yielded has not been read.
    """
    student, shards = state.student, settings.rounds * settings.group.world_size
    parameters = [p for p in student.parameters() if p.requires_grad]
    student.train()
    learner = shared(student, settings.group)
    bad_steps = 0
    while state.step < settings.steps:
        stage = curriculum(state.step, settings.steps)
        if stage.fresh:
            start_anew(state)
        rate = learning_rate(settings, state.step, stage.progress)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        losses, sigmas = [], []
        waited = 0.0
        for round_ in range(settings.rounds):
            shard = round_ * settings.group.world_size + settings.group.rank
            generator = step_generator(settings.seed, state.step, shard)
            asked = time.perf_counter()
            x0, labels = microbatch(state.step, shard)
            waited += time.perf_counter() - asked
            autocast = torch.autocast(
                x0.device.type, torch.bfloat16, enabled=settings.precision == "bf16"
            )
            with waiting(learner, last=round_ == settings.rounds - 1):
                with seeded(generator), autocast:
                    target = state.target or student
                    loss, sigma = objective(learner, target, x0, labels, stage, generator)
                (loss.mean() / shards).backward()
            losses.append(loss.detach())
            sigmas.append(sigma)
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, settings.max_grad_norm or float("inf"), foreach=True
        )
        good = bool(torch.isfinite(norm))
        bad_steps = 0 if good else bad_steps + 1
        if good:
            state.optimizer.step()
            num_images = (state.step + 1) * settings.batch
            for ema in state.emas.values():
                ema.update(student, batch=settings.batch, num_images=num_images)
            if state.target is not None:
                update_average(state.target.parameters(), student.parameters(), stage.mu)
        elif bad_steps >= settings.max_bad_steps:
            raise DivergedError(
                f"the gradient was not finite {bad_steps} steps in a row, to step {state.step}",
                "lower train.lr; the last checkpoint is intact",
            )
        state.step += 1
        yield StepInfo(
            step=state.step,
            loss=torch.cat(losses),
            sigma=torch.cat(sigmas),
            grad_norm=norm,
            lr=rate,
            n=stage.n,
            mu=stage.mu,
            skipped=not good,
            waited=waited,
        )
