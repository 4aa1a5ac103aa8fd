"""Scores: one number of a model's images, for evaluation in training and the search for levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cmtool.core.methods import Models
from cmtool.core.precond import Preconditioned
from cmtool.core.types import Denoiser
from cmtool.data.datasets import Dataset
from cmtool.errors import UserError, nearest
from cmtool.evaluation.features import PROTOCOLS, build_extractor
from cmtool.evaluation.held_out import held_out_loss
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.metrics import METRICS, Features
from cmtool.evaluation.own import OPTION, Own, label
from cmtool.evaluation.request import CLASSES
from cmtool.evaluation.sets import OnProgress, Setup, collect, extract
from cmtool.evaluation.shares import shares_in
from cmtool.evaluation.takes import Takes, parsed
from cmtool.presets.build import pick
from cmtool.presets.schema import Choice, Preset
from cmtool.sampling import OnDrawn, plan
from cmtool.system.compiled import evaluating
from cmtool.system.dist import ALONE, Group

BATCH = 256
LOSS = "loss"
Score = Callable[..., float]
"""From (batches of a process's images, uint8, group, a new turn) to a number: less is better."""


class Verdict(NamedTuple):
    """What an evaluation found: the value of a metric over `num` images, at a step."""

    metric: str
    value: float
    num: int
    step: int


Value = Callable[[Models, int, Group, OnDrawn | None], float]
"""From the models at a step to a number: less is better. Every process calls it."""


class Evaluation(NamedTuple):
    """How a run is evaluated: the name of a number, what finds it, and the images it takes."""

    name: str
    value: Value
    num: int


class Given(NamedTuple):
    """What an evaluation is built from: the run's preset and images, those held out, the teacher.

    `progress` is told how far the features of the data are.
    """

    preset: Preset
    data: Dataset
    held: Dataset | None
    teacher: Denoiser | None
    device: str
    progress: OnProgress | None = None


def score_names() -> dict[str, tuple[str, str]]:
    """Return metric and protocol by the name of a score: metrics whose least value is the best."""
    names: dict[str, tuple[str, str]] = {}
    for metric, row in METRICS.items():
        if row.lowest_is_best:
            names |= {metric: (metric, "edm")} | {n: (metric, p) for p, n in row.names.items()}
    return names


def build_score(
    name: str,
    data: Dataset,
    device: str,
    progress: OnProgress | None = None,
    own: Own | None = None,
) -> Score:
    """Return the score `name` of images against a data set, whose features are taken once.

    `progress` is told how far the features of the data are. `own` is a feature network of the
    user's own. Raises UserError for data that the score is not for, MissingError for missing
    weights.
    """
    metric, protocol = score_names()[name]
    return score_of(metric, "own" if own else protocol, data, device, progress, own)


def check_own(name: str, own: Own | None) -> None:
    """Raise UserError for features of the user's own with a score that has its own, or without."""
    _, protocol = score_names()[name]
    if own is not None and protocol not in ("edm", "own"):
        raise UserError(f"features of your own with {name}, which has its own", "choose fid or kid")
    if own is None and protocol == "own":
        raise UserError(f"{name} without a network", "name it: --features FILE.pt")
    if own is not None:
        parsed(own.input, Takes(), OPTION)


def score_of(
    metric: str,
    protocol: str,
    data: Dataset,
    device: str,
    progress: OnProgress | None = None,
    own: Own | None = None,
) -> Score:
    """Return the score of a metric by a protocol against a data set; else as `build_score`."""
    row, shape = METRICS[metric], tuple(data.images.shape[1:])
    wanted = PROTOCOLS[protocol].shape
    if wanted is not None and wanted != shape:
        channels, height, width = shape
        has = f"{data.name} has {width}x{height} with {channels} channels"
        hint = (
            "choose fd-pixels, which needs no weights: in training"
            " --set run.eval_metric=fd-pixels, in search --metric fd-pixels"
        )
        what = f"{row.names.get(protocol, metric)} measures RGB images of {wanted[2]}x{wanted[1]}"
        raise UserError(f"{what}; {has}", hint)
    own = own and own._replace(size=shape[1:])
    extractor = build_extractor(protocol, device=device, own=own)
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


def evaluation_by_images(
    name: str, given: Given, *, features: str | None = None, input: str = "",
    sha256: str | None = None, classes: str = CLASSES[0],
) -> Evaluation:  # fmt: skip
    """Return the evaluation by a score of images that the model draws, as the preset says.

    `classes` "reference" draws each class as often as the data have it, "uniform" equally often.
    They are those of seeds 0 to run.eval_num - 1: the value is the one of `cmtool eval`.
    """
    own = own_of(features, input, sha256)
    check_own(name, own)
    preset, num, device = given.preset, given.preset.run.eval_num, given.device
    score = build_score(name, given.data, device, given.progress, own)
    is_mixed = classes == "reference" and given.data.labels is not None
    shares = shares_in(given.data) if is_mixed else None

    def value(models: Models, step: int, group: Group, on_drawn: OnDrawn | None) -> float:
        f, chosen = models.student, plan(preset)
        assert isinstance(f, Preconditioned)
        drawn = drawn_batches(
            f, preset, chosen, range(num), batch=BATCH, device=device, group=group,
            on_drawn=on_drawn, shares=shares,
        )  # fmt: skip
        with evaluating(f):
            return score(drawn, group, step)

    return Evaluation(label(name, own), value, num)


def own_of(features: str | None, takes: str, sha256: str | None) -> Own | None:
    """Return the feature network that a preset names, None if it names none. Raises UserError."""
    if features is not None:
        return Own(Path(features).expanduser(), takes, sha256=sha256)
    if takes or sha256:
        raise UserError("run.eval_metric names no features", "set run.eval_metric.features too")
    return None


def evaluation_by_loss(given: Given) -> Evaluation:
    """Return the evaluation by the run's own loss on held-out images, run.eval_num at most."""
    preset, held = given.preset, given.held
    assert held is not None, "check_metric sees to it"
    most = preset.run.eval_num
    loss = held_out_loss(preset, held, given.teacher, most, given.device)
    return Evaluation(LOSS, loss, min(most, len(held)))


def pick_metric(choice: Choice) -> Callable[[Given], Evaluation]:
    """Return what builds a run's evaluation. Raises UserError for a metric that there is not."""
    by_images = {name: partial(evaluation_by_images, name) for name in score_names()}
    return pick({**by_images, LOSS: evaluation_by_loss}, choice, "run.eval_metric", ["given"])


def check_metric(preset: Preset) -> None:
    """Raise UserError for a metric, or an option of it, that cannot be; no file is looked for."""
    choice = preset.run.eval_metric
    pick_metric(choice)
    if choice.name != LOSS:
        options = choice.options
        if (classes := options.get("classes", CLASSES[0])) not in CLASSES:
            what = f"run.eval_metric.classes = {classes!r}"
            raise UserError(what, nearest(str(classes), CLASSES))
        takes, sha256 = options.get("input", ""), options.get("sha256")
        check_own(choice.name, own_of(options.get("features"), takes, sha256))
    elif preset.data.held_out is None:
        what = "run.eval_metric = 'loss' without images to measure it on"
        raise UserError(what, "--set data.held_out=0.05, a share of the data, or a path of others")


def build_evaluation(given: Given) -> Evaluation | None:
    """Return how a run is evaluated; None if it is not.

    Raises UserError for a metric or data that cannot be, MissingError for missing weights.
    """
    if not given.preset.run.eval_every:
        return None
    return pick_metric(given.preset.run.eval_metric)(given)


def evaluate(
    evaluation: Evaluation,
    models: Models,
    step: int,
    group: Group,
    on_drawn: OnDrawn | None = None,
) -> Verdict:
    """Return the verdict over the student of `models`; every process calls this."""
    name, value, num = evaluation
    return Verdict(name, value(models, step, group, on_drawn), num, step)
