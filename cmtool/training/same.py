"""What must be the same: in all processes of a run, and in a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool import __version__
from cmtool.data.datasets import Dataset
from cmtool.errors import UserError
from cmtool.formats.checkpoints import checkpoints
from cmtool.models import Model
from cmtool.presets.build import build_curriculum
from cmtool.presets.schema import Preset
from cmtool.presets.toml import flat, load_preset
from cmtool.system.records import read_facts
from cmtool.training.fit import learning_rate
from cmtool.training.records import Record
from cmtool.training.state import fit_settings

if TYPE_CHECKING:
    from cmtool.training.start import Run

FREE_TO_CHANGE = {
    "description", "run", "data.path", "data.workers", "data.timeout", "train.accumulate",
    "train.max_bad_steps", "train.checkpoint_activations", "train.compile", "train.deterministic",
}  # fmt: skip
"""Keys that a resumed run may change: they do not affect the result, or only its rounding.

The data may move: they are recognised by their fingerprint. `train.accumulate` changes the noise
if the batch gets another number of parts, as another number of processes does.
"""
LOCATION = ("name", "source")
"""Keys in run.json that say where data and teacher lie: a resumed run may change them."""
OWN = {"description", "data.path", "data.workers", "data.timeout"}
"""Keys in which the processes of a run may differ: data may lie elsewhere on another machine."""
PROBES = 1000
"""Steps at which two lengths of a run are compared."""


def start_facts(
    preset: Preset,
    teacher: Model | None,
    init: Model | None,
    device: str,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, object]:
    """Return what must be the same in all processes of a run before they do anything together."""
    keys = flat(preset.model_dump(mode="json"))
    return {
        "cmtool": __version__,
        "--device": device.partition(":")[0],
        "--resume": resume,
        "--overwrite": overwrite,
        "teacher": teacher.sha256 if teacher is not None else None,
        "--init": init.sha256 if init is not None else None,
        **{key: value for key, value in keys if key not in OWN},
    }


def data_facts(data: Dataset, held: Dataset | None) -> dict[str, object]:
    """Return what must be the same of the data in all processes of a run."""
    return {
        "number of images": len(data), "fingerprint of the images": data.fingerprint(),
        "fingerprint of the images held out": None if held is None else held.fingerprint(),
    }  # fmt: skip


def run_inputs(run: Run) -> dict[str, object]:
    """Return what run.json says of data and teacher; a resumed run compares it."""
    data, held, teacher = run.data, run.held, run.teacher
    apart = {} if held is None else {"held_out": held.fingerprint()}
    return {
        "data": {
            "name": data.name,
            "images": len(data),
            "fingerprint": data.fingerprint(),
            **apart,
        },
        "teacher": teacher and described(teacher),
    }


def described(model: Model) -> dict[str, str]:
    """Return what run.json says of a model."""
    return {"source": model.source, "sha256": model.sha256}


def check_same(run: Run) -> None:
    """Raise UserError unless the run's folder is of a run with the same preset, data and teacher.

    Keys that are FREE_TO_CHANGE may differ. So may train.steps, if the steps that both runs have
    are the same.
    """
    record = read_facts(run.out / "run.json", Record)
    recorded = record.model_dump() if record else {}
    for name, now in run_inputs(run).items():
        before = recorded.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            before, now = (
                {k: v for k, v in d.items() if k not in LOCATION and v is not None}
                for d in (before, now)
            )
            if before.get("fingerprint") == run.data.older_hash != "":
                before["fingerprint"] = run.data.fingerprint()  # cmtool 0.1 began the run
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
    text = f"the run in {out} was started with another {what}: {where}{before}, now {now}"
    return UserError(text, f"resume with the same {what}, or start a new run with another --out")


def check_steps(out: Path, stored: Preset, preset: Preset) -> None:
    """Raise UserError unless the run in `out` may have another number of steps."""
    before, now = stored.train.steps, preset.train.steps
    found = checkpoints(out / "checkpoints")
    done = int(found[-1].name[5:]) if found else 0
    if now < done:
        raise UserError(f"train.steps = {now}: {out} is at step {done}", "give more steps")
    if not same_so_far(stored, preset):
        what = f"the run in {out} was started with train.steps = {before}, now {now}"
        why = "N(k), mu(k) or the learning rate of its finished steps would have been different"
        hint = "resume without changing it, or start a new run with another --out"
        raise UserError(f"{what}: {why}", hint)


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
