"""Metrics of two sets, and METRICS: its rows make commands, scores in training and of searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import InputError, UserError
from cmtool.evaluation.gaussian import Gaussian, frechet_distance

if TYPE_CHECKING:
    from cmtool.evaluation.extractor import Extractor

KID = {"subsets": 100, "size": 1000, "seed": 0}
INCEPTION_SCORE = {"split": 5000}
PRECISION_RECALL = {"k": 3}


class Features(NamedTuple):
    """What is kept of the features of a set: their Gaussian, or each of them.

    `rows` (N, D) are in an order that only they decide. `num` is 0 where a file does not say it.
    `fingerprint` is a hash of the images in any order, `about` what the JSON object says of them.
    """

    gaussian: Gaussian | None = None
    rows: Tensor | None = None
    num: int = 0
    fingerprint: str = ""
    about: Mapping[str, Any] = {}


class Needs(NamedTuple):
    """What a metric needs of a set: the Gaussian of its features, or the single features."""

    gaussian: bool = False
    rows: bool = False


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """Return the KID of features a (N, D) and b (M, D), unbiased (Binkowski et al. 2018).

    The mean over random subsets of `size` of the squared MMD with the kernel (x^T y / D + 1)^3.
    Its error is over the subsets: there is none where each is all of both sets. Raises InputError
    for fewer than 2 images, and for features that are not finite.
    """
    _check_features(a, b)
    m = min(len(a), len(b), size)
    draw = np.random.RandomState(seed).choice
    values = []
    for _ in range(subsets):
        y = b[torch.from_numpy(draw(len(b), m, replace=False))].double()
        x = a[torch.from_numpy(draw(len(a), m, replace=False))].double()
        within = _cubic(x, x) + _cubic(y, y)
        own = (within.sum() - within.trace()) / (m * (m - 1))
        values.append(float(own - 2 * _cubic(x, y).mean()))
    return _mean(values, has_error=m < max(len(a), len(b)))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, *, split: int = 5000) -> Estimate:
    """Return exp(E KL(p(y|x) | p(y))) of class logits (N, K) (Salimans et al. 2016).

    The mean over splits of `split` images, in order; its error is over the splits. Raises
    InputError for logits that are not finite.
    """
    _check_finite(logits)
    scores = []
    for part in logits.double().split(split):
        p = part.softmax(1)
        entropies = torch.special.entr(p).sum(1)  # 0 of what is 0
        scores.append(float((torch.special.entr(p.mean(0)).sum() - entropies.mean()).exp()))
    return _mean(scores)


def _mean(values: list[float], has_error: bool = True) -> Estimate:
    """Return the mean and its standard error, NaN for one value."""
    spread = torch.tensor(values, dtype=torch.float64)
    has_error &= len(values) > 1
    error = float(spread.std()) / math.sqrt(len(values)) if has_error else math.nan
    return Estimate(float(spread.mean()), error)


class PrecisionRecall(NamedTuple):
    """Fractions of images that lie where the other set is dense."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor, made: Tensor, *, k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Return precision and recall of features real (N, D) and made (M, D).

    Kynkaanniemi et al. (2019): an image is covered by a set when it lies within the distance of
    one of its members to that member's k-th nearest neighbour. Distances are taken in float64,
    `chunk` rows and columns at a time. Raises InputError for k images or fewer, and for features
    that are not finite.
    """
    _check_features(real, made, least=k + 1)
    reals, mades = _radii(real, k, chunk), _radii(made, k, chunk)
    return PrecisionRecall(_covered(made, real, reals, chunk), _covered(real, made, mades, chunk))


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Return each row's squared distance to its k-th nearest other row, (N,)."""
    found = []
    for part in features.split(chunk):
        nearest = torch.empty(len(part), 0, dtype=torch.float64, device=part.device)
        for others in features.split(chunk):
            nearest = torch.cat([nearest, _squared(part, others)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        found.append(nearest.amax(1))
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Return the fraction of points within the radius of any centre."""
    hits = 0
    for part in points.split(chunk):
        covered = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for others, radius in zip(centres.split(chunk), radii.split(chunk), strict=True):
            covered |= (_squared(part, others) <= radius).any(1)
        hits += int(covered.sum())
    return hits / len(points)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N, M); 0 where rounding is all there is, as between equal rows."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = norms - 2 * a @ b.T
    return torch.where(squared < 1e-12 * norms, 0.0, squared)


def _check_features(a: Tensor, b: Tensor, least: int = 2) -> None:
    """Raise InputError for sets that are too small, of different features, or not finite."""
    if a.shape[1] != b.shape[1]:
        what = f"{a.shape[1]} and {b.shape[1]} features an image"
        raise InputError(what, "use one feature network")
    few = min(len(a), len(b))
    if few < least:
        what = f"{few} image{'s' * (few != 1)} to evaluate"
        raise InputError(what, f"give {least} or more on each side")
    _check_finite(a)
    _check_finite(b)


def _check_finite(features: Tensor) -> None:
    """Raise InputError for NaN, or infinity."""
    if not bool(torch.isfinite(features).all()):
        hint = "look for a damaged weight file, or statistics"
        raise InputError("the features are not finite", hint)


Values = dict[str, Estimate]


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: a function of two sets, what it needs of them, and how it is shown.

    `compute` gets the features of the images, those of the reference, and the feature network; it
    returns the numbers that `values` names, or those that there are. `names` holds other names of
    the metric by protocol. The best of several runs is the least value, if `lowest_is_best`.
    """

    compute: Callable[[Features, Features, Extractor], Values]
    values: tuple[str, ...]
    images: Needs
    reference: Needs
    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    lowest_is_best: bool = False


def fid(images: Features, reference: Features, extractor: Extractor) -> Values:
    """Return the Frechet distance of two Gaussians."""
    assert images.gaussian is not None
    assert reference.gaussian is not None
    return {"fid": Estimate(frechet_distance(images.gaussian, reference.gaussian), math.nan)}


def kid(images: Features, reference: Features, extractor: Extractor) -> Values:
    """Return the kernel distance of single features."""
    real, made = _rows(reference, images, extractor)
    return {"kid": kernel_distance(real, made, **KID)}


def inception(images: Features, reference: Features, extractor: Extractor) -> Values:
    """Return the inception score. Raises UserError for a feature network without classes."""
    assert images.rows is not None
    if extractor.logits is None:
        raise UserError(f"{extractor.name} has no classes, which the score needs", "--protocol edm")
    parts = images.rows.split(4096)
    logits = [extractor.logits(part.to(extractor.device)).cpu() for part in parts]
    return {"is": inception_score(torch.cat(logits), **INCEPTION_SCORE)}


def precision_and_recall(images: Features, reference: Features, extractor: Extractor) -> Values:
    """Return precision and recall of single features."""
    real, made = _rows(reference, images, extractor)
    found = precision_recall(real, made, **PRECISION_RECALL)
    return {name: Estimate(value, math.nan) for name, value in found._asdict().items()}


def all_metrics(images: Features, reference: Features, extractor: Extractor) -> Values:
    """Return the numbers of the four metrics; of three for a feature network without classes."""
    scored = (inception,) if extractor.logits is not None else ()
    computes = (fid, kid, *scored, precision_and_recall)
    return {k: v for each in computes for k, v in each(images, reference, extractor).items()}


def _rows(real: Features, made: Features, extractor: Extractor) -> tuple[Tensor, Tensor]:
    """Return the single features of both, on the device."""
    assert real.rows is not None
    assert made.rows is not None
    return real.rows.to(extractor.device), made.rows.to(extractor.device)


NOTHING, GAUSSIAN, ROWS, BOTH = Needs(), Needs(gaussian=True), Needs(rows=True), Needs(True, True)

METRICS: dict[str, Metric] = {
    "fid": Metric(
        fid, ("fid",), GAUSSIAN, GAUSSIAN, lowest_is_best=True,
        names={
            "clip": "fd-clip", "digits": "fd-digits", "dinov2": "fd-dinov2",
            "emoji": "fd-emoji", "own": "fd-own", "pixels": "fd-pixels",
        },
        help="""Print the Frechet distance between images and a reference, as one JSON object.

        `cmtool eval fid -c digits-cd`

        `cmtool eval fid samples.zip --reference cifar10.npz`

        `cmtool eval fid -c runs/mine --num 50000 --runs 3 --reference cifar-10-python.tar.gz`

        `cmtool sample --seeds 0-2047 | cmtool eval fid -`

        `cmtool eval fid samples.zip --reference cifar10.zip --protocol clean --cross-check`

        `cmtool eval fid samples.zip --reference img64.pkl --protocol dinov2`

        `cmtool eval fid samples.zip --reference faces/ --features net.pt --trust`

        Against the bundled digits the features are those of the bundled classifier: the number is
        fd-digits, not the FID of papers. A FID falls with the number of images: compare equal
        numbers only. --protocol pixels needs no weights: fd-pixels compares the images at 8x8, so
        it sees colours and coarse shapes, and nothing finer. --protocol dinov2 is FD-DINOv2, as
        EDM2 reports it; clip is FD-CLIP. --features names a network of your own: images in,
        features out. It is code, and runs only with --trust. With --cross-check the JSON object
        also has the number of clean-fid.""",
    ),
    "kid": Metric(
        kid, ("kid",), ROWS, ROWS, settings=KID, lowest_is_best=True,
        help="""Print the kernel distance (KID), which does not depend on the number of images.

        `cmtool eval kid samples/ --reference cifar10.zip`

        It is the mean over 100 seeded subsets of 1,000 images, with its standard error.""",
    ),
    "is": Metric(
        inception, ("is",), ROWS, NOTHING, settings=INCEPTION_SCORE,
        help="""Print the inception score, in splits of 5,000; no reference is needed.

        `cmtool eval is samples.npz`

        `cmtool eval is -c digits-cd --protocol digits`""",
    ),
    "pr": Metric(
        precision_and_recall, ("precision", "recall"), ROWS, ROWS, settings=PRECISION_RECALL,
        help="""Print precision and recall (k = 3) of images against a reference.

        `cmtool eval pr samples.npz --reference VIRTUAL_imagenet64_labeled.npz --protocol adm`

        The features are Inception's, as in the paper's evaluator, or VGG-16's (--protocol vgg16),
        as in ECT and StyleGAN. Numbers of the two cannot be compared.""",
    ),
    "all": Metric(
        all_metrics, ("fid", "kid", "is", "precision", "recall"), BOTH, BOTH,
        settings={"kid": KID, "is": INCEPTION_SCORE, "pr": PRECISION_RECALL},
        help="""Print FID, KID, inception score, precision and recall, from features taken once.

        `cmtool eval all samples.zip --reference cifar10.zip`

        `torchrun --nproc-per-node 8 -m cmtool eval all -c cd.pt --num-images 50000`""",
    ),
}  # fmt: skip
