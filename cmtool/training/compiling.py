"""Whether a run compiles its networks, where its preset leaves that to cmtool."""

from __future__ import annotations

from cmtool.errors import UserError
from cmtool.models import Model
from cmtool.presets.build import method_row
from cmtool.presets.schema import Preset
from cmtool.system.devices import HALF
from cmtool.system.dist import Group
from cmtool.training.start import Start
from cmtool.training.state import check_compile
from cmtool.training.utilisation import step_flops

COMPILE_SECONDS = 600
"""What compiling takes at most: 160 to 290 seconds a graph on one core, of one to three graphs."""
SPEED = 2.5e14
"""FLOP/s of a step before it is compiled, on a fast GPU; on others there is more to save."""
SAVED = 0.2
"""Share of a step's time that compiling saves."""
GAIN = 2
"""Compiling must save so many times what it takes."""


def with_compile_decided(start: Start, teacher: Model | None, device: str, group: Group) -> Start:
    """Return the start of a run, which compiles if that pays; every process calls this.

    What the user, or a preset, says of `train.compile` stands. A run that is resumed goes on as it
    began: that is in its preset.
    """
    train = start.preset.train
    if start.origins.get("train.compile") != "default" or train.compile:
        return start
    saved = 0.0
    if may_compile(start.preset, device, group):
        saved = seconds_saved(start.preset, teacher, group.world_size)
    pays = group.tell(saved > GAIN * COMPILE_SECONDS)
    if not pays:
        return start
    preset = start.preset.model_copy(update={"train": train.model_copy(update={"compile": True})})
    origins = {**start.origins, "train.compile": "auto"}
    return start._replace(preset=preset, origins=origins, notes=[*start.notes, told(saved)])


def may_compile(preset: Preset, device: str, group: Group) -> bool:
    """Tell whether compiling is known to help and to change nothing.

    Float32 and forward mode have not been measured.
    """
    if not device.startswith("cuda") or preset.train.precision not in HALF:
        return False
    try:
        check_compile(preset, group)
    except UserError:
        return False
    return method_row(preset).recomputes


def seconds_saved(preset: Preset, teacher: Model | None, processes: int) -> float:
    """Return the seconds that compiling saves in a whole run, at least; 0 if nobody can tell."""
    flops = step_flops(preset, teacher) or 0
    return SAVED * preset.train.steps * flops / (SPEED * processes)


def told(saved: float) -> str:
    """Return what the user is told of a run that compiles."""
    takes = (
        f"the networks are compiled at the first step, which takes up to {COMPILE_SECONDS // 60}"
    )
    return f"{takes} minutes and saves {saved / 3600:.1f} hours or more; --no-compile leaves it out"
