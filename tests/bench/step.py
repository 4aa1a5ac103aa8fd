"""Time one training step by phase: `python -m tests.bench.step --config b c8 --method cd ct`.

Prints milliseconds of CPU time of each phase of the trainer's own step, images/s, GFLOP/s and the
share of what a large convolution reaches in the same run, and the memory of a step above what is
there between steps. Medians over repeats; one thread (OMP_NUM_THREADS=1).
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.measure import peak_flops, peak_resident, timed
from tests.bench.runs import CONFIGS, METHODS, start

PHASES = ("teacher", "student", "target", "backward", "optimizer", "averages")


def watch(run):
    """Return a list that gains (name, begun, ended) of each pass and of the optimizer."""
    spans, begun = [], {}
    models = {"teacher": run.teacher, "student": run.state.student, "target": run.state.target}
    for name, model in models.items():
        if model is not None:
            model.register_forward_pre_hook(
                lambda *_, name=name: begun.update({name: time.process_time()})
            )
            model.register_forward_hook(
                lambda *_, name=name: spans.append((name, begun[name], time.process_time()))
            )
    run.state.optimizer.register_step_pre_hook(
        lambda *_: begun.update(optimizer=time.process_time())
    )
    run.state.optimizer.register_step_post_hook(
        lambda *_: spans.append(("optimizer", begun["optimizer"], time.process_time()))
    )
    return spans


def phases_of(spans, ended):
    """Return the seconds of each phase of a step that ended then.

    Backward is what lies between the last pass and the optimizer, the gradient's norm included.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    for name, begin, end in spans:
        seconds[name] += end - begin
    _, stepped, finished = spans[-1]
    seconds["backward"] = stepped - max(end for name, _, end in spans if name != "optimizer")
    seconds["averages"] = ended - finished
    return seconds


def measure(name, method, precision, repeats, peak):
    """Return the figures of one configuration."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    run = start(config, method, precision, config.network())
    with FlopCounterMode(display=False) as counter:
        next(run.steps)
    flops = counter.get_total_flops()
    spans, steps, totals = watch(run), [], []
    for _ in range(repeats):
        spans.clear()
        totals.append(timed(lambda: next(run.steps)).cpu)
        steps.append(phases_of(spans, time.process_time()))
    total = statistics.median(totals)
    memory = min(peak_resident(lambda: next(run.steps)) for _ in range(2))
    return {
        "config": name,
        "method": method,
        "precision": precision,
        **{p: round(1e3 * statistics.median(s[p] for s in steps), 1) for p in PHASES},
        "step": round(1e3 * total, 1),
        "images/s": round(config.batch / total, 1),
        "GFLOP/s": round(flops / total / 1e9, 1),
        "share of peak": round(flops / total / peak, 3),
        "MiB above resident": round(memory),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=["b", "c16", "c8"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["cd"])
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for precision in arguments.precision:
        peak = peak_flops(precision)
        for name in arguments.config:
            for method in arguments.method:
                facts = measure(name, method, precision, arguments.repeats, peak)
                if arguments.json:
                    print(json.dumps(facts), flush=True)
                else:
                    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


if __name__ == "__main__":
    main()
