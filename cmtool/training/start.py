"""How a run starts: from a preset and a teacher, or where an earlier one stopped."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmtool import __version__
from cmtool.data.datasets import Dataset
from cmtool.errors import (
    InputError,
    UserError,
)
from cmtool.formats import checkpoints as checkpoint_folder
from cmtool.models import Model
from cmtool.presets.build import build_curriculum
from cmtool.presets.schema import Choice, Preset
from cmtool.presets.toml import Resolved, flat, load_preset, origin_of, to_toml, with_values
from cmtool.system.dist import Group
from cmtool.system.files import write_atomic, write_json
from cmtool.training.checkpoint import load_checkpoint
from cmtool.training.fit import learning_rate
from cmtool.training.folder import is_resumable, read_json
from cmtool.training.log import Notes
from cmtool.training.state import TrainState, fit_settings


def with_precision(
    preset: Preset, origins: Mapping[str, str], best: str
) -> tuple[Preset, dict[str, str]]:
    """Return the preset with `best` where it leaves the precision to the device, and the origins.

    A run records what it got, so that it goes on in it on any device.
    """
    if preset.train.precision != "auto":
        return preset, dict(origins)
    train = preset.train.model_copy(update={"precision": best})
    changed = preset.model_copy(update={"train": train})
    return changed, {**origins, "train.precision": "auto"}


def with_teacher(resolved: Resolved, teacher: Model) -> Resolved:
    """Return the preset with the teacher's model and noise sections, but for dropout and scalings.

    A student copies its teacher's weights, so it must be the same network on the same levels.
    """
    ours = resolved.preset.model
    theirs = teacher.preset.model
    if theirs.scalings.name != "edm":
        raise InputError(
            f"{teacher.source} has the scalings of {theirs.scalings.name}: a student that starts"
            " from its weights would be another function",
            "distill a teacher with EDM's scalings",
        )
    options = dict(theirs.network.options)
    options.pop("dropout", None)
    if "dropout" in ours.network.options:
        options["dropout"] = ours.network.options["dropout"]
    network = Choice(name=theirs.network.name, **options)
    model = theirs.model_copy(update={"network": network, "scalings": ours.scalings})
    preset = resolved.preset.model_copy(update={"model": model, "noise": teacher.preset.noise})
    origins = dict(resolved.origins)
    before = dict(flat(resolved.preset.model_dump()))
    for key, value in flat(preset.model_dump()):
        if before.get(key, ...) != value:
            origins[key] = f"teacher {teacher.source}"
    return Resolved(preset, origins)


FREE_TO_CHANGE = {
    "description", "run", "data.path", "data.workers", "data.timeout", "train.accumulate",
    "train.max_bad_steps", "train.checkpoint_activations", "train.compile",
}  # fmt: skip
"""What a resumed run may have otherwise: it has no part in the result, or no more than rounding.

The data may have moved but are known by their fingerprint. Another number of parts draws other
noise, as another number of processes does.
"""
WHERE = ("name", "source")
"""What run.json says of data and teacher that is no part of what they are."""
PROBES = 1000
"""Steps at which two lengths of a run are compared."""


def check_same(out: Path, preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise UserError unless the run in `out` was started with this preset, data and teacher.

    What is FREE_TO_CHANGE may differ, and train.steps where the steps both have are the same.
    """
    made = read_json(out / "run.json")
    for name, now in run_inputs(data, teacher).items():
        before = made.get(name)
        if isinstance(before, dict) and isinstance(now, dict):  # where they lie is no matter
            before, now = ({k: v for k, v in d.items() if k not in WHERE} for d in (before, now))
        if before is not None and before != now:
            was, is_now = _difference(before, now)
            raise UserError(
                f"the run in {out} was started with another {name}: {was}, now {is_now}",
                "resume with the same, or start a run of its own",
            )
    stored = load_preset(str(out / "preset.toml"))
    for key in sorted(changes(stored, preset)):
        section = key.partition(".")[0]
        if key in FREE_TO_CHANGE or section in FREE_TO_CHANGE:
            continue
        if key == "train.steps":
            check_steps(out, stored, preset)
            continue
        was, is_now = _difference(stored.model_dump()[section], preset.model_dump()[section])
        raise UserError(
            f"the run in {out} was started with another preset: {section} had {was}, now {is_now}",
            "resume without changing it, or start a run of its own",
        )


def split_as_before(
    out: Path, preset: Preset, processes: int, *, asked: bool
) -> tuple[Preset, str | None]:
    """Return the preset with a batch in as many parts as the run in `out` has had, and a note.

    The parts, processes times train.accumulate, are the key of the noise. Where the processes do
    not divide them, or an `asked` number stands against it, the noise is another from here on.
    """
    stored = read_json(out / "run.json").get("processes")
    if not isinstance(stored, int) or not is_resumable(out):
        return preset, None
    accumulate, batch = preset.train.accumulate, preset.train.batch
    before = load_preset(str(out / "preset.toml")).train.accumulate * stored
    if not asked:
        least = -(-before // processes)  # no part may be larger than before
        fitting = (n for n in range(least, batch + 1) if batch % (n * processes) == 0)
        accumulate = next(fitting, least)
    train = preset.train.model_copy(update={"accumulate": accumulate})
    parts, note = accumulate * processes, None
    if parts != before:
        note = (
            f"a batch has {parts} parts now, {before} before: the images are the same, their noise"
            " is another from here on"
        )
    elif processes != stored:
        note = f"a batch has {parts} parts as before, {accumulate} a process"
    return preset.model_copy(update={"train": train}), note


def check_steps(out: Path, stored: Preset, preset: Preset) -> None:
    """Raise UserError unless the run in `out` may have another number of steps."""
    before, now = stored.train.steps, preset.train.steps
    found = checkpoint_folder.checkpoints(out / "checkpoints")
    done = int(found[-1].name[5:]) if found else 0
    if now < done:
        raise UserError(f"train.steps = {now}: {out} is at step {done}", "give more steps")
    if not same_so_far(stored, preset):
        raise UserError(
            f"the run in {out} was started with train.steps = {before}, now {now}: N(k), mu(k) or"
            " the learning rate of the steps it has done would have been others",
            "resume without changing it, or start a run of its own",
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


def resume_state(out: Path, state: TrainState, watcher: Notes, group: Group) -> None:
    """Set `state` to the run's newest good checkpoint, which the leading process finds."""
    newest, complaints = group.agreed(
        lambda: checkpoint_folder.newest_checkpoint(out / "checkpoints"), "resume"
    )
    for complaint in complaints:
        watcher.note(f"passed over: {complaint}")
    if newest is None:
        watcher.note("no checkpoint yet: starting at step 0")
    else:
        load_checkpoint(newest, state)
        watcher.note(f"resumed from {newest}")


def run_inputs(data: Dataset, teacher: Model | None) -> dict[str, object]:
    """Return what run.json says of data and teacher, by which a resumed run knows them again."""
    return {
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint()},
        "teacher": teacher and {"source": teacher.source, "sha256": teacher.sha256},
    }


def _difference(before: object, now: object) -> tuple[object, object]:
    """Return the first differing part of two values, tables by their differing keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        odd = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        return {k: before.get(k) for k in odd}, {k: now.get(k) for k in odd}
    return before, now


def write_run_files(
    out: Path,
    preset: Preset,
    origins: Mapping[str, str],
    data: Dataset,
    teacher: Model | None,
    processes: int,
) -> None:
    """Write preset.toml and run.json; a resumed run's preset keeps the origins of what it keeps."""
    path = out / "preset.toml"
    if path.is_file():
        changed = changes(load_preset(str(path)), preset)
        told = {key: (value, origin_of(key, origins)) for key, value in changed.items()}
        text = with_values(path.read_text(), told)
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
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": preset.train.precision,
        "seed": preset.train.seed,
        **run_inputs(data, teacher),
    }
    write_json(out / "run.json", facts, durable=True)
