"""The released code's consistency distillation on the digits, for a time: what it reaches.

`python -m tests.bench.quality --openai CHECKOUT --seconds 173 --out peer.safetensors`
`cmtool eval fid -c peer.safetensors`

CHECKOUT is a folder with openai/consistency_models in it; what is replaced in it to run here, see
peers.py. The network is that of digits-edm, whose weights are teacher and start. The loop is the
release's own; its learning rate, levels and averages are options, as those of its launch script are
for 600,000 steps of 2,048 images. It takes batches of 64 until its CPU seconds are spent.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from cmtool.convert import convert
from cmtool.data.datasets import digits
from cmtool.data.images import from_uint8
from cmtool.models import load_model
from tests.bench.peers import import_openai, mended_loop

BATCH = 64


def digits_network(cm: SimpleNamespace) -> nn.Module:
    """Return the release's network with the weights of the digits' teacher."""
    model = load_model("digits-edm")
    options, weights = model.preset.model.network, model.f.network.state_dict()
    groups = options.options["norm_groups"]
    cm.unet.normalization = lambda channels: cm.nn.GroupNorm32(groups, channels)
    network = cm.unet.UNetModel(
        image_size=8,
        in_channels=3,
        model_channels=options.options["model_channels"],
        out_channels=3,
        num_res_blocks=options.options["num_res_blocks"],
        attention_resolutions=tuple(2**n for n in options.options["attention_levels"]),
        channel_mult=tuple(options.options["channel_mult"]),
        num_classes=10,
        num_head_channels=options.options["head_channels"],
        use_scale_shift_norm=options.options.get("scale_shift", True),
        resblock_updown=options.options.get("resblock_updown", True),
    )
    network.load_state_dict(weights)
    return network


def main() -> None:
    """Train for the seconds of CPU time that are asked for, and write the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openai", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=173.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--levels", type=int, default=18)
    parser.add_argument("--target-ema", type=float, default=0.95)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    cm = import_openai(given.openai)
    denoiser = partial(cm.karras_diffusion.KarrasDenoiser, loss_norm="l2")
    loop = mended_loop(cm)(
        model=digits_network(cm),
        target_model=digits_network(cm),
        teacher_model=digits_network(cm),
        teacher_diffusion=denoiser(distillation=False),
        training_mode="consistency_distillation",
        ema_scale_fn=lambda step: (given.target_ema, given.levels),
        total_training_steps=1_000_000,
        diffusion=denoiser(distillation=True, weight_schedule="uniform"),
        data=None,
        batch_size=BATCH,
        microbatch=-1,
        lr=given.lr,
        ema_rate=str(given.ema),
        log_interval=10,
        save_interval=10,
        resume_checkpoint="",
    )
    data = digits()
    images, labels = from_uint8(data.images[torch.arange(len(data.images))]), data.labels
    assert labels is not None
    start, steps = time.process_time(), 0
    while time.process_time() - start < given.seconds:
        rows = torch.randint(len(images), (BATCH,))
        loop.run_step(images[rows], {"y": labels[rows]})
        steps += 1
    weights = loop.mp_trainer.master_params_to_state_dict(loop.ema_params[0])
    student = load_model("digits-cd")  # its preset says what the network is
    student.f.network.load_state_dict(weights)
    convert(student, given.out, overwrite=True)
    print(json.dumps({"steps": steps, "cpu_seconds": round(time.process_time() - start)}))


if __name__ == "__main__":
    main()
