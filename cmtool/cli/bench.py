"""cmtool bench: what a preset costs on this device, before its first run."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cmtool.cli import _completion
from cmtool.cli._devices import importing_torch, pick_device
from cmtool.cli._options import tell_notes, with_options
from cmtool.cli._output import emit_json, processes, say
from cmtool.cli._run_options import RunOptions
from cmtool.cli._table import show_table
from cmtool.cli.train import default_preset, fitted
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from cmtool.data.datasets import Dataset
    from cmtool.models import Model
    from cmtool.presets.schema import Preset
    from cmtool.presets.toml import Resolved
    from cmtool.training.bench import Figures

TAKEN = {"set_", "data", "metric", "accumulate", "precision", "compile_", "device", "as_json"}
"""Options of a training that change what it costs."""
MOST_PRICE = 1_000_000
GIB = 1 << 30


PresetOption = Annotated[
    str | None,
    Option(
        "--preset",
        autocompletion=_completion.presets,
        help="A preset's name or a TOML file. Default: the one that cmtool train takes for"
        " --data, which is digits-edm without it.",
    ),
]
Teacher = Annotated[
    str | None,
    Option(
        autocompletion=_completion.models,
        help="Teacher model. Default: one with random weights, which takes as long.",
    ),
]
Price = Annotated[
    float | None,
    Option(min=0, max=MOST_PRICE, help="Price of this device for an hour, to tell the cost."),
]
TimedSteps = Annotated[
    int | None,
    Option(min=1, help="Steps that are timed. Default: as many as fit in 15 seconds."),
]


def _bench(
    options: RunOptions,
    preset: PresetOption = None,
    teacher: Teacher = None,
    price: Price = None,
    steps: TimedSteps = None,
) -> None:
    """Measure what training a preset costs here: speed, MFU, memory, hours, and the price.

    `cmtool bench --preset digits-cd`

    `cmtool bench --preset cifar10-cd-l2 --device cuda --price 2.50 --json`

    `cmtool bench --data photos/ --set train.precision=bf16`

    It takes some steps of the training itself, on random images where the data set is not there.
    Nothing is written. In a pipe, tabs separate the columns.
    """
    if processes()[1] > 1:
        raise UserError("cmtool bench in several processes", "run it in one, without torchrun")
    if price is not None and math.isnan(price):
        raise UserError("--price nan", "give the price of an hour, for example 2.50")
    with importing_torch():
        from cmtool.training.bench import bench as measured
    from cmtool.training.laps import RANDOM, random_teacher
    from cmtool.training.state import training_images

    device = pick_device(options.device)
    name = preset or default_preset(options, None)
    model = _teacher(teacher, device)
    resolved = _resolved(options, name, model)
    if model is None:
        model = random_teacher(resolved.preset, device)
        if model is not None:
            say("note: no --teacher, so one with random weights stands in")
    data = _data(resolved.preset, model, is_named=options.data is not None)
    images = None if data is None else partial(training_images, resolved.preset, data, device)
    found = measured(resolved.preset, model, device, images=images, steps=steps, tell=_note)
    about = {
        "preset": name,
        "device": device,
        "device_name": _device_name(device),
        "data": RANDOM if data is None else data.name,
        "teacher": None if model is None else model.source,
    }
    facts = {**about, **facts_of(found, price)}
    if options.as_json:
        emit_json(facts)
    else:
        show_table(("", "measured"), rows_of(facts), with_head=sys.stdout.isatty())


def _note(text: str) -> None:
    say(f"note: {text}")


def _teacher(name: str | None, device: str) -> Model | None:
    """Return the model of --teacher, None without it."""
    if name is None:
        return None
    from cmtool.models import load_model

    model = load_model(name, device=device, otherwise="teacher")
    tell_notes(model)
    return model


def _resolved(options: RunOptions, name: str, teacher: Model | None) -> Resolved:
    """Return the preset as a training would have it: a method's own one is fitted.

    Raises UserError for a teacher that the preset does not take, or images that it lacks.
    """
    from cmtool.presets.build import needs_teacher
    from cmtool.presets.toml import is_method_preset
    from cmtool.training.start import check_components, with_teacher

    resolved = options.resolve(name)
    check_components(resolved.preset)
    if teacher is not None and not needs_teacher(resolved.preset):
        raise UserError(f"preset {name} takes no teacher", "leave --teacher out")
    data = resolved.preset.data
    if not is_method_preset(name):
        return resolved if teacher is None else with_teacher(resolved, teacher)
    if teacher is not None:
        return fitted(options, name, f"the teacher {teacher.source}", teacher=teacher)
    if not data.path:
        raise UserError(f"preset {name} names no images", "add --data DIR: your images")
    return fitted(options, name, data.path, images=data)


def _data(preset: Preset, teacher: Model | None, *, is_named: bool) -> Dataset | None:
    """Return the data set of a preset; None, with a note, for one that is not there.

    One that the user names is there. Raises InputError for images that do not fit the preset.
    """
    from cmtool.data.datasets import DATASETS, place_of
    from cmtool.training.start import check_fit, load_images

    path = preset.data.path
    if path.partition(":")[0] not in DATASETS:
        try:
            place_of(path)
        except InputError:
            if is_named:
                raise
            _note(f"no data set {path!r} here, so random images stand in: nothing is read")
            return None
    data = load_images(preset, _note)
    check_fit(preset, data, teacher)
    return data


def _device_name(device: str) -> str:
    """Return what a device calls itself; "" for one that does not."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def facts_of(found: Figures, price: float | None) -> dict[str, Any]:
    """Return the figures as JSON takes them: seconds, bytes, images and FLOPs."""
    train, lap = found.preset.train, found.lap
    return {
        "precision": train.precision,
        "compile": train.compile,
        "batch": train.batch,
        "accumulate": train.accumulate,
        "steps": train.steps,
        "timed_steps": found.laps,
        "timed_images": found.images,
        "images_per_second": _short(found.images_per_second),
        "step_seconds": _short(lap.whole),
        "first_step_seconds": _short(found.first),
        "phases": {phase: _short(seconds) for phase, seconds in lap._asdict().items()},
        "flops": found.flops,
        "mfu": None if found.mfu is None else _short(found.mfu),
        "memory": found.held._asdict(),
        "largest_microbatch": found.largest,
        "largest_is_tried": found.is_tried,
        "hours": _short(found.hours),
        "price": price,
        "cost": None if price is None else _short(found.hours * price),
    }


def _short(number: float) -> float:
    """Return a number with six digits."""
    return float(f"{number:.6g}")


PHASES = {
    "data": "waiting for images",
    "forward": "forward",
    "backward": "backward",
    "update": "optimizer and averages",
}
HELD = {
    "networks": "memory: networks",
    "first_step": "memory: first step",
    "steady": "memory: later steps",
    "reserved": "memory: taken of the device",
    "estimate": "memory: expected",
}


def rows_of(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table; what is not known has none."""
    whole, memory = facts["step_seconds"], facts["memory"]
    device = f"{facts['device']} {facts['device_name']}".strip()
    parts = f" in {facts['accumulate']} parts" if facts["accumulate"] > 1 else ""
    rows = [
        ("preset", facts["preset"]),
        ("device", f"{device}, {facts['precision']}{', compiled' * facts['compile']}"),
        ("images", facts["data"]),
        *([("teacher", facts["teacher"])] if facts["teacher"] else []),
        ("timed", f"{facts['timed_steps']} steps, {facts['timed_images']} images at once"),
        ("images a second", f"{facts['images_per_second']:,.4g}"),
        ("MFU", "-" if facts["mfu"] is None else f"{facts['mfu']:.1%}"),
        ("seconds of a step", f"{whole:.3g}, {facts['batch']:,} images{parts}"),
    ]
    for phase, name in PHASES.items():
        seconds = facts["phases"][phase]
        rows.append((f"  {name}", f"{seconds:.3g}, {seconds / whole:.0%}"))
    rows.append(("seconds of the first step", f"{facts['first_step_seconds']:.3g}"))
    rows += [
        (name, f"{memory[key] / GIB:.2f} GiB") for key, name in HELD.items() if memory[key]
    ]  # fmt: skip
    if facts["largest_microbatch"] is not None:
        how = "by trying" if facts["largest_is_tried"] else "by the expected memory"
        rows.append(("most images at once", f"{facts['largest_microbatch']:,}, {how}"))
    rows.append(("hours", f"{facts['hours']:.3g}, {facts['steps']:,} steps"))
    if facts["cost"] is not None:
        rows.append(("cost", f"{facts['cost']:.2f}, at {facts['price']:g} an hour"))
    return rows


bench = with_options(
    _bench,
    RunOptions,
    without={field.name for field in fields(RunOptions)} - TAKEN,
)
