"""From images, or a model, to the numbers of a metric and all that they depend on.

Three steps: `open_set` finds images or statistics, `collect` or `extract` takes their features, a
row of METRICS compares them. Evaluation while training and the search for levels do the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import DATASETS, Dataset
from cmtool.data.images import to_uint8
from cmtool.errors import UserError, nearest
from cmtool.evaluation import cross_check
from cmtool.evaluation.metrics import GAUSSIAN, METRICS, Features, Needs, Values
from cmtool.evaluation.protocols import PROTOCOLS, build_extractor
from cmtool.evaluation.references import Statistics
from cmtool.evaluation.results import Result, describe
from cmtool.evaluation.sets import (
    OnProgress,
    Setup,
    collect,
    extract,
    no_progress,
    open_set,
    save_features,
)
from cmtool.models import Model
from cmtool.presets.schema import Card
from cmtool.sampling import Plan, generate
from cmtool.system.dist import ALONE, Group

Given = Tensor | str | Path | Sequence[str | Path]
"""Images (N, C, H, W), uint8 or in [-1, 1]; a name or path; or paths of image files."""


@dataclass(frozen=True)
class ModelImages:
    """The images that a model draws from `num` seeds, the first of them `first_seed`.

    A second run takes the next `num` seeds.
    """

    model: Model
    plan: Plan
    num: int
    first_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, against what, and how.

    `images` may be a function, which is called after the weights of the feature network are found.
    `protocol` None is the usual one for the reference. `num` and `reference_num` None are all.
    """

    images: Given | Callable[[], Given | ModelImages]
    metric: str = "fid"
    reference: Given = "digits"
    protocol: str | None = None
    num: int | None = None
    reference_num: int | None = None
    runs: int = 1
    cross_check: bool = False
    feature_weights: Path | None = None
    trust: bool = False
    feature_precision: str = "fp32"
    batch: int = 256
    workers: int = 0
    device: str = "cpu"
    group: Group = ALONE
    progress: OnProgress = no_progress


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
    trust: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return a metric of images against a reference, as the JSON object of `cmtool eval`.

    Images and reference: a tensor (N, C, H, W), uint8 or in [-1, 1]; a name or path; a list of
    image files. The number is under "value". Raises UserError, InputError or MissingError.
    """
    request = Request(
        images=images, metric=metric, reference=reference, protocol=protocol, num=num,
        reference_num=reference_num, cross_check=cross_check, trust=trust, device=device,
        feature_weights=None if feature_weights is None else Path(feature_weights),
    )  # fmt: skip
    return measure(request).content


def measure(request: Request) -> Result:
    """Return the JSON object of a measurement, and notes about it.

    Every process of the group calls this. Raises UserError, InputError or MissingError.
    """
    if request.metric not in METRICS:
        raise UserError(f"metric {request.metric!r}", nearest(request.metric, METRICS))
    row = METRICS[request.metric]
    compared = open_set(request.reference) if row.has_reference else None
    setup = build_setup(request, request.protocol or usual_protocol(compared))
    given = request.images() if callable(request.images) else request.images
    images = given if isinstance(given, ModelImages) else open_set(given)
    if request.cross_check and isinstance(images, Statistics):
        raise UserError(f"--cross-check of {images.name}, which holds statistics", "give images")
    reference = _reference(compared, row.reference, setup, request)
    made: list[Features] = []
    found: list[Values] = []
    for turn in range(request.runs):
        setup = setup._replace(turn=str(turn))
        made.append(_images(images, row.images, setup, request.num, turn))
        compute = partial(row.compute, made[-1], reference, setup.extractor)
        found.append(request.group.agreed(compute, f"measured {turn}"))
    result = describe(request.metric, setup, made, reference, found)
    if request.cross_check:
        checked = _cross_check(images, compared, setup, request, result.content["value"])
        result.content["cross_check"] = checked
        result.notes.append(
            f"{checked['tool']}: {checked['value']:.4f} (features of mode {checked['mode']},"
            f" {checked['distance']} distance)"
        )
    return result


def save_reference(path: Path, request: Request, *, keep_features: bool) -> int:
    """Write statistics of the images as a reference, and return how many images there are.

    `keep_features` keeps the single features too. Raises UserError, InputError or MissingError.
    """
    assert not callable(request.images)
    images = open_set(request.images)
    setup = build_setup(request, request.protocol or usual_protocol(images))
    found = collect(images, Needs(True, keep_features), setup, num=request.num)
    if request.group.leads:
        save_features(path, found, setup)
    return found.num


def build_setup(request: Request, protocol: str) -> Setup:
    """Return how images become features. Raises UserError for a protocol that does not fit."""
    row = PROTOCOLS.get(protocol)
    if row is not None and row.metric not in (None, request.metric):
        raise UserError(
            f"{request.metric} of --protocol {protocol}",
            f"it is for {row.metric}; take --protocol edm",
        )
    if row is not None and request.cross_check:
        cross_check.check_usage(request.metric, protocol, request.runs)
    extractor = build_extractor(
        protocol, file=request.feature_weights, trust=request.trust,
        precision=request.feature_precision, device=request.device,
    )  # fmt: skip
    return Setup(
        protocol, extractor, request.batch, request.workers, request.group, request.progress
    )


def usual_protocol(reference: Dataset | Statistics | None) -> str:
    """Return the protocol if the user names none: by the reference, which may say it itself."""
    if isinstance(reference, Statistics):
        return str(reference.about.get("protocol", "edm"))
    is_bundled = reference is not None and reference.name.partition(":")[0] in DATASETS
    return "digits" if is_bundled else "edm"


def drawn_batches(
    f: Preconditioned,
    preset: Card,
    chosen: Plan,
    seeds: range,
    *,
    batch: int,
    device: str,
    group: Group = ALONE,
) -> Iterator[Tensor]:
    """Yield this process's images of some seeds, as they would be written, uint8.

    Every process calls the network equally often, as a sharded network needs; images of seeds
    beyond the last are left out. Raises InputError for values that are not finite.
    """
    size = group.world_size
    share = -(-len(seeds) // size)
    mine = range(seeds[0] + group.rank, seeds[0] + share * size, size)
    drawn = generate(f, preset, chosen, mine, batch=batch, device=device)
    for first, images in zip(itertools.count(0, batch), drawn, strict=False):
        wanted = sum(seed in seeds for seed in mine[first : first + batch])
        if wanted:
            yield to_uint8(images[:wanted])


def _reference(
    compared: Dataset | Statistics | None, needs: Needs, setup: Setup, request: Request
) -> Features:
    if compared is None:
        return Features()
    return collect(compared, needs, setup, num=request.reference_num, side="reference")


def _images(
    images: Dataset | Statistics | ModelImages,
    needs: Needs,
    setup: Setup,
    num: int | None,
    turn: int,
) -> Features:
    """Return the features of the images, and in `about` what the JSON object says of them."""
    if not isinstance(images, ModelImages):
        found = collect(images, needs, setup, num=num)
        return found._replace(about={"images": found.about})
    model, chosen, first = images.model, images.plan, images.first_seed + turn * images.num
    seeds = range(first, first + images.num)
    drawn = drawn_batches(
        model.f, model.preset, chosen, seeds, batch=setup.batch, device=setup.extractor.device,
        group=setup.group,
    )  # fmt: skip
    found = extract(drawn, needs, setup, "drawn", images.num)
    about = {
        "model": {
            "source": model.source, "sha256": model.sha256, "weights": model.weights,
            "kind": model.kind, "precision": chosen.precision,
        },
        "sampler": chosen.sampler.name,
        "sigmas": chosen.sigmas,
        "evaluations": chosen.evaluations,
        "classes": "drawn from the seeds" if model.preset.model.num_classes else None,
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "fingerprint": found.fingerprint,
    }  # fmt: skip
    return found._replace(about=about)


def _cross_check(
    images: Dataset | Statistics | ModelImages,
    compared: Dataset | Statistics | None,
    setup: Setup,
    request: Request,
    value: float,
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
