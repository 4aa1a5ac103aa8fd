"""How much of a machine's arithmetic training uses: the FLOPs of a step, and a measured peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cmtool.core.methods import Models
from cmtool.core.noise import karras_sigmas
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import keyed_generator, seeded, step_generator
from cmtool.models import Model
from cmtool.presets import build
from cmtool.presets.schema import Card, Preset
from cmtool.system.devices import shapes_only, synchronise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED_SECONDS = 0.05
"""Each of two kernels is repeated for as long."""


def step_flops(preset: Preset, teacher: Model | None) -> int | None:
    """Return the FLOPs of an optimizer step over the global batch, None if they cannot be counted.

    Counted are the matrix products and convolutions of the objective and its backward pass, on the
    meta device, which knows shapes only, for one image: teacher, target, student and the network
    of LPIPS as the method uses them. An operation the counter does not know counts as nothing.
    """
    with suppress(Exception):  # a network that the meta device cannot run is trained all the same
        step = shapes_of_step(preset, teacher)
        with FlopCounterMode(display=False) as counter:
            step.loss().sum().backward()
        return counter.get_total_flops() * preset.train.batch or None
    return None


class ShapesOfStep(NamedTuple):
    """The models of a step on one image, on the meta device; `loss` computes its loss (1,)."""

    student: Preconditioned
    teacher: Preconditioned | None
    models: Models
    loss: Callable[[], Tensor]


def shapes_of_step(preset: Preset, teacher: Model | None) -> ShapesOfStep:
    """Return a training step on one image, of shapes without numbers."""
    student = shape_of(preset).requires_grad_(True).train()
    frozen = shape_of(teacher.preset) if teacher else None
    objective = build.build_objective(preset, frozen, "meta")
    x0 = torch.empty(1, preset.model.channels, *preset.model.image_size, device="meta")
    classes = preset.model.num_classes
    labels = torch.empty(1, dtype=torch.int64, device="meta") if classes else None
    grid = karras_sigmas(3, *build.noise_range(preset))  # of a method that makes its own
    stage = build.build_curriculum(preset)(0, preset.train.steps)._replace(grid=grid)
    target = shape_of(preset) if preset.loss.target in ("ema", "previous") else student
    own = build.method_row(preset).owns
    models = Models(student, target, own=own().to("meta") if own else None)

    def loss() -> Tensor:
        return objective(models, x0, labels, stage, step_generator(0, 0, 0)).loss

    return ShapesOfStep(student, frozen, models, loss)


def shape_of(card: Card) -> Preconditioned:
    """Return a card's model on the meta device, without gradients: it has shapes and no numbers."""
    with shapes_only():
        return build.build_denoiser(card, build.build_network(card.model)).requires_grad_(False)


@lru_cache
def peak_flops(device: str, precision: str) -> float:
    """Return the FLOP/s that a large matrix product or convolution reaches here, the better one.

    Measured once a process, with the threads and the settings in force. Its memory is no part of
    the peak that training reports.
    """
    rates = measured_rates(device, DTYPES[precision])
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    return max(rates)


def measured_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return the FLOP/s of a large matrix product and of a large convolution.

    They are of random numbers: of ones a GPU takes less power, and so is faster.
    """
    gpu = device.startswith("cuda")
    side, batch, channels = (8192, 64, 256) if gpu else (384, 2, 128)
    with seeded(keyed_generator("peak")):
        a = torch.randn(side, side, device=device, dtype=dtype)
        x = torch.randn(batch, channels, 32, 32, device=device, dtype=dtype)
        kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    if gpu:
        x = x.contiguous(memory_format=torch.channels_last)
    return (
        2 * side**3 / seconds_of(lambda: a @ a, device),
        2 * 9 * x.numel() * channels / seconds_of(lambda: F.conv2d(x, kernel, padding=1), device),
    )


@torch.no_grad()
def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the shortest time `work` takes, after one call that does not count."""
    rounds = 1 if device == "cpu" else 10  # so that a launch does not count

    def lap() -> float:
        began = time.perf_counter()
        for _ in range(rounds):
            work()
        synchronise(device)
        return (time.perf_counter() - began) / rounds

    lap()
    until, best = time.perf_counter() + MEASURED_SECONDS, lap()
    while time.perf_counter() < until:
        best = min(best, lap())
    return best


def ideal_seconds(preset: Preset, teacher: Model | None, device: str, num: int) -> float | None:
    """Return the seconds of a step on `num` devices at their peak; None if it is not known.

    Over the seconds that a step takes, this is MFU (Chowdhery et al. 2022, App. B).
    """
    flops = step_flops(preset, teacher)
    return flops and flops / (peak_flops(device, preset.train.precision) * num)
