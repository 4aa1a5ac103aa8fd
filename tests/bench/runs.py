"""Our side of the benchmarks: the configurations, and training runs on them through `fit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.losses import (
    karras,
    noise_pair,
)
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.song import Song, SongOptions
from cmtool.core.noise import fixed, lognormal
from cmtool.core.objective import Objective
from cmtool.core.optimizers import adam, radam
from cmtool.core.precond import (
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    log_label,
    log_label_1000,
)
from cmtool.system.devices import on_device
from cmtool.training.fit import StepInfo, fit
from cmtool.training.state import FitSettings, TrainState, recompute_activations
from tests.objectives import objective_of

RATES = (0.999, 0.9999, 0.9999432189950708)
LEARNING_RATE = 1e-5
GRID, MU = 40, 0.95


@dataclass(frozen=True)
class Config:
    """A network and the batches it is trained on."""

    options: AdmOptions | SongOptions
    side: int
    classes: int
    batch: int
    recompute: bool = False
    """Blocks are computed again for the backward pass (train.checkpoint_activations)."""

    def network(self) -> nn.Module:
        """Return the network; zero-initialised outputs, which stop gradients, are stirred."""
        network = (
            Adm(self.options, 3, self.classes)
            if isinstance(self.options, AdmOptions)
            else Song(self.options, 3, self.classes)
        )
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.01 * torch.randn_like(p))
        if self.recompute:
            recompute_activations(network, "adm" if isinstance(network, Adm) else "song")
        return network

    def images(self) -> tuple[Tensor, Tensor | None]:
        """Return a batch of images and their labels."""
        x0 = torch.randn(self.batch, 3, self.side, self.side)
        labels = torch.randint(self.classes, (self.batch,)) if self.classes else None
        return x0, labels


SMALL = AdmOptions(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                   attention_levels=(1,), head_channels=32, resblock_updown=False)  # fmt: skip
CONFIGS = {
    "a": Config(AdmOptions(model_channels=64, num_res_blocks=2), 64, 1000, 4),
    "b": Config(AdmOptions(model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2,
                           attention_levels=(1,)), 32, 0, 16),
    "c16": Config(SMALL, 16, 0, 64),
    "c8": Config(SMALL, 8, 0, 64),
    "s": Config(SongOptions(model_channels=64), 32, 0, 16),
}  # fmt: skip
CONFIGS["a-again"] = replace(CONFIGS["a"], recompute=True)
METHODS = ("cd", "ct", "edm")


class Run(NamedTuple):
    """A training run: `steps` yields after each optimizer step."""

    state: TrainState
    teacher: Preconditioned | None
    objective: Objective
    steps: Iterator[StepInfo]


def model(network: nn.Module, kind: str) -> Preconditioned:
    """Return the network as a "teacher" or a "consistency" model."""
    f = Preconditioned(
        network,
        edm_scalings if kind == "teacher" else consistency_scalings,
        log_label_1000 if isinstance(network, Adm) else log_label,
        sigma_data=0.5,
        sigma_min=0.002,
    )
    return on_device(f, "cpu")


def start(config: Config, method: str, precision: str, network: nn.Module) -> Run:
    """Return a run that trains `network` with "cd", "ct" or "edm"; teacher and target are copies.

    CD and CT: N = 40, mu = 0.95, l2, three weights EMAs, RAdam; the teacher's solver is Heun's.
    EDM: Adam and one EMA with a half-life of 0.5 M images and a ramp-up.
    """
    student = model(network, "teacher" if method == "edm" else "consistency")
    teacher = frozen_copy(model(network, "teacher")).eval() if method == "cd" else None
    if method == "edm":
        target = None
        emas = {"ema": Ema(student, halflife_images=500_000, rampup=0.05)}
        objective = objective_of("denoising", lognormal, weight=karras)
    else:
        target = frozen_copy(student)
        emas = {f"ema-{rate}": Ema(student, rate=rate) for rate in RATES}
        name = "consistency_distillation" if teacher else "consistency_training"
        objective = objective_of(name, teacher=teacher)
    optimizer = (adam if method == "edm" else radam)(student.parameters(), LEARNING_RATE)
    state = TrainState(student, target, emas, optimizer)
    x0, labels = config.images()
    settings = FitSettings(
        steps=1_000_000, batch=config.batch, seed=0, lr=LEARNING_RATE, precision=precision
    )
    steps = fit(
        state, objective, lambda step, shard: (x0, labels), partial(fixed, n=GRID, mu=MU), settings
    )
    return Run(state, teacher, objective, steps)


def without_teacher(x0: Tensor, hi: Tensor, lo: Tensor, noise: Tensor, _: Tensor | None):
    """Return the pair of consistency training."""
    return noise_pair(x0, hi, lo, noise)
