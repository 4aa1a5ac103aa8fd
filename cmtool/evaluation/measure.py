"""From images, or a model, to a metric: open_set, then collect or extract, then METRICS."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool import __version__
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import seeded_labels
from cmtool.data.datasets import DATASETS, Dataset
from cmtool.data.images import to_uint8
from cmtool.errors import UserError, nearest
from cmtool.evaluation import cross_check
from cmtool.evaluation.features import PROTOCOLS, build_extractor
from cmtool.evaluation.metrics import GAUSSIAN, METRICS, Features, Metric, Needs, Values
from cmtool.evaluation.own import Own
from cmtool.evaluation.request import ModelImages, Request, Source, facts_of, with_reference
from cmtool.evaluation.sets import (
    Given,
    Opened,
    Setup,
    Statistics,
    collect,
    extract,
    open_set,
    save_features,
)
from cmtool.evaluation.shares import shares_of
from cmtool.presets.schema import Card
from cmtool.sampling import OnDrawn, Plan, generate
from cmtool.system.dist import ALONE, Group

PUBLISHED_NUM = 50_000  # images that published numbers are of; a number of fewer is a proxy


class Result(NamedTuple):
    """A measurement: its JSON object, and what to tell the user about it, by line."""

    content: dict[str, Any]
    notes: list[str]


def evaluate(
    images: Given,
    metric: str = "fid",
    reference: Given = "digits",
    *,
    protocol: str | None = None,
    num: int | None = None,
    reference_num: int | None = None,
    cross_check: bool = False,
    feature_weights: str | Path | None = None,
    features: str | Path | None = None,
    features_input: str = "",
    trust: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return a metric of images against a reference, as the JSON object of `cmtool eval`.

    Images and reference: a tensor (N, C, H, W), uint8 or in [-1, 1]; a name or path; a list of
    image files. `features` is a TorchScript file of your own, which makes the features of images
    as `features_input` says, for example "224,imagenet"; it is code, and runs if you `trust` it.
    The number is under "value". Raises UserError, InputError or MissingError.
    """
    request = Request(
        images=images, metric=metric, reference=reference, protocol=protocol, num=num,
        reference_num=reference_num, cross_check=cross_check, trust=trust, device=device,
        feature_weights=None if feature_weights is None else Path(feature_weights),
        features=None if features is None else Path(features), features_input=features_input,
    )  # fmt: skip
    return measure(request).content


def measure(request: Request) -> Result:
    """Return the JSON object of a measurement, and notes about it.

    Every process of the group calls this. Raises UserError, InputError or MissingError.
    """
    if request.metric not in METRICS:
        raise UserError(f"metric {request.metric!r}", nearest(request.metric, METRICS))
    row = METRICS[request.metric]
    if request.reference is None:
        request = with_reference(request)
    assert request.reference is not None
    compared = open_set(request.reference) if any(row.reference) else None
    setup = build_setup(request, compared)
    given = request.images() if callable(request.images) else request.images
    if isinstance(given, ModelImages) and request.classes == "reference":
        given = given._replace(shares=shares_of(request.reference, given.model.preset))
    images = given if isinstance(given, ModelImages) else open_set(given)
    request.group.alike(lambda: facts_of(request, setup, images, compared), "request")
    if request.cross_check and isinstance(images, Statistics):
        what = f"--cross-check needs images, and {images.name} holds statistics"
        raise UserError(what, "give the images, or leave --cross-check out")
    reference = _reference(compared, row.reference, setup, request)
    made: list[Features] = []
    found: list[Values] = []
    for turn in range(request.runs):
        setup = setup._replace(turn=str(turn))
        made.append(_images(images, row.images, setup, request.num, turn))
        compute = partial(row.compute, made[-1], reference, setup.extractor)
        found.append(request.group.agreed(compute, f"measured {turn}"))
    result = _describe(request.metric, setup, made, reference, found)
    for side in (images, compared):
        result.notes.extend(f"note: {n}" for n in (side.notes if isinstance(side, Dataset) else ()))
    if request.cross_check:
        checked = _cross_check(images, compared, setup, request, result.content["value"])
        result.content["cross_check"] = checked
        used = f"features of mode {checked['mode']}, {checked['distance']} distance"
        result.notes.append(f"{checked['tool']}: {checked['value']:.4f} ({used})")
    return result


def save_reference(path: Path, request: Request, *, keep_features: bool) -> int:
    """Write statistics of images, or the single features too; return the number of images."""
    assert not callable(request.images)
    images = open_set(request.images)
    setup = build_setup(request, images)
    found = collect(images, Needs(True, keep_features), setup, num=request.num)
    if request.group.leads:
        save_features(path, found, setup)
    return found.num


def build_setup(request: Request, reference: Opened | None) -> Setup:
    """Return how images become features: as the user says, else as is usual for the reference."""
    if isinstance(reference, Statistics):
        usual = str(reference.about.get("protocol", "edm"))
    else:
        known = "" if reference is None else reference.name.partition(":")[0]
        usual = known if known in DATASETS else "edm"
    protocol = request.protocol or usual
    if request.features is not None and request.protocol is None:
        protocol = "own"
    row = PROTOCOLS.get(protocol)
    if row is not None and row.metric not in (None, request.metric):
        hint = f"it is for {row.metric}; take --protocol edm"
        raise UserError(f"{request.metric} of --protocol {protocol}", hint)
    if row is not None and request.cross_check:
        cross_check.check_usage(request.metric, protocol, request.runs)
    own = _own(request, reference)
    extractor = build_extractor(
        protocol, file=request.feature_weights, trust=request.trust and own is None,
        precision=request.feature_precision, device=request.device, own=own,
    )  # fmt: skip
    batch, workers = request.batch, request.workers
    return Setup(protocol, extractor, batch, workers, request.group, request.progress)


def _own(request: Request, reference: Opened | None) -> Own | None:
    """Return the feature network of the user's own that is asked for, if one is."""
    if request.features is None:
        if request.features_input:
            what = f"--features-input {request.features_input} without --features"
            raise UserError(what, "name the network: --features FILE.pt")
        return None
    if request.feature_weights is not None:
        raise UserError("--features and --feature-weights", "give one of them")
    _, _, *size = reference.images.shape if isinstance(reference, Dataset) else (0, 0)
    return Own(request.features, request.features_input, request.trust, size=tuple(size))


def drawn_batches(
    f: Preconditioned,
    preset: Card,
    chosen: Plan,
    seeds: range,
    *,
    batch: int,
    device: str,
    group: Group = ALONE,
    on_drawn: OnDrawn | None = None,
    shares: Sequence[float] | None = None,
) -> Iterator[Tensor]:
    """Yield this process's images of some seeds, as they would be written, uint8.

    Classes are equally likely, or as likely as their `shares`. `on_drawn` is told of the progress
    of this process. Every process calls the network equally often, as a sharded network needs;
    images of seeds beyond the last are left out. Raises InputError for values that are not finite.
    """
    size = group.world_size
    share = -(-len(seeds) // size)
    mine = range(seeds[0] + group.rank, seeds[0] + share * size, size)
    labels = None if shares is None else seeded_labels(mine, preset.model.num_classes, shares)
    drawn = generate(
        f, preset, chosen, mine, labels=labels, batch=batch, device=device, on_drawn=on_drawn
    )
    for first, images in zip(itertools.count(0, batch), drawn, strict=False):
        wanted = sum(seed in seeds for seed in mine[first : first + batch])
        if wanted:
            yield to_uint8(images[:wanted])


def _reference(compared: Opened | None, needs: Needs, setup: Setup, request: Request) -> Features:
    if compared is None:
        return Features()
    return collect(compared, needs, setup, num=request.reference_num, side="reference")


def _images(images: Source, needs: Needs, setup: Setup, num: int | None, turn: int) -> Features:
    """Return the features of the images, and in `about` what the JSON object says of them."""
    if not isinstance(images, ModelImages):
        found = collect(images, needs, setup, num=num)
        return found._replace(about={"images": found.about})
    model, chosen, first = images.model, images.plan, images.first_seed + turn * images.num
    seeds = range(first, first + images.num)
    draw = partial(drawn_batches, batch=setup.batch, device=setup.extractor.device)
    told = None if setup.progress is None else partial(setup.progress, "drawn")
    drawn = draw(
        model.f, model.preset, chosen, seeds, group=setup.group, on_drawn=told, shares=images.shares
    )
    found = extract(drawn, needs, setup._replace(progress=None), "drawn")
    about = {
        "model": {
            "source": model.source, "sha256": model.sha256, "weights": model.weights,
            "kind": model.kind, "precision": chosen.precision,
        },
        "sampler": chosen.sampler.name,
        "sigmas": chosen.sigmas,
        "guidance": chosen.guidance,
        "evaluations": chosen.evaluations,
        "classes": _classes(images),
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "fingerprint": found.fingerprint,
    }  # fmt: skip
    return found._replace(about=about)


def _classes(images: ModelImages) -> str | None:
    """Return how the classes of a model's images were drawn; None if it has none."""
    if not images.model.preset.model.num_classes:
        return None
    shares = images.shares and ", as often as in the reference"
    return f"drawn from the seeds{shares or ''}"


def _cross_check(
    images: Source, compared: Opened | None, setup: Setup, request: Request, value: float
) -> dict[str, Any]:
    """Return what clean-fid finds for the same images. Statistics in a file stay as they are."""
    extractor = cross_check.clean_fid_extractor(setup.extractor)
    theirs = setup._replace(extractor=extractor, turn="cross-check")
    made = _images(images, GAUSSIAN, theirs, request.num, 0).gaussian
    reference = _reference(compared, GAUSSIAN, theirs, request).gaussian
    assert made is not None
    assert reference is not None
    compute = partial(cross_check.compare, setup.extractor, value, made, reference)
    return request.group.agreed(compute, "cross-checked")


def _describe(
    metric: str, setup: Setup, made: list[Features], reference: Features, found: list[Values]
) -> Result:
    """Return the result of one run or several, of which `made` and `found` have an item each."""
    row, extractor, num = METRICS[metric], setup.extractor, made[-1].num
    few = min((count for count in (num, reference.num) if count), default=extractor.width + 1)
    content = {
        "metric": row.names.get(setup.protocol, metric),
        **_numbers(row, found),
        "protocol": setup.protocol,
        "num_images": num or None,
        "proxy": num < PUBLISHED_NUM if num else None,
        **_joined(made),
        "reference": dict(reference.about) or None,
        "features": extractor.facts,
        "settings": _used(row.settings, num, few),
        "cmtool": __version__,
        "torch": torch.__version__,
        **({"rank_deficient": few <= extractor.width} if "fid" in row.values else {}),
    }
    return Result(content, _notes(row, content, setup, num, few))


def _used(settings: Mapping[str, Any], num: int, few: int) -> dict[str, Any]:
    """Return the settings as they were used: no subset or split is larger than the set it is of."""
    most = {"size": few, "split": num}
    return {
        key: _used(value, num, few) if isinstance(value, Mapping)
        else min(value, most.get(key, value))
        for key, value in settings.items()
    }  # fmt: skip


def _numbers(row: Metric, found: list[Values]) -> dict[str, Any]:
    """Return the value; of one run with its standard error, of several with their spread."""
    names = [name for name in row.values if name in found[0]]
    runs = [{name: each[name].value for name in names} for each in found]
    if len(runs) == 1:
        errors = {name: found[0][name].error for name in names}
        shown = {name: None if math.isnan(error) else error for name, error in errors.items()}
        known = not all(map(math.isnan, errors.values()))
        return {"value": _plain(runs[0])} | ({"standard_error": _plain(shown)} if known else {})
    columns = {name: [run[name] for run in runs] for name in names}
    mean = _plain({name: statistics.fmean(column) for name, column in columns.items()})
    spread = _plain({name: statistics.stdev(column) for name, column in columns.items()})
    least = row.lowest_is_best
    return {
        "value": min(columns[row.values[0]]) if least else mean,
        "value_is": f"{'minimum' if least else 'mean'} of {len(runs)} runs",
        **({"mean": mean} if len(columns) == 1 else {}),
        "spread": spread,
        "runs": [_plain(run) for run in runs],
    }


def _plain(numbers: dict[str, Any]) -> Any:
    return numbers if len(numbers) > 1 else next(iter(numbers.values()))


def _joined(made: list[Features]) -> Mapping[str, Any]:
    """Return what to say of the images; the runs of a model differ in seeds and images."""
    if len(made) == 1:
        return made[0].about
    first, last = (made[i].about["seeds"].split("-") for i in (0, -1))
    marks = ",".join(each.fingerprint for each in made)
    return {**made[0].about, "seeds": f"{first[0]}-{last[1]}", "fingerprint": marks}


def _notes(row: Metric, content: dict[str, Any], setup: Setup, num: int, few: int) -> list[str]:
    """Return the value as a line, and what makes it less than a published number."""
    value, extractor = content["value"], setup.extractor
    numbers = value if isinstance(value, dict) else {content["metric"]: value}
    shown = ", ".join(f"{name} {number:.4f}" for name, number in numbers.items())
    notes = [f"note: {note}" for note in extractor.notes]
    notes.append(f"{shown} ({num} images)" if num else shown)
    if content.get("rank_deficient"):
        few_images = f"note: {few} images are no more than the {extractor.width} features"
        why = "the covariance is singular, and the distance is mostly that of few images"
        notes.append(f"{few_images}: {why}")
    if content["proxy"] and setup.protocol not in DATASETS:
        notes.append("note: published numbers are of 50,000 images; of fewer they are a proxy")
    asked, used = (each.get("kid", each) for each in (row.settings, content["settings"]))
    if asked.get("size") != used.get("size"):
        notes.append(f"note: the subsets of KID have {few:,} images, not {asked['size']:,}")
    split = row.settings.get("is", row.settings).get("split", num)
    if num > split and num % split:
        notes.append(f"note: the last split of the score has {num % split} images, not {split:,}")
    ours = extractor.precision
    theirs = (content["reference"] or {}).get("precision", ours)
    if theirs != ours:
        notes.append(f"note: the reference was made in {theirs}, these features in {ours}")
    return notes
