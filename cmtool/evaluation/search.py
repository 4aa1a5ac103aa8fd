"""The search for the noise levels that a model samples best at (Song et al. 2023, sec. 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from cmtool.data.datasets import load_dataset
from cmtool.errors import UserError
from cmtool.evaluation.during_training import build_score
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.own import Own, label
from cmtool.evaluation.sets import OnProgress
from cmtool.formats.native import read_table
from cmtool.models import Model
from cmtool.sampling import indexed_levels, plan
from cmtool.system.files import write_json


def ternary_search(value: Callable[[int], float], low: int, high: int) -> int:
    """Return where `value` is least, of the whole numbers low < i < high that were tried.

    If `value` has one valley, this is the least of all. Each step drops a third of the interval.
    Raises UserError for an empty interval.
    """
    if high - low < 2:
        raise UserError(f"no level between {low} and {high}", "ask for fewer steps")
    known = cache(value)
    tried = set()
    while high - low > 3:
        third = (high - low) / 3
        left, right = int(low + third), int(high - third)
        tried |= {left, right}
        low, high = (low, right) if known(left) < known(right) else (left, high)
    return min(sorted(tried | set(range(low + 1, high))), key=known)


def search_indices(
    score: Callable[[tuple[int, ...]], float], steps: int, points: int
) -> tuple[int, ...]:
    """Return `steps` ascending indices of a grid of `points` levels, the first of them 0.

    Each index in turn is searched between the one before and the end, for the least score, while
    those before it stay (Song et al. 2023, sec. 3; the released ternary_search.py).
    """
    chosen: tuple[int, ...] = (0,)

    def with_next(i: int) -> float:
        return score((*chosen, i))

    while len(chosen) < steps:
        chosen = (*chosen, ternary_search(with_next, chosen[-1], points - 1))
    return chosen


@dataclass(frozen=True)
class Search:
    """A search on a grid of `points` levels, for the least score of the images of `num` seeds.

    `file` keeps all scores, so that the same search goes on where it was stopped. `own` is a
    feature network of the user's own.
    """

    model: Model
    metric: str
    reference: str
    num: int
    first_seed: int
    points: int
    file: Path
    batch: int = 256
    device: str = "cpu"
    own: Own | None = None

    def levels(
        self, steps: int, tell: Callable[[str], None], progress: OnProgress | None = None
    ) -> tuple[list[float], float]:
        """Return the best levels for `steps`, and their score; write both to the file.

        `tell` gets a line about each score, `progress` is told how far the images for it are.
        Raises UserError for a file of another model.
        """
        kept = self._kept()
        scores: dict[str, float] = kept["evaluations"]
        preset, device = self.model.preset, self.device
        score = build_score(self.metric, load_dataset(self.reference), device, progress, self.own)
        seeds = range(self.first_seed, self.first_seed + self.num)
        told = None if progress is None else partial(progress, "drawn")
        draw = partial(
            drawn_batches, self.model.f, preset, batch=self.batch, device=device, on_drawn=told
        )

        def levels_at(indices: tuple[int, ...]) -> list[float]:
            return indexed_levels(preset, (*indices, self.points - 1), self.points)

        def score_at(indices: tuple[int, ...]) -> float:
            sigmas = levels_at(indices)
            key = _key(sigmas)
            known = " (known)" if key in scores else ""
            if not known:
                scores[key] = score(draw(plan(preset, sigmas=sigmas), seeds))
                write_json(self.file, kept)
            tell(f"sigma {key}: {self.metric} {float(scores[key]):.4f}{known}")
            return float(scores[key])

        best = levels_at(search_indices(score_at, steps, self.points))
        kept["levels"][str(steps)] = best
        write_json(self.file, kept)
        return best, float(scores[_key(best)])

    def _kept(self) -> dict[str, Any]:
        """Return what the file has of an earlier search, scores only of the same one."""
        about = {
            "model": self.model.sha256, "metric": label(self.metric, self.own),
            "reference": self.reference, "num": self.num, "first_seed": self.first_seed,
        }  # fmt: skip
        start: dict[str, Any] = {**about, "evaluations": {}, "levels": {}}
        if not self.file.exists():
            return start
        try:
            found = read_table(self.file)
            levels, evaluations = dict(found["levels"]), dict(found["evaluations"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.file} holds no earlier search", "give another --out") from None
        if found.get("model") != about["model"]:
            raise UserError(f"{self.file} is of another model", "give another --out, or remove it")
        same = all(found.get(key) == value for key, value in about.items())
        return {**start, "levels": levels, "evaluations": evaluations if same else {}}


def _key(sigmas: list[float]) -> str:
    return ",".join(f"{sigma:.6g}" for sigma in sigmas)
