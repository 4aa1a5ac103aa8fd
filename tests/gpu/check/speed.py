"""How fast is it: MFU of the published steps, what fits, compiled networks, sampling, features."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.gpu.check.trial import GIB, NotRun, Trial

PUBLISHED = {
    "imagenet64-cd-l2": (32, 0.45),
    "cifar10-cd-l2": (128, 0.35),
    "cifar10-edm-vp": (128, None),
    "bedroom256-cd-l2": (4, None),
}
"""Batch at once, and the share of the measured peak that a step is to reach, if one is set."""
COMPILED = {"cifar10-edm-vp": 128, "digits-cd": 64, "imagenet64-edm": 32}
LEVELS = 18
STEPS = 8


def speed(trial: Trial) -> None:
    """Images/s, MFU and memory of the published steps in bf16, at the stated batch."""
    chosen = {"digits-cd": (4, None)} if trial.tiny else PUBLISHED
    for name, (batch, goal) in chosen.items():
        figures = measured(trial, name, batch)
        share = figures["share of the peak"]
        good = None if goal is None or share is None else share >= goal
        trial.say(f"{name} bf16 batch {batch}", good, figures)


def largest(trial: Trial) -> None:
    """The largest batch that fits, and the speed of ImageNet-64 CD with half of it."""
    name = "digits-cd" if trial.tiny else "imagenet64-cd-l2"
    found = measured(trial, name, 4 if trial.tiny else 32, tries=True)
    most = 4 if trial.tiny else int(found["most images at once"])
    trial.say(f"{name} bf16, most images at once", None, most)
    batch = max(most // 2, 1)
    trial.say(f"{name} bf16 batch {batch}", None, measured(trial, name, batch))


def measured(
    trial: Trial, name: str, batch: int, *, tries: bool = False, **values: object
) -> dict[str, Any]:
    """Return the figures of `cmtool bench` for a preset, and its share of the peak of this run."""
    from cmtool.training import bench as benches

    given: dict[str, object] = {"train__batch": batch, "train__precision": "bf16", **values}
    preset = trial.preset(name, train__accumulate=1, **given)
    trial.free()
    found = benches.bench(
        preset, trial.teacher(preset), trial.device, steps=1 if trial.tiny else STEPS, tries=tries
    )
    rate = None if found.flops is None else found.flops / found.lap.whole
    figures = {
        "images/s": round(found.images_per_second, 2),
        "ms": round(1e3 * found.lap.whole, 2),
        "first step, s": round(found.first, 2),
        "share of the peak": None if rate is None else round(rate / trial.peak, 4),
        "MFU": found.mfu,
        "phases, ms": {key: round(1e3 * s, 2) for key, s in found.lap._asdict().items()},
        "GiB": {key: b and round(b / GIB, 2) for key, b in found.held._asdict().items()},
        "most images at once": found.largest,
        "images at once": found.images,
    }
    trial.free()
    return figures


def compiled(trial: Trial) -> None:
    """Compiled against eager steps: speed, memory, graphs and breaks. Minutes: not by default."""
    from torch._dynamo.utils import counters

    if not trial.on_gpu:
        raise NotRun("networks are compiled for a GPU")
    for name, batch in ({"digits-cd": 4} if trial.tiny else COMPILED).items():
        for is_compiled in (False, True):
            torch._dynamo.reset()
            counters.clear()
            keys = {"model__network__dropout": 0.0, "train__compile": is_compiled}
            figures = measured(trial, name, batch, **keys)
            breaks = sum(counters["graph_break"].values())
            figures |= {"graphs": counters["stats"].get("unique_graphs"), "breaks": breaks}
            how = "compiled" if is_compiled else "eager"
            trial.say(f"{name} bf16 batch {batch} {how}", breaks == 0, figures)


def optimizers(trial: Trial) -> None:
    """Milliseconds of each optimizer's step over 296 M parameters; of a CUDA graph's replay."""
    from cmtool.core.optimizers import OPTIMIZERS

    count, size = (4, 1 << 8) if trial.tiny else (296, 1 << 20)
    parameters = [torch.nn.Parameter(torch.zeros(size, device=trial.device)) for _ in range(count)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    found = {
        name: trial.milliseconds(make(parameters, lr=1e-4).step)
        for name, make in OPTIMIZERS.items()
    }
    trial.say(f"optimizers, ms for {count * size:,} parameters", None, found)


def sampling(trial: Trial) -> None:
    """Images/s of one step and of Heun's 18 levels; waits do not grow with the levels."""
    from cmtool.models import load_model
    from cmtool.sampling import generate, plan

    number, heun = (4, 6) if trial.tiny else (512, LEVELS)
    for name, steps in (("digits-cd", (1, 2)), ("digits-edm", (4, heun))):
        model = load_model(name, device=trial.device, otherwise="teacher")
        waits, rates = [], []
        for count in steps:
            chosen = plan(model.preset, count)._replace(precision="bf16")

            def draw(chosen: Any = chosen, model: Any = model) -> None:
                seeds = range(number)
                list(generate(model.f, model.preset, chosen, seeds, device=trial.device))

            draw()
            waits.append(trial.waits(draw))
            rates.append(round(1e3 * number / trial.milliseconds(draw, 3, 1), 1))
        figures = {"steps": steps, "waits": waits, "images/s": rates}
        trial.say(f"{name}: no wait a level", waits[0] == waits[1], figures)


def features(trial: Trial) -> None:
    """Images/s of Inception's features in fp32 and bf16, that both agree, and that sums stay there.

    The weights are random, of the shapes of NVIDIA's file.
    """
    from cmtool.evaluation.gaussian import GaussianSums
    from cmtool.evaluation.inception import Inception, clean_resized, tf_resized
    from cmtool.system.devices import autocast, full_float32, on_device

    network = Inception()
    for conv in network.convs.values():
        torch.nn.init.kaiming_normal_(conv.weight)
    network = on_device(network, trial.device).eval().requires_grad_(False)
    number = 1 if trial.tiny else 256
    images = torch.randint(0, 256, (number, 3, 32, 32), device=trial.device).float()
    found = {}

    def run(precision: str, resized: Any) -> torch.Tensor:
        x = (resized(images) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), full_float32(), autocast(x.device.type, precision):
            return torch.as_tensor(network(x)).float()

    pairs = (("fp32", "tf"), ("bf16", "tf"), ("fp32", "clean"))
    for precision, rule in pairs[:2] if trial.tiny else pairs:
        resized = {"tf": tf_resized, "clean": clean_resized}[rule]
        found[precision, rule] = run(precision, resized)
        spent = trial.milliseconds(lambda p=precision, r=resized: run(p, r), 3, 1)
        trial.say(f"features {precision} {rule}, images/s", None, round(1e3 * number / spent, 1))
    exact, rounded = found["fp32", "tf"], found["bf16", "tf"]
    error = float((exact - rounded).norm() / exact.norm())
    trial.say("features in bf16 against fp32", error < 0.05, error)
    sums, width = GaussianSums(exact.shape[1]), exact
    waits = trial.waits(lambda: sums.add(width))
    spent = trial.milliseconds(lambda: sums.add(width), 3, 1)
    trial.say("sums of features", waits == 0, {"ms": round(spent, 2), "waits": waits})


def snapshot(trial: Trial) -> None:
    """A snapshot is the state, and how long the first and a second one take."""
    from cmtool.training.checkpoint import take_snapshot

    state, steps = trial.steps(trial.preset("digits-edm" if trial.tiny else "cifar10-edm-vp",
                                            train__batch=4 if trial.tiny else 32))  # fmt: skip
    next(steps)
    began = time.perf_counter()
    first = take_snapshot(state)
    between = time.perf_counter()
    again = take_snapshot(state, first)
    ended = time.perf_counter()
    own = state.student.network.state_dict()
    same = all(torch.equal(tensor, own[key].cpu()) for key, tensor in again.files["model"].items())
    figures = {"first, s": between - began, "again, s": ended - between,
               "GB": again.num_bytes / 1e9}  # fmt: skip
    trial.say("a snapshot is the state", same, figures)
