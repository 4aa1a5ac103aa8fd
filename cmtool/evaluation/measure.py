"""Metrics by protocol: from two sets of images to numbers, and to all that these depend on."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.core.consistency import deviations, paths
from cmtool.core.rng import SeededNoise, keyed_generator
from cmtool.core.samplers import sampling_levels
from cmtool.core.solvers import heun
from cmtool.data.batches import decoded_ahead
from cmtool.data.datasets import Dataset, load_dataset
from cmtool.data.images import to_uint8
from cmtool.errors import InputError, UserError
from cmtool.evaluation.features import (
    Extractor,
)
from cmtool.evaluation.metrics import (
    Estimate,
    Gaussian,
    GaussianSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cmtool.evaluation.references import Reference, read_reference, write_reference
from cmtool.models import Model
from cmtool.sampling import Plan, generate, steady
from cmtool.system.dist import Group
from cmtool.system.files import file_sha256

PUBLISHED_NUM = 50_000
"""Images that published numbers are of; fewer make a proxy."""


class Needs(NamedTuple):
    """What a metric takes of a set: its Gaussian, its features one by one."""

    gaussian: bool = False
    rows: bool = False


class Sample(NamedTuple):
    """What is kept of a set of images; `rows` (N, D) in an order that only they decide.

    `num` is 0 where statistics do not say it; `fingerprint` is a hash of the images in any order.
    """

    gaussian: Gaussian | None
    rows: Tensor | None
    num: int
    fingerprint: str = ""


Tell = Callable[[int], None]
"""Is told how many images are done."""


def collect(
    extractor: Extractor,
    batches: Iterable[Tensor],
    needs: Needs,
    group: Group,
    tell: Tell = lambda done: None,
    name: str = "images",
) -> Sample:
    """Return what is needed of the images (B, C, H, W) uint8 that the processes have, together.

    Every process calls it with its own, and a `name` of this call alone. With Gaussians alone
    memory does not grow.
    """
    sums, kept, marks, num = GaussianSums(extractor.width), [], 0, 0

    def take() -> None:
        nonlocal marks, num
        for images in regrouped(batches, extractor.chunk):
            features = extractor(images)
            if needs.gaussian:
                sums.add(features)
            if needs.rows:
                kept.append(features.cpu())
            marks += sum(map(_mark, images.cpu()))
            num += len(images)
            tell(num)

    group.together(take, f"features of {name}")
    counts = group.gather((num, marks))
    num, marks = (sum(column) for column in zip(*counts, strict=True))
    if num < 2:
        raise InputError(f"{num} image{'s' * (num != 1)} to evaluate", "give 2 or more")
    rows = None
    if needs.rows:
        rows = ordered(torch.cat([torch.cat(part) for part in group.gather(kept) if part]))
    if needs.gaussian and group.world_size > 1:
        sums.share(group.sum)
    gaussian = sums.gaussian() if needs.gaussian else None
    return Sample(gaussian, rows, num, f"{marks % 2**64:016x}")


def regrouped(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the same images, in the same order, at least `size` at a time but for the last."""
    held: list[Tensor] = []
    for images in batches:
        held.append(images)
        if sum(map(len, held)) >= size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _mark(image: Tensor) -> int:
    """Return a hash of one image."""
    content = repr(tuple(image.shape)).encode() + image.numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def ordered(rows: Tensor) -> Tensor:
    """Return features (N, D) sorted by a hash of each.

    What is drawn from them by place is then the same for any order of the images.
    """
    keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows]
    return rows[torch.tensor(sorted(range(len(rows)), key=keys.__getitem__))]


def share(parts: Sequence[Any], group: Group) -> Sequence[Any]:
    """Return every n-th part, those of this process."""
    return parts[group.rank :: group.world_size]


def image_batches(
    data: Dataset, num: int | None, batch: int, group: Group, workers: int
) -> Iterator[Tensor]:
    """Yield this process's share of a data set, or of `num` of it, the same random ones always."""
    index = torch.arange(len(data))
    if num is not None and num < len(data):
        index = torch.randperm(len(data), generator=keyed_generator("subset"))[:num]
    data.images[index[:1]]  # the size of all, before other processes each take that of their first
    return decoded_ahead(data.images, share(index.split(batch), group), workers)


def drawn_batches(
    model: Model, chosen: Plan, seeds: range, batch: int, group: Group, device: str
) -> Iterator[Tensor]:
    """Yield this process's share of the images of some seeds, as they would be written.

    Raises InputError for values that are not finite.
    """
    mine = [seed for part in share(_split(seeds, batch), group) for seed in part]
    if not mine:
        return
    for drawn in generate(model.f, model.preset, chosen, mine, batch=batch, device=device):
        yield to_uint8(drawn)


def _split(seeds: range, size: int) -> list[range]:
    return [seeds[first : first + size] for first in range(0, len(seeds), size)]


class Setting(NamedTuple):
    """What is the same for all sets of a measurement."""

    protocol: str
    extractor: Extractor
    batch: int
    workers: int
    group: Group


def set_of(
    name: str,
    needs: Needs,
    setting: Setting,
    *,
    num: int | None = None,
    data: Dataset | None = None,
    tell: Tell = lambda done: None,
    side: str = "images",
) -> tuple[Sample, dict[str, Any]]:
    """Return a set of images, or a file of statistics, by name, and what to say of it.

    Statistics that a file has are taken from it; for features it lacks, its images are looked at.
    Raises InputError for what cannot be compared, or what the metric cannot be computed from, and
    UserError for a number of images of what is no longer images.
    """
    stored = read_reference(Path(name)) if data is None else None
    if stored is None:
        data = data or load_dataset(name, in_memory=False)
        found = collect(
            setting.extractor,
            image_batches(data, num, setting.batch, setting.group, setting.workers),
            needs, setting.group, tell, side,
        )  # fmt: skip
        return found, {"name": data.name, "images": found.num, "fingerprint": found.fingerprint}
    check_comparable(name, stored, setting)
    facts: dict[str, Any] = {"name": name, "sha256": file_sha256(Path(name))}
    if stored.about:
        facts["made_from"] = stored.about.get("data")
        facts["protocol"] = stored.about.get("protocol")
        if isinstance(stored.about.get("features"), dict):
            facts["precision"] = stored.about["features"].get("precision")
    gaussian, rows = stored.gaussian, stored.rows
    missing = Needs(needs.gaussian and gaussian is None, needs.rows and rows is None)
    if missing.gaussian and rows is not None:
        sums = GaussianSums(rows.shape[1])
        sums.add(rows)
        gaussian, missing = sums.gaussian(), missing._replace(gaussian=False)
    if num is not None and missing != needs:
        raise UserError(
            f"{num} images of {name}, which holds statistics of all", "leave the number out"
        )
    if any(missing):
        if not stored.has_images:
            raise InputError(
                f"{name} holds mu and sigma only: KID, precision and recall compare single images",
                "give the images, or statistics of cmtool eval reference --keep-features",
            )
        images = load_dataset(name, in_memory=False)
        found, _ = set_of(name, missing, setting, num=num, data=images, tell=tell, side=side)
        gaussian, rows = gaussian or found.gaussian, found.rows if rows is None else rows
    single = len(rows) if rows is not None else 0
    num_images = gaussian.num if needs.gaussian and gaussian is not None else single
    facts["images"] = num_images or None
    if needs.rows and single != num_images:
        facts["single_images"] = single
    return Sample(gaussian, None if rows is None else ordered(rows), num_images), facts


def check_comparable(name: str, stored: Reference, setting: Setting) -> None:
    """Raise InputError for statistics of other features than the protocol's."""
    extractor = setting.extractor
    widths = [len(stored.gaussian.mean)] if stored.gaussian is not None else []
    widths += [stored.rows.shape[1]] if stored.rows is not None else []
    for width in widths:
        if width != extractor.width:
            raise InputError(
                f"{name} has {width} features an image, --protocol {setting.protocol} has"
                f" {extractor.width}",
                "give statistics of this protocol, or another --protocol",
            )
    said = stored.about.get("features")
    if isinstance(said, dict):
        made = stored.about.get("protocol")
        remedy = f"--protocol {made}" if made != setting.protocol else "give its --feature-weights"
        for key in ("name", "resize", "sha256"):
            wanted = getattr(extractor, key)
            if said.get(key) != wanted:
                raise InputError(
                    f"{name} was made with {key} {said.get(key)!r}, --protocol"
                    f" {setting.protocol} is {wanted!r}",
                    f"{remedy}, or make it again",
                )
        return  # it says so itself, whatever it is called
    modes = {"clean": "_clean_", "tf": "_legacy_tensorflow_"}
    for resize, mark in modes.items():
        if mark in Path(name).name and extractor.resize != resize:
            raise InputError(
                f"{name} is of clean-fid's mode {mark.strip('_')}, --protocol"
                f" {setting.protocol} resizes by another rule",
                f"--protocol {'clean' if resize == 'clean' else 'legacy-tf'}",
            )


def extractor_facts(extractor: Extractor) -> dict[str, Any]:
    """Return what to say of the features."""
    return {
        "name": extractor.name, "sha256": extractor.sha256, "width": extractor.width,
        "resize": extractor.resize, "precision": extractor.precision,
    }  # fmt: skip


def save_reference(
    path: Path, sample: Sample, data: Mapping[str, Any], setting: Setting, version: str
) -> None:
    """Write the statistics of a set with what they depend on."""
    assert sample.gaussian is not None
    about = {
        "data": dict(data), "protocol": setting.protocol,
        "features": extractor_facts(setting.extractor), "cmtool": version,
    }  # fmt: skip
    write_reference(path, sample.gaussian, sample.rows, about)


KID = {"subsets": 100, "size": 1000, "seed": 0}
IS = {"split": 5000}
PR = {"k": 3}
Values = dict[str, Estimate]


class Metric(NamedTuple):
    """What a metric takes of both sets, from it its values by name, and its settings."""

    made: Needs
    reference: Needs
    values: Callable[[Sample, Sample, Extractor], Values]
    settings: Mapping[str, Any]


def _fid(made: Sample, reference: Sample, extractor: Extractor) -> Values:
    assert made.gaussian is not None
    assert reference.gaussian is not None
    return {"fid": Estimate(frechet_distance(made.gaussian, reference.gaussian), math.nan)}


def _kid(made: Sample, reference: Sample, extractor: Extractor) -> Values:
    assert made.rows is not None
    assert reference.rows is not None
    there = extractor.device
    return {"kid": kernel_distance(reference.rows.to(there), made.rows.to(there), **KID)}


def _is(made: Sample, reference: Sample, extractor: Extractor) -> Values:
    assert made.rows is not None
    if extractor.logits is None:
        raise UserError(
            f"{extractor.name} knows no classes, which the score is of", "--protocol edm"
        )
    logits = [extractor.logits(part.to(extractor.device)).cpu() for part in made.rows.split(4096)]
    return {"is": inception_score(torch.cat(logits), **IS)}


def _pr(made: Sample, reference: Sample, extractor: Extractor) -> Values:
    assert made.rows is not None
    assert reference.rows is not None
    there = extractor.device
    found = precision_recall(reference.rows.to(there), made.rows.to(there), **PR)
    return {name: Estimate(value, math.nan) for name, value in found._asdict().items()}


def _all(made: Sample, reference: Sample, extractor: Extractor) -> Values:
    found: Values = {}
    for metric in (_fid, _kid, _is, _pr):
        found |= metric(made, reference, extractor)
    return found


GAUSSIAN, ROWS, BOTH = Needs(gaussian=True), Needs(rows=True), Needs(True, True)
METRICS = {
    "all": Metric(BOTH, BOTH, _all, {"kid": KID, "is": IS, "pr": PR}),
    "fid": Metric(GAUSSIAN, GAUSSIAN, _fid, {}),
    "is": Metric(ROWS, Needs(), _is, IS),
    "kid": Metric(ROWS, ROWS, _kid, KID),
    "pr": Metric(ROWS, ROWS, _pr, PR),
}


def measured(
    metric: str, made: Sample, reference: Sample, setting: Setting, turn: int = 0
) -> Values:
    """Return the values of a metric, which the leading process computes."""
    compute = partial(METRICS[metric].values, made, reference, setting.extractor)
    return setting.group.agreed(compute, f"measured {turn}")


def consistency(
    model: Model, teacher: Model, seeds: range, levels: int, substeps: int, device: str
) -> list[dict[str, float]]:
    """Return the deviations of a consistency model from its teacher's paths, by noise level.

    The paths start from the seeds' noise; between two of the levels the teacher takes `substeps`
    Heun steps. Raises UserError for models of different images or classes, InputError for one that
    makes values that are not finite.
    """
    ours, theirs = model.preset.model, teacher.preset.model
    for what in ("image_size", "channels", "num_classes"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if a != b:
            raise UserError(
                f"the model has {what} {a}, the teacher {b}", "give the teacher it was made from"
            )
    low, high = model.noise_range, teacher.noise_range
    grid = sampling_levels(
        levels * substeps + 1,
        low._replace(sigma_max=min(low.sigma_max, high.sigma_max)),
    )
    seeded = SeededNoise(seeds)
    count = ours.num_classes
    labels = seeded.labels(count).to(device) if count else None
    noise = seeded(torch.zeros(len(seeds), ours.channels, *ours.image_size, device=device))
    guide = steady(teacher.f, theirs.image_size, device)
    points = list(itertools.islice(paths(guide, noise, grid, heun, labels), 0, None, substeps))
    f = steady(model.f, ours.image_size, device)
    rows = deviations(f, guide, points, labels)
    if not all(map(math.isfinite, itertools.chain(*rows))):
        raise InputError(
            "the model or the teacher makes values that are not finite",
            "it diverged: take an earlier one",
        )
    return [row._asdict() for row in rows]
