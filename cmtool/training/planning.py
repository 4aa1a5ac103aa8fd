"""A recipe for images of the user's own: what they hold, the device and the time decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmtool.data.datasets import DATASETS, load_dataset
from cmtool.data.survey import Survey, surveys
from cmtool.errors import InputError, UserError, nearest
from cmtool.evaluation.features import PROTOCOLS
from cmtool.models import Model
from cmtool.presets.schema import DataSection, Preset
from cmtool.presets.toml import Resolved, flat, load_preset, packaged_value, resolve
from cmtool.system.devices import free_memory
from cmtool.system.text import printable
from cmtool.training.cost import fitting_parts, seconds_a_step, step_memory
from cmtool.training.laps import random_teacher
from cmtool.training.start import with_teacher

Layers = Mapping[str, Mapping[str, Any]]
"""Dotted keys with values, by their origin."""
SURVEYED = 4096
"""Images of a data set that are looked at, evenly spread."""
MOST_SIDE = {"cpu": 32, "mps": 32, "cuda": 64}
"""Larger images are made smaller, unless the user gives a size."""
SHARE_OF_MEMORY = 0.7
EDM_SIGMA_DATA = 0.5
"""For images that are all alike, where nothing can be measured."""
MANY_STEPS = 8000
"""With fewer steps a batch is made smaller: at the start many small steps learn the most."""
LEAST_BATCH = 16
"""Of photographs, on one core, 16 made a better teacher than 8: fd-pixels 2.4 and not 5.7 after an
hour, 14.5 and not 16.5 after three minutes."""
SHARE_OF_GRIDS = 0.05
"""What the grids of samples may take of a run, as a share of its steps."""
CALLS_OF_A_STEP = 3
"""Calls of a network that take as long as an image of a training step."""
LEAST_STEPS = 100


class Size(NamedTuple):
    """A size of network: options of `adm`, the batch, and the rate as a share of the method's."""

    model_channels: int
    num_res_blocks: int
    head_channels: int
    norm_groups: int
    dropout: float
    channel_mult: tuple[int, ...]
    """() is a slim network: half of its levels have single width, as large ones cost a CPU most."""
    batch: int
    rate: float


SIZES = {
    "small": Size(32, 1, 32, 8, 0.05, (), 64, 1.5),
    "base": Size(128, 2, 64, 32, 0.1, (1, 2, 2, 2, 2, 2), 256, 0.4),
    "large": Size(192, 3, 64, 32, 0.1, (1, 2, 3, 4, 4, 4), 512, 0.1),
}
MOST_LEVELS = 6


class Facts(NamedTuple):
    """What a recipe needs to know of a data set; `size` (H, W) is None for images of many sizes."""

    path: str
    images: int
    size: tuple[int, int] | None
    shortest: int
    channels: int
    classes: int
    sigma_data: float
    rules: Mapping[str, str] = {}
    """How its classes and images are found, by keys of a preset, but for what is usual."""


class Wish(NamedTuple):
    """What the user asks of a recipe: a size of network, a side of the images, hours."""

    size: str | None = None
    image_size: int | None = None
    hours: float = 1.0


WISH = Wish()


def facts_of(path: str, labels: str = "auto", column: str = "") -> Facts:
    """Return what a data set holds. Raises InputError for one without images that can be read."""
    data, found = load_dataset(path, in_memory=False, labels=labels, column=column), Survey()
    for part in surveys(data, every=max(len(data) // SURVEYED, 1)):
        found.add(part)
    if not found.good:
        raise InputError(f"no image of {path} can be read", f"cmtool data info {path}")
    rules = {"data.labels": labels} if labels != "auto" else {}
    rules |= {"data.column": column} if column else {}
    sides = [(int(w), int(h)) for w, h in (size.split("x") for size in found.sizes)]
    w, h = sides[0]
    return Facts(
        path=path, images=len(data), size=(h, w) if len(sides) == 1 else None,
        shortest=min(map(min, sides)), channels=1 if set(found.modes) <= GREY else 3,
        classes=data.num_classes, sigma_data=round(found.sigma_data, 3) or EDM_SIGMA_DATA,
        rules=rules,
    )  # fmt: skip


GREY = {"1", "L", "LA", "I", "I;16", "I;16B"}
"""Modes of pictures without colours."""


def picture_size(facts: Facts, device: str, side: int | None) -> tuple[int, int]:
    """Return the size (H, W) of the images to train on: their own, if the device can take it.

    Otherwise a square, of a side that halves twice.
    """
    most = side or MOST_SIDE[device.partition(":")[0]]
    if facts.size and max(facts.size) <= most and not side and all(s % 4 == 0 for s in facts.size):
        return facts.size
    chosen = min(most, facts.shortest) if side is None else side
    chosen = max(chosen - chosen % 4, 4)
    return chosen, chosen


def network_for(size: tuple[int, int], chosen: Size) -> dict[str, Any]:
    """Return the network of a preset: each level halves the images, down to few pixels.

    Those are 8 or fewer, and attention starts at 16; in a slim network they are 4, and it is 8.
    """
    depth, few = 2, 8 if chosen.channel_mult else 4
    while min(size) >> (depth - 1) > few and depth < MOST_LEVELS:
        depth += 1
    while depth > 1 and any(side % (1 << (depth - 1)) for side in size):
        depth -= 1
    small = [level for level in range(depth) if max(size) >> level <= 2 * few]
    slim = (1,) * (depth - depth // 2) + (2,) * (depth // 2)
    return {
        "name": "adm",
        "model_channels": chosen.model_channels,
        "channel_mult": list(chosen.channel_mult[:depth] or slim),
        "num_res_blocks": chosen.num_res_blocks,
        "attention_levels": small or [depth - 1],
        "head_channels": chosen.head_channels,
        "norm_groups": chosen.norm_groups,
    }


def data_layers(preset: str, facts: Facts, device: str, wish: Wish) -> Layers:
    """Return what the images and the size of the network decide."""
    name = wish.size or ("base" if device.startswith("cuda") else "small")
    if name not in SIZES:
        raise UserError(f"unknown --size {name!r}", nearest(name, SIZES))
    chosen, size = SIZES[name], picture_size(facts, device, wish.image_size)
    is_one_size = facts.size == size
    network = network_for(size, chosen)
    if packaged_value(preset, "model.network.two_time"):
        network["two_time"] = True
    if not packaged_value(preset, "train.from_teacher"):
        network["dropout"] = packaged_value(preset, "model.network.dropout") and chosen.dropout
    return {
        "the images": {
            "data.path": facts.path,
            **facts.rules,
            "data.fit": "exact" if is_one_size else "adm",
            "model.image_size": list(size),
            "model.channels": facts.channels,
            "model.num_classes": facts.classes,
            "model.sigma_data": facts.sigma_data,
        },
        f"size {name}": {
            "model.network": network,
            "train.batch": chosen.batch,
            "train.lr": packaged_value(preset, "train.lr") * chosen.rate,
        },
    }


def teacher_layers(preset: str, teacher: Model) -> Layers:
    """Return what a student takes of its teacher's own training: images, batch and rate.

    Its rate falls with the root of a small batch: of 510 steps of 8, on emoji, 1.75e-4 made a
    better CD than 7e-4.
    """
    theirs = teacher.preset
    lr = packaged_value(preset, "train.lr")
    if not isinstance(theirs, Preset):
        return {"size large": {"train.lr": lr * SIZES["large"].rate}}
    small = math.sqrt(min(theirs.train.batch / SIZES["small"].batch, 1.0))
    return {
        f"teacher {teacher.source}": {
            "data.path": theirs.data.path,
            **shown_alike(theirs.data),
            "data.fit": "adm" if theirs.data.fit == "exact" else theirs.data.fit,
            "train.batch": theirs.train.batch,
            "train.lr": lr * min(theirs.train.lr / packaged_value("edm", "train.lr"), 1.0) * small,
        }
    }


def shown_alike(data: DataSection) -> dict[str, Any]:
    """Return the keys by which another training sees the same images in the same way."""
    keys = ("labels", "column", "background", "flip", "label_dropout", "balanced")
    return {f"data.{key}": getattr(data, key) for key in keys}


def start_layers(start: Model, facts: Facts) -> Layers:
    """Return what a training that starts from a model's weights takes of that model.

    Only its classes are those of the images.
    """
    card, about = start.preset, f"model {start.source}"
    network = {"name": card.model.network.name, **card.model.network.options}
    layer = {
        **{f"noise.{key}": value for key, value in card.noise.model_dump().items()},
        "model.network": network,
        "model.image_size": list(card.model.image_size),
        "model.channels": card.model.channels,
        "model.sigma_data": card.model.sigma_data,
        "model.noise_label": card.model.noise_label.model_dump(),
        "data.fit": "adm",
    }
    if isinstance(card, Preset):
        layer |= {"train.batch": card.train.batch, "train.lr": card.train.lr}
    return {
        "the images": {
            "data.path": facts.path,
            **facts.rules,
            "model.num_classes": facts.classes,
        },
        about: layer,
    }


def scaled(preset: Preset, steps: int, images: int) -> dict[str, Any]:
    """Return what a preset counts in steps or images, for another run: each keeps its share."""
    by_steps = steps / preset.train.steps
    by_images = images / (preset.train.steps * preset.train.batch)
    values: dict[str, Any] = {"train.steps": steps}
    for key, value in flat(preset.model_dump(exclude_none=True)):
        if key.endswith("_images"):
            values[key] = max(round(value * by_images), 1)
        if key.endswith((".stage_steps", ".warmup_steps")):
            values[key] = math.ceil(round(value * by_steps, 6))  # no stage more is entered
    values["train.ema"] = [
        {
            k: max(round(v * by_images), 1) if k == "halflife_images" else v
            for k, v in average.items()
        }
        for average in preset.model_dump(exclude_none=True)["train"]["ema"]
    ]
    calls = preset.sample.steps * (2 if preset.kind == "teacher" else 1)
    grid = preset.run.sample_grid * calls / CALLS_OF_A_STEP
    grids = min(max(round(SHARE_OF_GRIDS * images / grid), 1), 10)
    every = {
        "run.checkpoint_every": max(steps // 10, 1),
        "run.sample_every": max(steps // grids, 1),
    }
    return values | every


def parts_of_batch(preset: Preset, teacher: Model | None, device: str) -> int:
    """Return into how many parts the free memory splits the batch; 1 where it is not known."""
    free = free_memory(device)
    memory = step_memory(preset, teacher, device)
    if free is None or memory is None:
        return 1
    return fitting_parts(preset, memory, round(free * SHARE_OF_MEMORY)) or preset.train.batch


def planned(
    name: str,
    device: str,
    own: Layers,
    *,
    facts: Facts | None = None,
    teacher: Model | None = None,
    start: Model | None = None,
    wish: Wish = WISH,
) -> tuple[Resolved, Layers]:
    """Return a method's preset, fitted to images or a teacher, the device and the time, and how.

    `own` are the user's values, which go over all others. The layers returned are those between
    the method's preset and the user's values.
    """
    layers: dict[str, Mapping[str, Any]] = {}
    if facts is not None:
        layers |= start_layers(start, facts) if start else data_layers(name, facts, device, wish)
    if teacher is not None:
        layers |= teacher_layers(name, teacher)

    def resolved() -> Resolved:
        fitted = resolve(name, {**layers, **own})
        return with_teacher(fitted, teacher) if teacher else fitted

    preset = resolved().preset
    if not preset.data.path:
        raise UserError(f"preset {name} names no images, nor does the teacher", "give --data DIR")
    layers["the images"] = {
        "description": f"{name} of {printable(Path(preset.data.path).name)}",
        "run.eval_metric": distance_of(preset),
        **layers.get("the images", {}),
    }
    guide = teacher or random_teacher(preset, device)
    if not any("train.steps" in layer for layer in own.values()):
        seconds = seconds_a_step(preset, guide, device)
        is_free = teacher is None and start is None
        if is_free and not any("train.batch" in layer for layer in own.values()):
            times = fewer_images(preset.train.batch, wish.hours * 3600 / seconds)
            layers |= smaller_batch(preset, times)
            preset, seconds = resolved().preset, seconds / times
        steps = max(rounded(wish.hours * 3600 / seconds), LEAST_STEPS)
        why = f"about {spoken(steps * seconds)} on this {device}"
        layers[why] = scaled(load_preset(name), steps, steps * preset.train.batch)
    else:
        steps = preset.train.steps
        values = scaled(load_preset(name), steps, steps * preset.train.batch)
        own_pace = {key: value for key, value in values.items() if not key.startswith("run.")}
        layers[f"{steps:,} steps"] = own_pace
    parts = parts_of_batch(preset, guide, device)
    layers |= {"memory at hand": {"train.accumulate": parts}} if parts > 1 else {}
    return resolved(), layers


def spoken(seconds: float) -> str:
    """Return a time to one figure after the point in hours, or in whole minutes below an hour."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} minute{'s' * (minutes > 1)}"


def distance_of(preset: Preset) -> str:
    """Return the Frechet distance that needs no file: bundled images have their own."""
    name = preset.data.path.partition(":")[0]
    shape = (preset.model.channels, *preset.model.image_size)
    is_bundled = name in DATASETS and PROTOCOLS[name].shape == shape
    return f"fd-{name if is_bundled else 'pixels'}"


def fewer_images(batch: int, steps: float) -> int:
    """Return by what to divide a batch, so that a run of so many steps of it has MANY_STEPS."""
    times = 1
    while steps * times < MANY_STEPS and batch // (2 * times) >= LEAST_BATCH:
        times *= 2
    return times


def smaller_batch(preset: Preset, times: int) -> Layers:
    """Return the values of a batch so many times smaller; the rate stays.

    Of 3.5e-4 (by the root of the batch), 5e-4, 1.5e-3 and 4e-3 the third was best for teachers of
    emoji, 1,200 steps of 8.
    """
    return {} if times == 1 else {"many steps": {"train.batch": preset.train.batch // times}}


def rounded(number: float) -> int:
    """Return a number with two digits, as people write it."""
    unit = 10 ** max(math.floor(math.log10(max(number, 1))) - 1, 0)
    return round(number / unit) * unit
