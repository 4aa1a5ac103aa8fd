"""What the folders of runs tell of them afterwards: the runs side by side, and what differs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cmtool.errors import InputError
from cmtool.presets.schema import Preset
from cmtool.presets.toml import flat
from cmtool.system.records import known_facts, read_facts
from cmtool.training.guide import known_preset
from cmtool.training.lock import read_status
from cmtool.training.log import read_log
from cmtool.training.plots import Plot, overlaid
from cmtool.training.records import Record, Status


@dataclass(frozen=True)
class History:
    """A run as its folder tells it; `updated` is when its status was written, in epoch seconds."""

    path: Path
    status: Status
    updated: float

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @cached_property
    def preset(self) -> Preset | None:
        """The preset, None if it cannot be read."""
        return known_preset(self.path)

    @cached_property
    def record(self) -> Record | None:
        """What the run was started with, None if it cannot be read."""
        return known_facts(self.path / "run.json", Record)

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the log, none if it cannot be read."""
        try:
            return read_log(self.path / "log.jsonl")
        except (OSError, InputError):
            return []

    @property
    def loss(self) -> float | None:
        """The last loss that was logged."""
        losses = (line.get("loss") for line in reversed(self.log))
        return next((loss for loss in losses if loss is not None), None)

    @property
    def best(self) -> dict[str, float]:
        """The least value of each metric that was measured."""
        found: dict[str, float] = {}
        for verdict in (line["eval"] for line in self.log if line.get("eval")):
            name, value = verdict["metric"], verdict["value"]
            if value is not None and math.isfinite(value):
                found[name] = min(value, found.get(name, value))
        return found

    def facts(self) -> dict[str, Any]:
        """Return the run as JSON."""
        preset, record = self.preset, self.record
        when = datetime.fromtimestamp(self.updated, UTC)
        return {
            "name": self.name,
            "path": str(self.path),
            "kind": preset and preset.kind,
            "method": preset and preset.loss.method.name,
            "data": record.data.name if record and record.data else preset and preset.data.path,
            "teacher": record.teacher.source if record and record.teacher else None,
            "step": self.status.step,
            "steps": self.status.steps or (preset and preset.train.steps),
            "state": self.status.state,
            "loss": self.loss,
            "best": self.best,
            "updated": when.isoformat(timespec="seconds"),
            "age_seconds": max(0, round(time.time() - self.updated)),
            "bytes": folder_bytes(self.path),
        }


def read_history(path: Path) -> History:
    """Return the history of a run. Raises InputError for a folder that holds none."""
    try:
        status = read_facts(path / "status.json", Status)
        if status is None:
            raise InputError(f"{path} holds no run: no status.json", "give a run folder")
        updated = (path / "status.json").lstat().st_mtime
        return History(path, read_status(path) or status, updated)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise InputError(what, "check the path and its permissions") from None


def histories(folder: Path) -> Iterator[History | InputError]:
    """Yield the run in each folder under `folder`, or why there is none, by name.

    If `folder` is a run itself, it is the only one. Raises InputError for a folder that cannot be
    listed.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        what = f"cannot list {folder}: {error.strerror}"
        raise InputError(what, "give a folder of runs") from None
    for path in [folder] if (folder / "status.json").is_file() else paths:
        try:
            yield read_history(path)
        except InputError as error:
            yield error


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder; links are not followed."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += Path(parent, name).lstat().st_size
            except OSError:  # a run that goes on removes files
                continue
    return total


def labels(runs: Sequence[History]) -> list[str]:
    """Return a name for each run that no other has: its folder's name, else its path."""
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else [str(run.path) for run in runs]


def differing(runs: Sequence[History]) -> dict[str, list[Any]]:
    """Return the keys of the presets that differ, with the value of each run, None for none."""
    presets = [run.preset.model_dump() if run.preset else {} for run in runs]
    tables = [{key: value for key, value in flat(each) if value != {}} for each in presets]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key) for table in tables] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def numbers(runs: Sequence[History]) -> dict[str, list[Any]]:
    """Return what became of the runs: steps done, state, last loss, the best of each metric."""
    best = [run.best for run in runs]
    metrics = dict.fromkeys(name for each in best for name in each)
    return {
        "step": [run.status.step for run in runs],
        "state": [run.status.state for run in runs],
        "loss": [run.loss for run in runs],
        **{f"best {name}": [each.get(name) for each in best] for name in metrics},
    }


class Spent(NamedTuple):
    """What training took: seconds, and seconds of all the process's threads."""

    seconds: float
    cpu_seconds: float


def time_spent(log: Sequence[Mapping[str, Any]], step: int) -> Spent:
    """Return what the steps up to `step` took by a run's log, also if it was stopped in between.

    Checkpoints, sample grids and evaluations are not in it. Between two lines of the log all steps
    take the same time.
    """
    seconds, cpu_seconds, before = 0.0, 0.0, 0
    for line in log:
        steps = max(min(step, line["step"]) - before, 0)
        seconds += steps * line.get("step_seconds", 0.0)
        cpu_seconds += steps * line.get("step_cpu_seconds", 0.0)
        before = line["step"]
    return Spent(seconds, cpu_seconds)


def compared_plots(runs: Sequence[History]) -> list[Plot]:
    """Return a plot of the loss of all runs, and one of each metric, without empty ones."""
    return overlaid(dict(zip(labels(runs), (run.log for run in runs), strict=True)))
