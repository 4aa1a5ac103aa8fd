"""What several processes do, each in one of its own: gradients by DDP and FSDP2 against one's own.

`python -m tests.gpu.check.ranks --device cuda`, or by torchrun with two processes. It prints one
JSON object: the norms of three gradients by name, each with those that they should be.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as td
from torch import nn

from cmtool.system import dist
from cmtool.training import fit as fitting
from cmtool.training.fit import fit
from cmtool.training.laps import random_images, random_teacher
from tests.gpu.check.trial import Trial


def norms(trial: Trial, group: dist.Group, accumulate: int = 1) -> list[float]:
    """Return the norms of the first three gradients of a CD run of the digits in this group."""
    from cmtool.presets.build import build_curriculum, build_objective
    from cmtool.training.state import build_state, fit_settings

    preset = trial.preset("digits-cd", train__precision="fp32", train__accumulate=accumulate)
    home = "cpu" if group.mesh is not None else trial.device
    teacher = random_teacher(preset, home)
    state = build_state(preset, teacher, trial.device, group)
    objective = build_objective(preset, teacher.f if teacher else None, trial.device)
    shards = accumulate * group.world_size
    images, labels = random_images(preset, trial.device)(preset.train.batch)(0, 0)
    size = len(images) // shards

    def draw(_: int, shard: int) -> Any:
        part = slice(shard * size, (shard + 1) * size)
        return images[part], None if labels is None else labels[part]

    settings = fit_settings(preset, group)
    steps = fit(state, objective, draw, build_curriculum(preset), settings)
    return [float(info.grad_norm) for info in islice(steps, 3)]


def alone(trial: Trial) -> dict[str, list[list[float]]]:
    """Return DDP in the first of two pretended processes, and FSDP2 in one, with their equals."""
    backend = "cpu:gloo,cuda:nccl" if trial.on_gpu else "gloo"
    store = td.TCPStore("127.0.0.1", 0, 1, True)
    td.init_process_group(backend, store=store, rank=0, world_size=1)
    pretended = dist.Group(0, 2, None, td.new_group(backend="gloo"))
    by_ddp, wrap = norms(trial, pretended), fitting.shared

    def plain(module: nn.Module, _: dist.Group) -> nn.Module:
        return module

    fitting.shared = plain
    by_itself = norms(trial, pretended)
    fitting.shared = wrap
    mesh = td.init_device_mesh("cuda" if trial.on_gpu else "cpu", (1,))
    sharded = norms(trial, dist.Group(0, 1, None, None, mesh))
    found = {"DDP": [by_ddp, by_itself], "FSDP2": [sharded, norms(trial, dist.ALONE)]}
    td.destroy_process_group()
    return found


def together(trial: Trial) -> dict[str, list[list[float]]]:
    """Return DDP of two processes with what one process has in two parts."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = dist.join(rank, size, trial.device, 120)
    found = {"DDP of two": [norms(trial, group), norms(trial, dist.ALONE, accumulate=size)]}
    dist.leave()
    return found


def main() -> None:
    """Run in one process, or as one of torchrun's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    device = given.device if is_alone else f"cuda:{os.environ['LOCAL_RANK']}"
    if not is_alone:
        import torch

        torch.cuda.set_device(device)
    found = (alone if is_alone else together)(Trial(device, given.tiny, Path()))
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
