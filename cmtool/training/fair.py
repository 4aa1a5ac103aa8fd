"""Presets made comparable: the same images, network, batch and seed, and the same time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from cmtool.data.datasets import DATASETS, Dataset
from cmtool.errors import UserError, nearest
from cmtool.evaluation.features import PROTOCOLS
from cmtool.models import Model
from cmtool.presets.build import needs_teacher
from cmtool.presets.schema import Preset
from cmtool.presets.toml import Resolved, is_method_preset, load_preset, resolve
from cmtool.training.comparison import Asked, Fitted
from cmtool.training.cost import step_times
from cmtool.training.laps import rig, seconds_before, times_before
from cmtool.training.planning import Layers, parts_of_batch, scaled, shown_alike, teacher_layers
from cmtool.training.start import with_teacher
from cmtool.training.state import training_images

METRIC = "fid"
"""The metric of METRICS that is measured, under its name by the protocol."""
TIMED_SHARE, MOST_TIMED_SECONDS = 0.01, 10.0
"""Part of the time of a run for which steps are timed in a round, and the seconds at most."""
ROUNDS, LEAST_LAPS = 2, 3
"""Rounds in which steps are timed, and steps that are timed in each at least."""
LOG_LINES = 50


class Terms(NamedTuple):
    """What holds for all presets of a comparison."""

    asked: Asked
    teacher: Model
    device: str


def resolved(terms: Terms, name: str, fitted: Fitted | None = None, seed: int = 0) -> Resolved:
    """Return a preset on the shared images, with the teacher's network and the user's values.

    `fitted` has its steps: what the preset counts in steps or images keeps its share of the run.
    """
    teacher, values = terms.teacher, terms.asked.values
    layers = {**(teacher_layers(name, teacher) if is_method_preset(name) else {})}
    layers |= shared_layers(terms)

    def made() -> Resolved:
        own = {"--set": values, "--seeds": {"train.seed": seed}}
        return with_teacher(resolve(name, {**layers, **own}), teacher)

    if fitted is None:
        found = made()
        if not found.preset.data.path:
            what = f"preset {name} names no images, nor does the teacher"
            raise UserError(what, "add --data DIR")
        return found
    steps = fitted.steps
    counts = scaled(load_preset(name), steps, steps * fitted.batch)
    rare = {"run.sample_every": steps, "run.log_every": max(steps // LOG_LINES, 1)}
    layers["equal time"] = {**counts, **rare, "train.accumulate": fitted.accumulate}
    return made()


def shared_layers(terms: Terms) -> Layers:
    """Return what is the same for all presets: images and batch, the teacher's own if it has any.

    Else they are those of the first preset.
    """
    asked, theirs = terms.asked, terms.teacher.preset
    own = theirs if isinstance(theirs, Preset) else load_preset(asked.presets[0])
    data, is_theirs = own.data, asked.data in (None, own.data.path)
    return {
        "the comparison": {
            "data.path": data.path if asked.data is None else asked.data,
            **shown_alike(data),
            "data.fit": data.fit if is_theirs or data.fit != "exact" else "adm",
            "train.batch": own.train.batch,
        }
    }


def split_by_memory(terms: Terms, preset: Preset) -> Preset:
    """Return a preset whose batch is split so that a step fits, unless the user splits it."""
    if "train.accumulate" in terms.asked.values:
        return preset
    parts = parts_of_batch(preset, own_teacher(terms, preset), terms.device)
    train = preset.train.model_copy(update={"accumulate": parts})
    return preset.model_copy(update={"train": train})


def own_teacher(terms: Terms, preset: Preset) -> Model | None:
    """Return the teacher for a preset that needs one."""
    return terms.teacher if needs_teacher(preset) else None


def work_before(terms: Terms, name: str, preset: Preset, data: Dataset) -> float:
    """Return the seconds of a run in which its method makes something before a step.

    It does so as often as in the preset of that name, whatever the steps of the run. Raises
    UserError if no time is left for steps.
    """
    times = times_before(load_preset(name))
    if not times:
        return 0.0
    images = partial(training_images, preset, data, terms.device)
    made = rig(preset, own_teacher(terms, preset), terms.device, images)
    each = seconds_before(made, preset.train.batch // preset.train.accumulate)
    if times * each < terms.asked.seconds:
        return times * each
    seconds = math.ceil(times * each)
    what = f"{name} makes its grid {times} times, {each:.1f} s each: no time is left for steps"
    raise UserError(what, f"leave it out, or give more than --max-time {seconds}s")


def lap_times(terms: Terms, presets: Mapping[str, Preset]) -> dict[str, float]:
    """Return the seconds that a step of each preset takes: the median of some.

    The presets are timed in turns, so that a while in which the machine is busy is in all of them.
    """
    laps: dict[str, list[float]] = {name: [] for name in presets}
    for _ in range(ROUNDS):
        for name, preset in presets.items():
            parts, own = preset.train.accumulate, own_teacher(terms, preset)
            each = step_times(preset, own, terms.device, preset.train.batch // parts)
            next(each)
            end = time.monotonic() + min(terms.asked.seconds * TIMED_SHARE, MOST_TIMED_SECONDS)
            least = len(laps[name]) + LEAST_LAPS
            while time.monotonic() < end or len(laps[name]) < least:
                laps[name].append(next(each) * parts)
    return {name: statistics.median(found) for name, found in laps.items()}


def picked_protocol(asked: str | None, preset: Preset) -> str:
    """Return the protocol: the user's, else that of bundled data, else pixels.

    Raises UserError for one that is unknown, or is not for these images.
    """
    shape = (preset.model.channels, *preset.model.image_size)
    rows = PROTOCOLS.items()
    good = [n for n, row in rows if row.metric in (None, METRIC) and row.network != "own"]
    good = [name for name in good if PROTOCOLS[name].shape in (None, shape)]
    if asked is None:
        known = preset.data.path.partition(":")[0]
        return known if known in DATASETS and known in good else "pixels"
    if asked not in good:
        what = f"--protocol {asked!r} for images of {shape[2]}x{shape[1]}"
        raise UserError(what, nearest(asked, good))
    return asked
