"""The training step of openai/consistency_models and of ECT beside ours, on the same card.

Both run as their code stands, but for packages that a step does not need, which are replaced by
empty ones, and flash-attn, for which openai's own plain attention stands in. Each has its authors'
precision (openai fp16, ECT fp16 as its option says) and takes the images of one batch again.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from tests.bench.peers import import_openai, mended_loop
from tests.gpu.check.speed import measured
from tests.gpu.check.trial import NotRun, Trial

IMAGENET = {
    "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192,
    "num_res_blocks": 3, "attention_resolutions": (2, 4, 8), "channel_mult": (1, 2, 3, 4),
    "num_classes": 1000, "num_head_channels": 64, "use_scale_shift_norm": True,
    "resblock_updown": True,
}  # fmt: skip
SMALL = {"model_channels": 32, "num_res_blocks": 1, "num_head_channels": 32}
RATES = "0.999,0.9999,0.9999432189950708"
SLOWER = 2.0
"""How many times as long their steps are to take."""


def peers(trial: Trial) -> None:
    """Images/s of openai's CD step of ImageNet-64 and of ECT's step of CIFAR-10, and ours."""
    if trial.openai is None and trial.ect is None:
        raise NotRun("give their checkouts: --openai DIR --ect DIR")
    if trial.openai is not None:
        batch = 2 if trial.tiny else 32
        theirs = _rate(trial, openai_step(trial, trial.openai, batch), batch)
        _beside(trial, "openai CD", "imagenet64-cd-l2", batch, theirs)
    if trial.ect is not None:
        if not trial.on_gpu:
            raise NotRun("ECT keeps the state of a GPU's generator: it does not run on a CPU")
        batch = 2 if trial.tiny else 128
        theirs = _rate(trial, ect_step(trial, trial.ect, batch), batch)
        _beside(trial, "ECT", "cifar10-ect", batch, theirs)


def _rate(trial: Trial, step: Callable[[], object], batch: int) -> float:
    found = 1e3 * batch / trial.milliseconds(step, 8, 3)
    trial.free()
    return found


def _beside(trial: Trial, name: str, preset: str, batch: int, theirs: float) -> None:
    """Report their images/s and ours, at the same batch; ours in bf16."""
    ours = measured(trial, "digits-cd" if trial.tiny else preset, batch)["images/s"]
    figures = {"theirs": round(theirs, 2), "ours": ours, "ratio": round(ours / theirs, 3)}
    good = None if trial.tiny else ours >= SLOWER * theirs
    trial.say(f"{name}, images/s beside {preset}", good, figures)


def _join(trial: Trial) -> None:
    """Be the only process of a group, as their code wants it."""
    if not td.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if trial.on_gpu else "gloo"
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)


def openai_step(trial: Trial, folder: Path, batch: int) -> Callable[[], object]:
    """Return one CD step of openai's own loop; on a GPU in fp16 and by DDP, as they train."""
    _join(trial)
    cm = import_openai(folder)
    options: dict[str, Any] = {
        **IMAGENET,
        **(SMALL if trial.tiny else {}),
        "use_fp16": trial.on_gpu,
    }

    def network() -> Any:
        made = cm.unet.UNetModel(**options).to(trial.device)
        if trial.on_gpu:
            made.convert_to_fp16()
        return made.train()

    denoiser = partial(cm.karras_diffusion.KarrasDenoiser, loss_norm="l2")
    kind = cm.train_util.CMTrainLoop if trial.on_gpu else mended_loop(cm)
    loop = kind(
        model=network(), target_model=network(), teacher_model=network(),
        teacher_diffusion=denoiser(distillation=False), training_mode="consistency_distillation",
        ema_scale_fn=lambda step: (0.95, 40), total_training_steps=1_000_000,
        diffusion=denoiser(distillation=True, weight_schedule="uniform"), data=None,
        batch_size=batch, microbatch=-1, lr=8e-6, ema_rate=RATES, log_interval=10,
        save_interval=10, resume_checkpoint="", use_fp16=trial.on_gpu,
    )  # fmt: skip
    x0 = torch.rand(batch, 3, 64, 64) * 2 - 1
    return partial(loop.run_step, x0, {"y": torch.zeros(batch, dtype=torch.int64)})


def ect_step(trial: Trial, folder: Path, batch: int) -> Callable[[], object]:
    """Return one step as ECT's loop takes it for CIFAR-10: DDP, RAdam, the EMA."""
    sys.path.insert(0, str(folder))
    names = {"networks": "training.networks", "loss": "training.loss",
             "stats": "torch_utils.training_stats"}  # fmt: skip
    ect = types.SimpleNamespace(**{key: importlib.import_module(v) for key, v in names.items()})
    logging.getLogger().setLevel(logging.WARNING)
    _join(trial)
    width, blocks = (32, 1) if trial.tiny else (128, 4)
    network, average = (
        ect.networks.ECMPrecond(
            32, 3, model_type="SongUNet", model_channels=width, channel_mult=[2, 2, 2],
            num_blocks=blocks, dropout=0.2, use_fp16=trial.on_gpu,
        ).to(trial.device)
        for _ in range(2)
    )  # fmt: skip
    network.train()
    average.eval().requires_grad_(False)
    trained = network
    if trial.on_gpu:
        trained = torch.nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
    loss_of = ect.loss.ECMLoss()
    loss_of.update_schedule(0)
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-4)
    x0 = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        images = x0.to(trial.device).to(torch.float32) / 127.5 - 1
        loss = loss_of(net=trained, images=images)
        ect.stats.report("Loss/loss", loss)
        loss.mean().backward()
        for p in network.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        for kept, p in zip(average.parameters(), network.parameters(), strict=True):
            kept.copy_(p.detach().lerp(kept, 0.9999))

    return step
