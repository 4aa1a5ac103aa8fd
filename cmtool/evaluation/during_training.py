"""Scores: one number of a model's images, for evaluation in training and the search for levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import Dataset
from cmtool.errors import UserError
from cmtool.evaluation.features import PROTOCOLS, build_extractor
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.metrics import METRICS, Features
from cmtool.evaluation.sets import OnProgress, Setup, collect, extract
from cmtool.presets.build import pick
from cmtool.presets.schema import Choice, Preset
from cmtool.sampling import OnDrawn, evaluating, plan
from cmtool.system.dist import ALONE, Group

BATCH = 256
Score = Callable[..., float]
"""From (batches of a process's images, uint8, group, a new turn) to a number: less is better."""


class Verdict(NamedTuple):
    """What an evaluation found: the value of a metric over `num` images, at a step."""

    metric: str
    value: float
    num: int
    step: int


class Evaluation(NamedTuple):
    """How a run is evaluated: the name of a score, the score, and the images it takes."""

    name: str
    score: Score
    num: int


def score_names() -> dict[str, tuple[str, str]]:
    """Return metric and protocol by the name of a score: metrics whose least value is the best."""
    names: dict[str, tuple[str, str]] = {}
    for metric, row in METRICS.items():
        if row.lowest_is_best:
            names |= {metric: (metric, "edm")} | {n: (metric, p) for p, n in row.names.items()}
    return names


def build_score(name: str, data: Dataset, device: str, progress: OnProgress | None = None) -> Score:
    """Return the score `name` of images against a data set, whose features are taken once.

    `progress` is told how far the features of the data are. Raises UserError for data that the
    score is not for, MissingError for missing weights.
    """
    metric, protocol = score_names()[name]
    return score_of(metric, protocol, data, device, progress)


def score_of(
    metric: str, protocol: str, data: Dataset, device: str, progress: OnProgress | None = None
) -> Score:
    """Return the score of a metric by a protocol against a data set; else as `build_score`."""
    row, shape = METRICS[metric], tuple(data.images.shape[1:])
    if PROTOCOLS[protocol].shape not in (None, shape):
        channels, height, width = shape
        has = f"{data.name} has {width}x{height} with {channels} channels"
        hint = "--set run.eval_metric=fd-pixels, which needs no weights, or fid, which does"
        name = row.names.get(protocol, metric)
        raise UserError(f"{name} measures RGB images of 8x8; {has}", hint)
    extractor = build_extractor(protocol, device=device)
    setup = Setup(protocol, extractor)

    @cache
    def reference() -> Features:
        told = setup._replace(progress=progress)
        return collect(data, row.reference, told, side="reference")

    def score(batches: Iterable[Tensor], group: Group = ALONE, turn: int = 0) -> float:
        own = setup._replace(group=group, turn=str(turn))
        made = extract(batches, row.images, own, "drawn")
        found = group.agreed(lambda: row.compute(made, reference(), extractor), f"score {turn}")
        return found[row.values[0]].value

    return score


def pick_score(choice: Choice) -> Callable[..., Score]:
    """Return what builds a score, as `build_score` does. Raises UserError for no such score."""
    scores = {name: partial(build_score, name) for name in score_names()}
    return pick(scores, choice, "run.eval_metric")


def build_evaluation(
    preset: Preset, data: Dataset, device: str, progress: OnProgress | None = None
) -> Evaluation | None:
    """Return how a run is evaluated; None if it is not.

    Raises UserError for a metric or data that cannot be, MissingError for missing weights.
    """
    if not preset.run.eval_every:
        return None
    choice = preset.run.eval_metric
    return Evaluation(choice.name, pick_score(choice)(data, device, progress), preset.run.eval_num)


def evaluate(
    evaluation: Evaluation,
    f: Preconditioned,
    preset: Preset,
    step: int,
    group: Group,
    device: str,
    on_drawn: OnDrawn | None = None,
) -> Verdict:
    """Return the verdict over the images of seeds 0 to num - 1, sampled as the preset says.

    Every process calls this, and draws its share; the value is the one of `cmtool eval`.
    """
    name, score, num = evaluation
    seeds, chosen = range(num), plan(preset)
    drawn = drawn_batches(
        f, preset, chosen, seeds, batch=BATCH, device=device, group=group, on_drawn=on_drawn
    )
    with evaluating(f):
        return Verdict(name, score(drawn, group, step), num, step)
