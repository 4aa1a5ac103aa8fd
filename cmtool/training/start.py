"""How a run starts: afresh, over an earlier run, or where one stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.presets.schema import Choice, Preset
from cmtool.presets.toml import Resolved, flat, load_preset
from cmtool.system.devices import best_precision
from cmtool.system.dist import Group
from cmtool.training.folder import is_resumable, refuse_busy
from cmtool.training.status import launched_by, launcher, read_json


class Start(NamedTuple):
    """How a run starts, the same in all its processes."""

    out: Path
    preset: Preset
    """With its precision and the parts of its batch decided."""
    origins: Mapping[str, str]
    resume: bool
    overwrite: bool
    launchers: Sequence[str]
    """The torchrun of each process, "" without one."""
    note: str | None
    """What the user should know of the parts of the batch."""


def decide_start(
    preset: Preset,
    out: Path,
    origins: Mapping[str, str],
    device: str,
    group: Group,
    *,
    resume: bool,
    overwrite: bool,
) -> Start:
    """Return how a run starts, as the leading process decides it; every process calls this.

    torchrun starts new workers when one fails (`--max-restarts`): they resume what the first ones
    began. Raises UserError for both `resume` and `overwrite`, BusyError for a folder in use.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite", "give one of them")
    out, launchers = group.tell(out), group.gather(launcher())
    preset, origins = with_precision(preset, origins, group.tell(best_precision(device)))
    group.agreed(lambda: refuse_busy(out), "not busy")
    is_restart = group.tell(launched_by(out, launchers) and is_resumable(out))
    note = None
    if resume or is_restart:
        asked = not is_restart and origins.get("train.accumulate", "").startswith("--")
        preset, note = group.agreed(
            lambda: split_as_before(out, preset, group.world_size, asked=asked), "split"
        )
    return Start(
        out, preset, origins, resume or is_restart, overwrite and not is_restart, launchers, note
    )


def with_precision(
    preset: Preset, origins: Mapping[str, str], best: str
) -> tuple[Preset, dict[str, str]]:
    """Return the preset and its origins, the precision `auto` replaced by the device's best.

    The run records this precision, so it goes on in it on any device.
    """
    if preset.train.precision != "auto":
        return preset, dict(origins)
    return _with_train(preset, precision=best), {**origins, "train.precision": "auto"}


def split_as_before(
    out: Path, preset: Preset, processes: int, *, asked: bool
) -> tuple[Preset, str | None]:
    """Return the preset with its batch split into as many parts as in `out` so far, and a note.

    A part of the batch has its own noise; there are processes times train.accumulate of them. The
    number of parts changes where the processes do not divide it, or where the user `asked` for
    another train.accumulate: then the noise is another from here on.
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
    parts, note = accumulate * processes, None
    if parts != before:
        note = (
            f"the batch is split into {parts} parts now, {before} before: the images stay the"
            " same, the noise is different from here on"
        )
    elif processes != stored:
        note = f"the batch is split into {parts} parts as before, {accumulate} for each process"
    return _with_train(preset, accumulate=accumulate), note


def _with_train(preset: Preset, **values: object) -> Preset:
    train = preset.train.model_copy(update=values)
    return preset.model_copy(update={"train": train})


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
