"""Consistency: how far a model is from the ends of its teacher's paths, by noise level."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch

from cmtool import __version__
from cmtool.core.consistency import Deviation, deviations, paths
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.core.samplers import sampling_levels
from cmtool.core.solvers import heun
from cmtool.errors import InputError, UserError
from cmtool.evaluation.sets import OnProgress
from cmtool.models import Model
from cmtool.sampling import counted, seen_by_network, share_of, steady


def consistency(
    model: Model,
    teacher: Model,
    seeds: range,
    levels: int,
    substeps: int,
    device: str,
    progress: OnProgress | None = None,
) -> list[Deviation]:
    """Return the deviations of a consistency model from its teacher's paths, by noise level.

    Between two levels the teacher takes `substeps` Heun steps. `progress` is told how many calls of
    the networks are done. Raises UserError for models of different images or classes, InputError
    for values that are not finite.
    """
    ours, theirs = model.preset.model, teacher.preset.model
    for what in ("image_size", "channels", "num_classes"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if a != b:
            said = f"the model has {what} {a}, the teacher {b}"
            raise UserError(said, "give the teacher it was made from")
    low, high = model.noise_range, teacher.noise_range
    known = low._replace(sigma_max=min(low.sigma_max, high.sigma_max))
    grid = sampling_levels(levels * substeps + 1, known)
    labels = seeded_labels(seeds, ours.num_classes).to(device) if ours.num_classes else None
    like = torch.zeros(len(seeds), ours.channels, *ours.image_size, device=device)
    size = ours.image_size
    calls = 2 * levels * substeps + 2 * (levels + 1)  # Heun's two a step, and two at each level
    add = share_of(
        calls * seen_by_network(len(seeds), len(seeds), size, device),
        lambda share: None if progress is None else progress("paths", share * calls, calls),
    )
    f, guide = (steady(counted(each.f, add), each.f, size, device) for each in (model, teacher))
    walk = paths(guide, SeededNoise(seeds)(like), grid, heun, labels)
    points = list(itertools.islice(walk, 0, None, substeps))
    found = deviations(f, guide, points, labels)
    if not all(map(math.isfinite, itertools.chain(*found))):
        what = "the model or the teacher makes values that are not finite"
        raise InputError(what, "it diverged: take an earlier checkpoint")
    return found


def describe_consistency(
    found: list[Deviation], model: Model, teacher: Model, seeds: range, substeps: int
) -> dict[str, Any]:
    """Return the JSON object about deviations, with what they depend on."""
    return {
        "metric": "consistency",
        "value": statistics.fmean(each.end for each in found),
        "value_is": "mean over levels of the distance from the end of the path",
        "levels": [each._asdict() for each in found],
        "num_images": len(seeds),
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "model": {"source": model.source, "sha256": model.sha256, "weights": model.weights},
        "teacher": {"source": teacher.source, "sha256": teacher.sha256, "weights": teacher.weights},
        "solver": f"heun, {substeps} steps between levels",
        "cmtool": __version__,
    }
