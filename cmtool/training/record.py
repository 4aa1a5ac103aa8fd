"""What a run records of itself, preset.toml and run.json, and what a resumed run may change."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmtool import __version__
from cmtool.errors import UserError
from cmtool.formats.checkpoints import checkpoints
from cmtool.presets.build import build_curriculum
from cmtool.presets.schema import Preset
from cmtool.presets.toml import flat, load_preset, origin_of, to_toml, with_values
from cmtool.system.files import write_atomic, write_json
from cmtool.training.fit import learning_rate
from cmtool.training.setup import Run
from cmtool.training.state import fit_settings
from cmtool.training.status import read_json

FREE_TO_CHANGE = {
    "description", "run", "data.path", "data.workers", "data.timeout", "train.accumulate",
    "train.max_bad_steps", "train.checkpoint_activations", "train.compile",
}  # fmt: skip
"""Keys that a resumed run may change: they do not affect the result, or only its rounding.

The data may move: they are recognised by their fingerprint. `train.accumulate` changes the noise
if the batch gets another number of parts, as another number of processes does.
"""
LOCATION = ("name", "source")
"""Keys in run.json that say where data and teacher lie: a resumed run may change them."""
PROBES = 1000
"""Steps at which two lengths of a run are compared."""


def run_inputs(run: Run) -> dict[str, object]:
    """Return what run.json says of data and teacher; a resumed run compares it."""
    data, teacher = run.data, run.teacher
    return {
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint()},
        "teacher": teacher and {"source": teacher.source, "sha256": teacher.sha256},
    }


def write_record(run: Run, origins: Mapping[str, str]) -> None:
    """Write preset.toml and run.json. In a resumed run, unchanged values keep their origins."""
    preset, path = run.preset, run.out / "preset.toml"
    if path.is_file():
        changed = changes(load_preset(str(path)), preset)
        updates = {key: (value, origin_of(key, origins)) for key, value in changed.items()}
        text = with_values(path.read_text(), updates)
    else:
        text = to_toml(preset, origins)
    write_atomic(path, text.encode(), durable=True)
    facts = {
        "arguments": sys.argv[1:],
        "versions": {
            "cmtool": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "processes": run.group.world_size,
        "threads": torch.get_num_threads(),
        "precision": preset.train.precision,
        "seed": preset.train.seed,
        **run_inputs(run),
    }
    write_json(run.out / "run.json", facts, durable=True)


def check_same(run: Run) -> None:
    """Raise UserError unless the run's folder is of a run with the same preset, data and teacher.

    Keys that are FREE_TO_CHANGE may differ. So may train.steps, if the steps that both runs have
    are the same.
    """
    recorded = read_json(run.out / "run.json")
    for name, now in run_inputs(run).items():
        before = recorded.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            before, now = ({k: v for k, v in d.items() if k not in LOCATION} for d in (before, now))
        if before is not None and before != now:
            raise _other(run.out, name, "", before, now)
    stored = load_preset(str(run.out / "preset.toml"))
    for key in sorted(changes(stored, run.preset)):
        section = key.partition(".")[0]
        if key == "train.steps":
            check_steps(run.out, stored, run.preset)
        elif key not in FREE_TO_CHANGE and section not in FREE_TO_CHANGE:
            before, now = (preset.model_dump()[section] for preset in (stored, run.preset))
            raise _other(run.out, "preset", f"{section} had ", before, now)


def _other(out: Path, what: str, where: str, before: object, now: object) -> UserError:
    """Return the error for an input that differs; of two tables it shows what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        before, now = ({k: d.get(k) for k in differing} for d in (before, now))
    return UserError(
        f"the run in {out} was started with another {what}: {where}{before}, now {now}",
        f"resume with the same {what}, or start a new run with another --out",
    )


def check_steps(out: Path, stored: Preset, preset: Preset) -> None:
    """Raise UserError unless the run in `out` may have another number of steps."""
    before, now = stored.train.steps, preset.train.steps
    found = checkpoints(out / "checkpoints")
    done = int(found[-1].name[5:]) if found else 0
    if now < done:
        raise UserError(f"train.steps = {now}: {out} is at step {done}", "give more steps")
    if not same_so_far(stored, preset):
        raise UserError(
            f"the run in {out} was started with train.steps = {before}, now {now}: N(k), mu(k) or"
            " the learning rate of its finished steps would have been different",
            "resume without changing it, or start a new run with another --out",
        )


def same_so_far(a: Preset, b: Preset) -> bool:
    """Tell whether two presets, alike but for train.steps, are one run as far as both go."""
    curriculum, common = build_curriculum(a), min(a.train.steps, b.train.steps)
    probes = {*range(0, common, max(common // PROBES, 1)), common - 1}
    sides = []
    for settings in (fit_settings(a), fit_settings(b)):
        stages = {step: curriculum(step, settings.steps) for step in probes}
        rates = [learning_rate(settings, step, stage.progress) for step, stage in stages.items()]
        sides.append(([stage._replace(progress=0.0) for stage in stages.values()], rates))
    return sides[0] == sides[1]


def changes(before: Preset, now: Preset) -> dict[str, Any]:
    """Return the dotted keys whose values differ, with those of `now`; None where it has none."""
    old, new = (dict(flat(preset.model_dump())) for preset in (before, now))
    return {key: new.get(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
