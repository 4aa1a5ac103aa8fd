"""Evaluation during training: from the images that a run's kept weights draw to one number."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import Dataset
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.scores import Score, build_score, score_names
from cmtool.presets.build import pick
from cmtool.presets.schema import Preset
from cmtool.sampling import evaluating, plan
from cmtool.system.dist import Group

BATCH = 256


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


def build_evaluation(preset: Preset, data: Dataset, device: str) -> Evaluation | None:
    """Return how a run is evaluated; None if it is not.

    Raises UserError for a metric or data that cannot be, MissingError for missing weights.
    """
    if not preset.run.eval_every:
        return None
    choice = preset.run.eval_metric
    scores = {name: partial(build_score, name) for name in score_names()}
    score = pick(scores, choice, "run.eval_metric")(data, device)
    return Evaluation(choice.name, score, preset.run.eval_num)


def evaluate(
    evaluation: Evaluation,
    f: Preconditioned,
    preset: Preset,
    step: int,
    group: Group,
    device: str,
) -> Verdict:
    """Return the verdict over the images of seeds 0 to num - 1, sampled as the preset says.

    Every process calls this, and draws its share; the value is the one of `cmtool eval`.
    """
    drawn = drawn_batches(
        f, preset, plan(preset), range(evaluation.num), batch=BATCH, device=device, group=group
    )
    with evaluating(f):
        value = evaluation.score(drawn, group, step)
    return Verdict(evaluation.name, value, evaluation.num, step)
