"""The training loop, as a generator: it owns the step, its caller owns everything every N steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from cmtool.core.ema import update_average
from cmtool.core.methods import Before, Models
from cmtool.core.networks.edm2 import MPLayer
from cmtool.core.noise import Curriculum, Stage
from cmtool.core.objective import Objective, Point
from cmtool.core.paths import Draw, Drawn
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import keyed_generator, seeded, step_generator
from cmtool.core.tensors import local
from cmtool.errors import DivergedError
from cmtool.system.devices import autocast
from cmtool.system.dist import Group
from cmtool.system.parallel import shared, whole
from cmtool.training.state import FitSettings, TrainState

MIN_SCALE = 1.0
"""A loss that is scaled by less, and overflows still, is no matter of fp16's range any more."""


class Batch(NamedTuple):
    """What one process saw in one step: x0 (B, C, H, W), labels, sigma and loss, each (B,).

    `shards` are the places of its microbatches in the global batch; with seed and step they key
    their randomness.
    """

    x0: Tensor
    labels: Tensor | None
    sigma: Tensor
    loss: Tensor
    shards: tuple[int, ...]


class Fault(NamedTuple):
    """Why a step was skipped: the first parameter whose gradient is not finite, and an image.

    The image is that of the largest loss, and NaN is larger than all; `image` is its place in the
    microbatch `shard`.
    """

    parameter: str | None
    shard: int
    image: int
    sigma: float
    loss: float

    def __str__(self) -> str:
        """Return it in words."""
        where = f"image {self.image} of shard {self.shard} at sigma {self.sigma:.6g}"
        if not math.isfinite(self.loss):
            return f"the loss of {where} is {self.loss}"
        what = f"of {self.parameter}" if self.parameter else "norm"
        return f"the gradient {what} is not finite; the largest loss, {self.loss:.4g}, has {where}"


class StepInfo(NamedTuple):
    """What one step did; its tensors are on the device, for whoever wants to wait for them.

    Each image of this process has a loss and a sigma, (B,). grad_norm, (), is that before clipping.
    """

    step: int
    loss: Tensor
    sigma: Tensor
    grad_norm: Tensor
    lr: float
    n: int
    mu: float
    skipped: bool
    """The gradient was not finite, so nothing was changed."""
    waited: float
    """Seconds until the images, or the points of the teacher's paths, were there."""
    fault: str = ""
    """Why the step was skipped, in words."""


class Diverged(DivergedError):
    """Too many steps in a row were not finite; `batch` is the last of them, `info` its news."""

    def __init__(self, what: str, hint: str, info: StepInfo, batch: Batch) -> None:
        super().__init__(what, hint)
        self.info, self.batch = info, batch


def learning_rate(settings: FitSettings, step: int, progress: float) -> float:
    """Return the rate of a step: a linear warm-up, then a cosine from lr to decay_to lr.

    `progress` in [0, 1] is the place on the cosine. After `steady_steps` the rate falls with the
    root of the step too, as EDM2's.
    """
    warm = min((step + 1) / settings.warmup_steps, 1.0) if settings.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    steady = min(math.sqrt(settings.steady_steps / (step + 1)), 1.0) if settings.steady_steps else 1
    return settings.lr * warm * steady * (settings.decay_to + (1 - settings.decay_to) * cosine)


@contextmanager
def sync_in_last_round(models: Models, *, last: bool) -> Iterator[None]:
    """Sum the gradients over processes after the backward pass of the `last` round only."""
    with ExitStack() as stack:
        for model in (models.student, models.own):
            if not last and isinstance(model, DistributedDataParallel):
                stack.enter_context(model.no_sync())
        yield


def fit(
    state: TrainState,
    objective: Objective,
    microbatch: Draw,
    curriculum: Curriculum,
    settings: FitSettings,
    before: Before | None = None,
) -> Iterator[StepInfo]:
    """Yield after each optimizer step until `settings.steps`, changing `state` in place.

    One step: the gradient of the mean loss, the optimizer, the weights EMAs, then the target
    with mu(k) (Song et al. 2023, Alg. 2 and 3; k counts finished steps). A step whose loss or
    gradient is not finite changes nothing but the counter. Raises Diverged after `max_bad_steps`
    such steps in a row. In fp16 a gradient that overflows halves the scale of the loss, and counts
    as one of them only when that has sunk below 1. At the start and after each step the weights of
    EDM2's layers are replaced by their normalised selves: not between, where a run may be stopped.

    The host waits for the device once a step, to read whether the gradient is finite, and before
    the optimizer; what is yielded has not been read.
    """
    walked = Walked(state)
    if state.step == 0:
        walked.normalise()
    state.student.train()
    own = None if state.own is None else shared(state.own, settings.group)
    student = shared(state.student, settings.group)
    models = Models(student, state.target or state.student, own=own)
    is_new = settings.compile and settings.group.world_size > 1
    while state.step < settings.steps:
        seen = state.step * settings.batch
        stage = curriculum(state.step, settings.steps)._replace(images=seen)
        if before is not None:
            stage = prepared(before, state, microbatch, stage, settings)
        if is_new:
            compile_apart(state, models, objective, microbatch, stage, settings)
            is_new = False
        if stage.fresh:  # the optimizer has no moments, and each weights EMA is the student
            state.optimizer.state.clear()
            for _, average in walked.averages:
                update_average(average, walked.student, 0.0)
        rate = learning_rate(settings, state.step, stage.progress)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        batch, waited = accumulate(state, models, objective, microbatch, stage, settings)
        norm, fault = descend(state, walked, batch, stage, settings)
        walked.normalise()
        info = StepInfo(
            step=state.step + 1, loss=batch.loss, sigma=batch.sigma, grad_norm=norm, lr=rate,
            n=stage.n, mu=stage.mu, skipped=fault is not None,
            fault=fault_text(fault, state.scaler), waited=waited,
        )  # fmt: skip
        if state.bad_steps >= settings.max_bad_steps:
            what = f"not finite {state.bad_steps} steps in a row, to step {info.step}: {info.fault}"
            remedy = "start again with a lower train.lr, or --set train.max_grad_norm=1"
            raise Diverged(what, f"{remedy}; the last checkpoint is intact", info, batch)
        state.step += 1
        yield info


def prepared(
    before: Before, state: TrainState, microbatch: Draw, stage: Stage, settings: FitSettings
) -> Stage:
    """Return the stage of a step as its method wants it, by the first microbatch of the step."""

    def images() -> tuple[Tensor, Tensor | None]:
        x0, labels, *_ = microbatch(state.step, 0)
        return x0, labels

    generator = keyed_generator("before", settings.seed, state.step)
    student = state.student.eval()
    stage = before(student, state.own, images, stage, generator)
    student.train()
    return stage


class Walked:
    """The tensors of a state, listed once: to walk through the modules each step takes long."""

    def __init__(self, state: TrainState) -> None:
        self.student: list[Tensor] = list(state.student.parameters())
        own = () if state.own is None else state.own.parameters()
        self.learned = [p for p in (*self.student, *own) if p.requires_grad]
        trained = [m for m in (state.student, state.own) if m is not None]
        layers = (part for model in trained for part in model.modules())
        self.forced = [p for p in layers if isinstance(p, MPLayer) and p.weight.requires_grad]
        self.averages = [(ema, list(ema.model.parameters())) for ema in state.emas.values()]
        self.target = [] if state.target is None else list(state.target.parameters())

    def normalise(self) -> None:
        """Replace the weights of EDM2's layers that learn by their normalised selves."""
        for layer in self.forced:
            layer.normalise()


def descend(
    state: TrainState, walked: Walked, batch: Batch, stage: Stage, settings: FitSettings
) -> tuple[Tensor, Fault | None]:
    """Step the optimizer, the averages and the target; return the gradient's norm, and a fault.

    With a fault nothing is changed but the count of bad steps, and the target where mu is 0.
    """
    scaler = state.scaler
    if scaler is not None:
        scaler.unscale_(state.optimizer)
    grads = (p.grad for p in walked.learned if p.grad is not None)
    total = torch.nn.utils.get_total_norm(list(grads), foreach=True)  # nothing keeps this list
    norm = whole(total)
    settings.group.line_up()
    good = bool(torch.isfinite(norm))  # here the host waits
    fault = None if good else find_fault(state.student, batch, settings.group)
    if scaler is not None:
        scaler.update()
    if good:
        if (limit := settings.max_grad_norm) is not None:
            torch.nn.utils.clip_grads_with_norm_(walked.learned, limit, total, foreach=True)
        state.optimizer.step()
        for ema, average in walked.averages:
            update_average(average, walked.student, ema.decay(settings.batch, stage.images))
        state.bad_steps = 0
    elif fault is not None and not is_overflow(fault, scaler):
        state.bad_steps += 1
    if walked.target and (good or stage.mu == 0):  # 0 hands on a stage's student
        update_average(walked.target, walked.student, stage.mu)
    return norm, fault


def compile_apart(
    state: TrainState,
    models: Models,
    objective: Objective,
    microbatch: Draw,
    stage: Stage,
    settings: FitSettings,
) -> None:
    """Compile what a step computes, and wait until all processes have done so.

    One may take minutes longer than another, which in a sum over the processes would count as
    silence. So a step is computed without such a sum, and its gradients are dropped.
    """

    def compile_step() -> None:
        accumulate(state, models, objective, microbatch, stage, settings, sums=False)

    settings.group.together(compile_step, f"compiled {state.step}")
    state.optimizer.zero_grad(set_to_none=True)


def accumulate(
    state: TrainState,
    models: Models,
    objective: Objective,
    microbatch: Draw,
    stage: Stage,
    settings: FitSettings,
    *,
    sums: bool = True,
) -> tuple[Batch, float]:
    """Return a step's batch, and the seconds spent waiting for it; the gradients gain its own.

    They are those of the mean loss over the global batch, times the scale of fp16; without `sums`
    those of this process alone.
    """
    group = settings.group
    shards = tuple(range(group.rank, settings.rounds * group.world_size, group.world_size))
    parts, waited = [], 0.0
    for shard in shards:
        generator = step_generator(settings.seed, state.step, shard)
        asked = time.perf_counter()
        x0, labels, noise, level = Drawn(*microbatch(state.step, shard))
        point = () if noise is None or level is None else (Point(noise, level),)
        waited += time.perf_counter() - asked
        with sync_in_last_round(models, last=sums and shard == shards[-1]):
            with seeded(generator), autocast(x0.device.type, settings.precision):
                loss, sigma = objective(models, x0, labels, stage, generator, *point)
            mean = guarded_mean(loss) / (settings.rounds * group.world_size)
            (state.scaler.scale(mean) if state.scaler is not None else mean).backward()
        parts.append((x0, labels, sigma, loss.detach()))
    images, classes, sigmas, losses = zip(*parts, strict=True)
    known = [labels for labels in classes if labels is not None]
    labels = torch.cat(known) if known else None
    return Batch(torch.cat(images), labels, torch.cat(sigmas), torch.cat(losses), shards), waited


def guarded_mean(loss: Tensor) -> Tensor:
    """Return the mean of the losses (B,); unless it is finite, no gradient is.

    So the sum of the gradients over processes tells all of them of a loss that is not.
    """
    mean = loss.mean()
    return mean * torch.where(torch.isfinite(mean.detach()), 1.0, torch.nan)


def find_fault(student: Preconditioned, batch: Batch, group: Group) -> Fault:
    """Return what is not finite in a step; all processes call this and get the same answer."""
    place = int(batch.loss.argmax())
    grads = {name: p.grad for name, p in student.network.named_parameters()}
    parts = ((name, local([grad])) for name, grad in grads.items() if grad is not None)
    bad = (name for name, held in parts if not all(torch.isfinite(t).all() for t in held))
    round_, image = divmod(place, len(batch.loss) // len(batch.shards))
    sigma, loss = float(batch.sigma[place]), float(batch.loss[place])
    faults = group.gather(Fault(next(bad, None), batch.shards[round_], image, sigma, loss))
    found = [fault.parameter for fault in faults if fault.parameter is not None]
    worst = max(faults, key=lambda f: f.loss if math.isfinite(f.loss) else math.inf)
    return worst._replace(parameter=min(found, key=list(grads).index, default=None))


def is_overflow(fault: Fault, scaler: GradScaler | None) -> bool:
    """Tell whether a smaller scale of the loss may mend the fault, and can still be had."""
    if scaler is None or fault.parameter is None or not math.isfinite(fault.loss):
        return False
    return scaler.get_scale() >= MIN_SCALE


def fault_text(fault: Fault | None, scaler: GradScaler | None) -> str:
    """Return a fault in words, "" for none."""
    if fault is None or scaler is None:
        return str(fault or "")
    return f"{fault}; the loss is scaled by {scaler.get_scale():g} now"
