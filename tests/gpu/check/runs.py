"""Whole runs: is a resumed one bit-equal, and do all precisions make an equally good student."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check.trial import NotRun, Trial

FRECHET = 2.6
"""fd-digits that a student of 800 steps reaches."""


class Quiet:
    """A watcher that keeps the last line of the log."""

    def __init__(self) -> None:
        self.line: dict[str, Any] = {}

    def progress(self, news: Any) -> None:
        """Keep the line."""
        self.line = news.line

    def working(self, what: str, done: float, total: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


def trained(
    trial: Trial, out: Path, values: dict[str, object], *, resume: bool = False,
    observers: Sequence[Any] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Return the weights that a CD run of the digits ends with, and its last line."""
    from safetensors.torch import load_file

    from cmtool.models import load_model
    from cmtool.presets.toml import resolve
    from cmtool.training.run import train
    from cmtool.training.start import with_teacher

    teacher = load_model("digits-edm", device=trial.device, otherwise="teacher")
    tiny = {"train.batch": 4, "run.sample_grid": 2} if trial.tiny else {}
    over = {"run.sample_every": 10**6, **values, **tiny}
    preset = with_teacher(resolve("digits-cd", {"--set": over}), teacher).preset
    watcher = Quiet()
    final = train(
        preset, out, watcher, teacher=teacher, device=trial.device, resume=resume,
        overwrite=not resume, observers=observers,
    )  # fmt: skip
    return load_file(final / "model.safetensors"), watcher.line


def resume(trial: Trial) -> None:
    """A run that is stopped and resumed ends bit-equal to one that was not, where it is wanted."""
    from cmtool.presets.schema import TrainSection

    knows = "deterministic" in TrainSection.model_fields
    if not knows:
        trial.not_run("resume is bit-equal, deterministic", "no key train.deterministic")
    for wanted in (True, False) if knows else (False,):
        _resume(trial, wanted)


def _resume(trial: Trial, deterministic: bool) -> None:
    from cmtool.errors import Stopped

    steps = 4 if trial.tiny else 60
    values: dict[str, object] = {
        "train.steps": steps, "train.precision": "bf16", "model.network.dropout": 0.1,
    }  # fmt: skip
    if deterministic:
        values["train.deterministic"] = True
    folder = trial.folder / f"deterministic-{deterministic}"

    def halfway(run: Any, news: Any) -> bool:
        return news.info.step == steps // 2

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    whole, _ = trained(trial, folder / "whole", values)
    again = whole if trial.tiny else trained(trial, folder / "again", values)[0]
    with suppress(Stopped):
        trained(trial, folder / "stopped", values, observers=[(halfway, interrupt)])
    resumed, _ = trained(trial, folder / "stopped", values, resume=True)
    figures = {"resumed": apart(whole, resumed), "run twice": apart(whole, again)}
    verdict = max(figures.values()) == 0 if deterministic or not trial.on_gpu else None
    trial.say(f"resume is bit-equal, deterministic={deterministic}", verdict, figures)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights."""
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


def quality(trial: Trial) -> None:
    """A student distilled in bf16 and in fp16 is as good as in fp32, by fd-digits."""
    if not trial.on_gpu and not trial.tiny:
        raise NotRun("it takes minutes on a CPU")
    steps, images = (2, 16) if trial.tiny else (800, 2048)
    for precision in ("fp32", "bf16", "fp16") if trial.on_gpu else ("fp32",):
        began = time.perf_counter()
        values: dict[str, object] = {
            "train.steps": steps, "train.precision": precision, "run.eval_every": steps,
            "run.eval_num": images,
        }  # fmt: skip
        line = trained(trial, trial.folder / f"quality-{precision}", values)[1]
        value = line["eval"]["value"]
        figures = {"fd-digits": value, "s": round(time.perf_counter() - began, 1),
                   "memory, GiB": line["memory_gib"]}  # fmt: skip
        trial.say(f"distill digits {precision}", trial.tiny or value < FRECHET, figures)
