"""Evaluation during training: from the images that a run's kept weights draw to one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import Dataset
from cmtool.data.images import to_uint8
from cmtool.errors import UserError
from cmtool.evaluation.measure import GAUSSIAN, collect
from cmtool.evaluation.metrics import Gaussian, frechet_distance
from cmtool.evaluation.protocols import build_extractor
from cmtool.presets.build import pick
from cmtool.presets.schema import Preset
from cmtool.sampling import evaluating, generate, plan
from cmtool.system.dist import ALONE, Group

BATCH = 256

Metric = Callable[[Tensor], float]
"""From images (N, C, H, W) uint8 to a number; the lower the better."""


class Verdict(NamedTuple):
    """What an evaluation found: the value of a metric over `num` images, at a step."""

    metric: str
    value: float
    num: int
    step: int


class Evaluation(NamedTuple):
    """How a run is evaluated: the metric, its name, and the images it takes."""

    name: str
    metric: Metric
    num: int


def build_evaluation(preset: Preset, data: Dataset, device: str) -> Evaluation | None:
    """Return how a run is evaluated, None if it is not. Raises UserError for data it cannot be."""
    if not preset.run.eval_every:
        return None
    choice = preset.run.eval_metric
    metric = pick(EVALUATORS, choice, "run.eval_metric")(data, device)
    return Evaluation(choice.name, metric, preset.run.eval_num)


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
    share = -(-evaluation.num // group.world_size)  # of one size, so that all draw in step
    seeds = range(group.rank, share * group.world_size, group.world_size)

    def draw() -> Tensor:
        drawn = generate(f, preset, plan(preset), seeds, batch=BATCH, device=device)
        return torch.cat([to_uint8(part).cpu() for part in drawn])

    with evaluating(f):
        mine = group.together(draw, f"drawn {step}")
    images = torch.stack(group.gather(mine), 1).flatten(0, 1)[: evaluation.num]
    value = group.agreed(lambda: evaluation.metric(images), f"evaluated {step}")
    return Verdict(evaluation.name, value, evaluation.num, step)


def fd_digits(data: Dataset, device: str) -> Metric:
    """Return the Frechet distance to the training images, in the features of the bundled digits.

    Raises UserError for images other than 8x8 RGB.
    """
    channels, height, width = data.images.shape[1:]
    if (channels, height, width) != (3, 8, 8):
        raise UserError(
            f"fd-digits measures RGB images of 8x8; {data.name} has {width}x{height} with"
            f" {channels} channels",
            "leave --eval-every out, and measure the finished model with cmtool eval",
        )
    return _distance("digits", data, device)


def fid(data: Dataset, device: str) -> Metric:
    """Return the FID to the training images, by the protocol `edm`, of as many images as are drawn.

    Raises MissingError, before training, where the weights of its network are missing.
    """
    return _distance("edm", data, device)


def _distance(protocol: str, data: Dataset, device: str) -> Metric:
    extractor = build_extractor(protocol, device=device)

    def gaussian(images: Iterable[Tensor]) -> Gaussian:
        found = collect(extractor, images, GAUSSIAN, ALONE).gaussian
        assert found is not None
        return found

    @cache
    def expected() -> Gaussian:
        return gaussian(data.chunks(BATCH))

    return lambda images: frechet_distance(gaussian(images.split(BATCH)), expected())


EVALUATORS: dict[str, Callable[..., Metric]] = {"fd-digits": fd_digits, "fid": fid}
