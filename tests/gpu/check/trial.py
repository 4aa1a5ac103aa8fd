"""What the checks share: the device, sizes, the rows they report, a clock and a count of waits."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
TINY = {
    "train.batch": 4,
    "model.network.model_channels": 16,
    "model.network.norm_groups": 4,
    "model.network.head_channels": 16,
}
"""Of a preset with the network adm, for a check of the check itself."""


class NotRun(Exception):
    """A check, or a part of it, that cannot be made here; its text says why."""


@dataclass
class Trial:
    """One run of the checks; each check says its rows, which are printed as they come."""

    device: str
    tiny: bool
    folder: Path
    """Where runs and pictures go; it is removed at the end."""
    openai: Path | None = None
    ect: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def say(self, name: str, ok: bool | None, figure: object) -> None:
        """Report a row: passed, failed, or (None) a figure without a verdict."""
        status = "INFO" if ok is None else "PASS" if ok else "FAIL"
        self._report({"name": name, "status": status, "figure": figure})

    def not_run(self, name: str, why: object) -> None:
        """Report a row that could not be made here."""
        self._report({"name": name, "status": "not run", "figure": str(why)})

    def _report(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        text = json.dumps(row["figure"], default=str)
        print(f"{row['status']} {row['name']}: {text[:1000]}", flush=True)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], times: int = 10, warm: int = 3) -> float:
        """Return how long a call takes, the mean of `times` after `warm` that do not count."""
        times, warm = (2, 1) if self.tiny else (times, warm)
        for _ in range(warm):
            work()
        self.synchronise()
        began = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronise()
        return max(time.perf_counter() - began, 1e-9) / times * 1e3

    def waits(self, work: Callable[[], object]) -> int:
        """Return how often the host waits for the device during a call, as PyTorch notices it."""
        if not self.on_gpu:
            work()
            return 0
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchroniz" in str(warning.message) for warning in seen)

    def free(self) -> None:
        """Give the device's memory back, and forget the most that was held."""
        import gc

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @cached_property
    def peak(self) -> float:
        """FLOP/s of a large product of random bf16 matrices, which no favourable data make fast."""
        side = 64 if self.tiny else 8192
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)
        return 2 * side**3 / self.milliseconds(lambda: a @ a, 20) * 1e3

    def preset(self, name: str, **values: object) -> Any:
        """Return a packaged preset with values over it, `a__b` for the key a.b, small if `tiny`."""
        from cmtool.presets.toml import load_preset

        over = {key.replace("__", "."): value for key, value in values.items()}
        return load_preset(name, over | (TINY if self.tiny else {}))

    def teacher(self, preset: Any) -> Any:
        """Return a teacher for a preset, of random weights; None for one without."""
        from cmtool.training.laps import random_teacher

        return random_teacher(preset, self.device)

    def steps(self, preset: Any, size: int | None = None) -> Any:
        """Return the state of a run of a preset, and its steps on random images."""
        from dataclasses import replace

        from cmtool.training.fit import fit
        from cmtool.training.laps import MOST_STEPS, rig
        from cmtool.training.state import fit_settings

        made = rig(preset, self.teacher(preset), self.device)
        size = size or preset.train.batch // preset.train.accumulate
        settings = replace(fit_settings(made.preset), steps=MOST_STEPS, max_bad_steps=MOST_STEPS)
        steps = fit(
            made.state, made.objective, made.draws(size), made.curriculum, settings, made.before
        )
        return made.state, steps


Check = Callable[[Trial], None]


NEEDED = {
    "numpy": "all", "pydantic": "all", "tomlkit": "all", "typing_extensions": "all",
    "safetensors": "all", "PIL": "all", "filelock": "all", "msgpack": "all",
    "matplotlib": "resume, quality", "jinja2": "resume, quality",
    "typer": "commands", "rich": "commands",
}  # fmt: skip
"""Packages beside torch that cmtool imports, and for which checks."""


def missing() -> dict[str, str]:
    """Return the packages that are not here, and the checks that want them."""

    def is_here(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except (ImportError, ValueError):  # a module without a spec stands in for one
            return False

    return {name: checks for name, checks in NEEDED.items() if not is_here(name)}
