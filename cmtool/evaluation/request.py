"""What is to be measured, against what, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cmtool.evaluation.sets import Given, OnProgress, Opened, Setup, Statistics
from cmtool.models import Model
from cmtool.sampling import Plan
from cmtool.system.dist import ALONE, Group


class ModelImages(NamedTuple):
    """The images that a model draws from `num` seeds; another run takes the next `num` seeds.

    Classes are equally likely, or as likely as their `shares`.
    """

    model: Model
    plan: Plan
    num: int
    first_seed: int = 0
    shares: tuple[float, ...] | None = None


Source = Opened | ModelImages
CLASSES = ("uniform", "reference")
"""How often a model draws each class: equally often, or as often as the reference has it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, against what, and how.

    `images` may be a function, which is called after the weights of the feature network are found.
    `reference` None is the bundled data that the model was trained on, else the digits: then the
    function is called first.
    `classes` says how often a model draws each class: a name of CLASSES.
    `protocol` None is the usual one for the reference. `num` and `reference_num` None are all.
    `features` is a feature network of the user's own, and `features_input` what it takes.
    """

    images: Given | Callable[[], Given | ModelImages]
    metric: str = "fid"
    reference: Given | None = "digits"
    protocol: str | None = None
    classes: str = "uniform"
    num: int | None = None
    reference_num: int | None = None
    runs: int = 1
    cross_check: bool = False
    feature_weights: Path | None = None
    features: Path | None = None
    features_input: str = ""
    trust: bool = False
    feature_precision: str = "fp32"
    batch: int = 256
    workers: int = 0
    device: str = "cpu"
    group: Group = ALONE
    progress: OnProgress | None = None


def with_reference(request: Request) -> Request:
    """Return a request that names its reference: what its model was trained on, else the digits."""
    given = request.images() if callable(request.images) else request.images
    if isinstance(given, ModelImages):
        return replace(request, reference=given.model.bundled_data, images=lambda: given)
    return replace(request, reference="digits", images=given)


def facts_of(
    request: Request, setup: Setup, images: Source, reference: Opened | None
) -> dict[str, Any]:
    """Return what must be the same in all processes of a measurement."""
    same = ("metric", "num", "reference_num", "runs", "cross_check", "feature_precision", "batch")
    about: dict[str, Any] = {"images": None if isinstance(images, ModelImages) else _mark(images)}
    if isinstance(images, ModelImages):
        model, chosen = images.model, images.plan
        about = {
            "model": model.sha256, "kind": model.kind, "sigmas": list(chosen.sigmas),
            "sampler": chosen.sampler.model_dump(mode="json"), "precision": chosen.precision,
            "--guidance": chosen.guidance,
            "images": [images.num, images.first_seed], "classes": list(images.shares or ()),
        }  # fmt: skip
    options = {f"--{key.replace('_', '-')}": getattr(request, key) for key in same}
    chosen_features = {"--protocol": setup.protocol, "features": setup.extractor.facts}
    return {**options, **chosen_features, "--reference": _mark(reference), **about}


def _mark(opened: Opened | None) -> list[Any] | None:
    """Return what tells a set, or statistics, from another at no cost."""
    if opened is None:
        return None
    if isinstance(opened, Statistics):
        found = opened.gaussian
        return [found.num, float(found.mean.sum())] if found else []
    return [len(opened), opened.known_hash]
