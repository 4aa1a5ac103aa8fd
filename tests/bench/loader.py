"""Time the loader alone, and beside a training step: `python -m tests.bench.loader`.

Prints images/s of each source with each number of worker processes, and what the same stream gives
to a consistency-training step: images/s, and the share of the time that the step waited for images.
"""

import argparse
import json
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from cmtool.core.ema import frozen_copy
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.noise import Stage
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label_1000
from cmtool.data import datasets as data_module
from cmtool.data.batches import batches
from cmtool.data.datasets import load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.training.fit import fit
from cmtool.training.state import FitSettings, TrainState
from tests.objectives import objective_of

WIDTHS = {"small": (32, (1, 2), 1), "b": (64, (1, 2, 2), 2)}
"""Networks: channels, their multiples by level, blocks a level; b is that of tests.bench.step."""


def sources(root, count, side):
    """Write the same images as a folder, a stored and a deflated zip, and an npz; yield paths."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    images = (255 * images + 8 * torch.rand(images.shape, generator=generator)).clamp(0, 255).byte()
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]
    contents = [png_bytes(image) for image in images]
    for name, content in zip(names, contents, strict=True):
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for kind in ("stored", "deflated"):
        with zipfile.ZipFile(
            root / f"{kind}.zip", "w", getattr(zipfile, f"ZIP_{kind.upper()}")
        ) as z:
            for name, content in zip(names, contents, strict=True):
                z.writestr(name, content)
    np.savez(root / "array.npz", images.permute(0, 2, 3, 1).numpy())
    return {
        "folder": root / "folder", "stored zip": root / "stored.zip",
        "deflated zip": root / "deflated.zip", "npz": root / "array.npz",
    }  # fmt: skip


def stream(path, side, batch, workers):
    data = load_dataset(str(path), size=(side, side))
    return batches(data, batch=batch, shards=1, seed=0, device="cpu", flip=True, workers=workers)


def loaded(path, side, batch, workers, seconds):
    """Return the loader's images/s, nobody else at work, and images per second of this process."""
    fetch = stream(path, side, batch, workers)
    fetch(0, 0)
    start, spent, step = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        step += 1
        fetch(step, 0)
    images = step * batch
    return images / (time.perf_counter() - start), images / (time.process_time() - spent)


def trained(path, side, batch, workers, width, steps):
    """Return images/s of consistency training on the stream, and the share it waited for images."""
    channels, mult, blocks = WIDTHS[width]
    torch.manual_seed(0)
    options = AdmOptions(model_channels=channels, channel_mult=mult, num_res_blocks=blocks,
                         attention_levels=(1,), head_channels=32)  # fmt: skip
    student = Preconditioned(
        Adm(options, 3, 0), consistency_scalings, log_label_1000, sigma_data=0.5, sigma_min=0.002
    )
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-4)
    state = TrainState(student, frozen_copy(student), {}, optimizer)
    objective = objective_of("consistency_training")
    settings = FitSettings(steps=steps + 1, batch=batch, seed=0, lr=1e-4)
    run = fit(
        state,
        objective,
        stream(path, side, batch, workers),
        lambda *_: Stage(n=18, mu=0.9),
        settings,
    )
    next(run)  # starts the workers
    start = time.perf_counter()
    waited = sum(info.waited for info in run)
    seconds = time.perf_counter() - start
    return steps * batch / seconds, waited / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", nargs="+", choices=WIDTHS, default=["small"])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data_module.MAX_IN_MEMORY = 0  # so that small sets are streamed too

    def tell(**facts):
        line = (
            json.dumps(facts) if arguments.json else "  ".join(f"{k} {v}" for k, v in facts.items())
        )
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as root:
        found = sources(Path(root), arguments.count, arguments.side)
        common = arguments.side, arguments.batch
        for name, path in found.items():
            for workers in arguments.workers:
                speed, own = loaded(path, *common, workers, arguments.seconds)
                tell(source=name, workers=workers, images_per_second=round(speed),
                     images_per_cpu_second_of_the_step=round(own))  # fmt: skip
        for width in arguments.network:
            for workers in arguments.workers:
                speed, wait = trained(found["stored zip"], *common, workers, width, arguments.steps)
                tell(step=width, workers=workers, images_per_second=round(speed, 1),
                     data_wait=round(wait, 4))  # fmt: skip


if __name__ == "__main__":
    main()
