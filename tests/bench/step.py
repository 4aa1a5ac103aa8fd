"""Time one consistency-distillation step by phase: `python -m tests.bench.step --config b c8`.

Prints a table: milliseconds of each phase, images/s, GFLOP/s, and the share of the peak that a
large convolution reaches on the same threads in the same run. Medians over interleaved repeats.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmtool.core.distances import l2
from cmtool.core.ema import Ema, frozen_copy, update_average
from cmtool.core.losses import teacher_pair
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.noise import NoiseRange, uniform
from cmtool.core.precond import Preconditioned, consistency_scalings, edm_scalings, log_label_1000
from cmtool.core.solvers import heun

SMALL = AdmOptions(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                   attention_levels=(1,), head_channels=32)  # fmt: skip
CONFIGS = {  # options, image side, classes, batch
    "a": (AdmOptions(model_channels=64, num_res_blocks=2), 64, 1000, 4),
    "b": (AdmOptions(model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2,
                     attention_levels=(1,)), 32, 0, 16),
    "c16": (SMALL, 16, 0, 64),
    "c8": (SMALL, 8, 0, 64),
}  # fmt: skip
PHASES = ("teacher", "target", "student", "backward", "optimizer", "averages")


def measure(name, precision, repeats):
    """Return the median seconds of each phase, and the FLOPs of a step."""
    options, side, classes, batch = CONFIGS[name]
    torch.manual_seed(0)
    network = Adm(options, 3, classes)
    with torch.no_grad():  # zero-initialised outputs would make the gradients vanish
        for p in network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    student = Preconditioned(
        network, consistency_scalings, log_label_1000, sigma_data=0.5, sigma_min=0.002
    )
    target = frozen_copy(student)
    teacher = frozen_copy(student)
    teacher.scalings = edm_scalings
    emas = [Ema(student, rate=rate) for rate in (0.999, 0.9999, 0.99994)]
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-5)
    x0, noise = torch.randn(2, batch, 3, side, side)
    labels = torch.randint(classes, (batch,)) if classes else None
    hi, lo = uniform(batch, 40, NoiseRange(), torch.Generator().manual_seed(0))
    seconds = {phase: [] for phase in PHASES}

    def step():
        clock = time.perf_counter
        marks = [clock()]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            pair = teacher_pair(x0, hi, lo, noise, labels, teacher, heun)
            marks.append(clock())
            with torch.no_grad():
                goal = target(pair.x_lo, lo, labels)
            marks.append(clock())
            loss = l2(student(pair.x_hi, hi, labels), goal).mean()
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(clock())
        for ema in emas:
            ema.update(student, batch=batch, num_images=batch)
        update_average(target.parameters(), student.parameters(), 0.95)
        marks.append(clock())
        for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
            seconds[phase].append(end - begin)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = {phase: [] for phase in PHASES}
    for _ in range(repeats):
        step()
    return {phase: statistics.median(s) for phase, s in seconds.items()}, counter.get_total_flops()


def peak(precision):
    """Return the FLOP/s of a large 3x3 convolution on this machine's threads."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = torch.randn(16, 256, 32, 32).to(dtype), torch.randn(256, 256, 3, 3).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.conv2d(x, w, padding=1)
        times.append(time.perf_counter() - start)
    return 2 * 16 * 256 * 256 * 9 * 32 * 32 / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=["b", "c16", "c8"])
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for precision in arguments.precision:
        best = peak(precision)
        for name in arguments.config:
            phases, flops = measure(name, precision, arguments.repeats)
            total = sum(phases.values())
            facts = {
                "config": name,
                "precision": precision,
                **{phase: round(1e3 * s, 1) for phase, s in phases.items()},
                "images/s": round(CONFIGS[name][3] / total, 1),
                "GFLOP/s": round(flops / total / 1e9, 1),
                "share of peak": round(flops / total / best, 3),
            }
            if arguments.json:
                print(json.dumps(facts), flush=True)
            else:
                print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


if __name__ == "__main__":
    main()
