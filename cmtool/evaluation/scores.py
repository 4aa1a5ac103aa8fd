"""Scores: one number of a model's images, by which models and noise levels are compared."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Protocol

from torch import Tensor

from cmtool.data.datasets import Dataset
from cmtool.errors import UserError
from cmtool.evaluation.metrics import METRICS, Features
from cmtool.evaluation.protocols import PROTOCOLS, build_extractor
from cmtool.evaluation.sets import Setup, collect, extract
from cmtool.system.dist import ALONE, Group


class Score(Protocol):
    """From batches of images (B, C, H, W) uint8 to a number: the lower, the better."""

    def __call__(self, batches: Iterable[Tensor], group: Group = ALONE, turn: int = 0) -> float:
        """Return the number. Each process gives its own images; no two calls have one `turn`."""
        ...


def build_score(name: str, data: Dataset, device: str) -> Score:
    """Return the score `name` of images against a data set, whose features are taken once.

    Raises UserError for data that the score is not for, MissingError for missing weights.
    """
    metric, protocol = score_names()[name]
    row, shape = METRICS[metric], tuple(data.images.shape[1:])
    if PROTOCOLS[protocol].shape not in (None, shape):
        channels, height, width = shape
        raise UserError(
            f"{name} measures RGB images of 8x8; {data.name} has {width}x{height} with"
            f" {channels} channels",
            "choose the metric fid, or measure the finished model with cmtool eval",
        )
    setup = Setup(protocol, build_extractor(protocol, device=device))

    @cache
    def reference() -> Features:
        return collect(data, row.reference, setup, side="reference")

    def score(batches: Iterable[Tensor], group: Group = ALONE, turn: int = 0) -> float:
        own = setup._replace(group=group, turn=str(turn))
        made = extract(batches, row.images, own, "drawn")

        def compute() -> float:
            return row.compute(made, reference(), setup.extractor)[row.values[0]].value

        return group.agreed(compute, f"score {turn}")

    return score


def score_names() -> dict[str, tuple[str, str]]:
    """Return metric and protocol by the name of a score: metrics whose least value is the best."""
    names = {name: (name, "edm") for name, row in METRICS.items() if row.lowest_is_best}
    for name in list(names):
        names |= {other: (name, protocol) for protocol, other in METRICS[name].names.items()}
    return names
