"""Does every method step on the device: finite, with one wait, in each precision; in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice

import torch

from tests.gpu.check.trial import NotRun, Trial

METHODS = ("edm", "cd", "ct", "pd", "ct-continuous", "ict", "ect", "ecd", "sct", "scd", "tcm",
           "cmt", "meanflow", "adcm")  # fmt: skip
MORE_WAITS = {"tcm", "adcm"}
"""Methods whose steps look at levels on the device, or make a grid: bound to no number of waits."""


def methods(trial: Trial) -> None:
    """Each method in each precision: losses are finite, and the host waits once a step."""
    chosen = METHODS[:4] if trial.tiny else METHODS
    for method in chosen:
        for precision in ("fp32", "bf16", "fp16") if trial.on_gpu else ("fp32", "bf16"):
            try:
                _method(trial, method, precision)
            except RuntimeError as error:  # the other methods are tried all the same
                trial.say(f"step {method} {precision}", False, str(error)[:500])


def _method(trial: Trial, method: str, precision: str) -> None:
    coarse = {"loss__method__lam": 5.0} if method == "adcm" else {}
    preset = trial.preset(f"digits-{method}", train__precision=precision, **coarse)
    state, steps = trial.steps(preset)
    infos = list(islice(steps, 2 if trial.tiny else 4))
    counted = []
    waits = trial.waits(lambda: counted.extend(islice(steps, 2))) / 2
    finite = all(bool(torch.isfinite(info.loss).all()) for info in infos + counted)
    took = not counted[-1].skipped and state.step == len(infos + counted)
    few = waits <= 1 or method in MORE_WAITS
    figures = {
        "loss": float(counted[-1].loss.mean()),
        "waits": waits,
        "skipped": sum(info.skipped for info in infos + counted),
        "ms": trial.milliseconds(lambda: next(steps), 5, 0),
    }
    trial.say(f"step {method} {precision}", finite and took and few, figures)


def overflow(trial: Trial) -> None:
    """A gradient that overflows in fp16 changes nothing and halves the scale of the loss."""
    if not trial.on_gpu:
        raise NotRun("fp16 is for a GPU")
    state, steps = trial.steps(trial.preset("digits-cd", train__precision="fp16"))
    next(steps)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**100})
    before = [p.detach().clone() for p in state.student.parameters()]
    info = next(steps)
    kept = all(map(torch.equal, before, state.student.parameters()))
    good = info.skipped and kept and state.scaler.get_scale() == 2.0**99 and not state.bad_steps
    trial.say("an overflow skips the step and halves the scale", good, info.fault)


def processes(trial: Trial) -> None:
    """DDP and FSDP2 in one process; two processes if there are two cards."""
    trial.say("DDP and FSDP2, one process", *_ranks(trial, 1))
    if trial.on_gpu and torch.cuda.device_count() > 1:
        trial.say("DDP of two processes is one of two parts", *_ranks(trial, 2))
    else:
        trial.not_run("DDP of two processes", "there are no two cards")


def _ranks(trial: Trial, count: int) -> tuple[bool, object]:
    """Return whether the processes found equal gradients, and what they said."""
    words = [sys.executable]
    if count > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words += ["-m", "tests.gpu.check.ranks", "--device", trial.device, *["--tiny"] * trial.tiny]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, env={**os.environ})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return False, done.stderr[-800:]
    found = json.loads(lines[-1])
    return all(_near(a, b) for a, b in found.values()), found


def _near(norms: list[float], others: list[float]) -> bool:
    return all(abs(a - b) < 2e-2 * max(abs(b), 1e-12) for a, b in zip(norms, others, strict=True))
