"""Results: the JSON object of a measurement, with all that the numbers depend on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cmtool import __version__
from cmtool.evaluation.metrics import METRICS, Features, Metric, Values
from cmtool.evaluation.sets import Setup, extractor_facts

PUBLISHED_NUM = 50_000
"""Images that published numbers are of; a number of fewer is a proxy."""


class Result(NamedTuple):
    """A measurement: its JSON object, and what to tell the user about it, by line."""

    content: dict[str, Any]
    notes: list[str]


def describe(
    metric: str,
    setup: Setup,
    made: Sequence[Features],
    reference: Features,
    found: Sequence[Values],
) -> Result:
    """Return the result of one run or several, of which `made` and `found` have an item each."""
    row, extractor, num = METRICS[metric], setup.extractor, made[-1].num
    content = {
        "metric": row.names.get(setup.protocol, metric),
        **_numbers(row, found),
        "protocol": setup.protocol,
        "num_images": num or None,
        "proxy": num < PUBLISHED_NUM if num else None,
        **_joined(made),
        "reference": dict(reference.about) or None,
        "features": extractor_facts(extractor),
        "settings": row.settings,
        "cmtool": __version__,
        "torch": torch.__version__,
    }
    counts = [count for count in (num, reference.num) if count]
    few = min(counts, default=extractor.width + 1)
    if "fid" in row.values:
        content["rank_deficient"] = few <= extractor.width
    return Result(
        content,
        [*(f"note: {note}" for note in extractor.notes), *_notes(row, content, setup, num, few)],
    )


def _numbers(row: Metric, found: Sequence[Values]) -> dict[str, Any]:
    """Return the value; of one run with its standard error, of several with their spread."""
    runs = [{name: each[name].value for name in row.values} for each in found]
    if len(runs) == 1:
        errors = {name: found[0][name].error for name in row.values}
        shown = {name: None if math.isnan(error) else error for name, error in errors.items()}
        known = any(error is not None for error in shown.values())
        return {"value": _plain(runs[0])} | ({"standard_error": _plain(shown)} if known else {})
    columns = {name: [run[name] for run in runs] for name in row.values}
    mean = _plain({name: statistics.fmean(column) for name, column in columns.items()})
    spread = _plain({name: statistics.stdev(column) for name, column in columns.items()})
    least = row.lowest_is_best
    return {
        "value": min(columns[row.values[0]]) if least else mean,
        "value_is": f"{'minimum' if least else 'mean'} of {len(runs)} runs",
        **({"mean": mean} if len(columns) == 1 else {}),
        "spread": spread,
        "runs": [_plain(run) for run in runs],
    }


def _plain(numbers: dict[str, Any]) -> Any:
    """Return the only number, or all by name."""
    return numbers if len(numbers) > 1 else next(iter(numbers.values()))


def _joined(made: Sequence[Features]) -> dict[str, Any]:
    """Return what to say of the images; the runs of a model differ in seeds and images."""
    first, last = dict(made[0].about), made[-1].about
    if len(made) > 1:
        start, end = first["seeds"].partition("-")[0], last["seeds"].rpartition("-")[2]
        marks = ",".join(each.fingerprint for each in made)
        first |= {"seeds": f"{start}-{end}", "fingerprint": marks}
    return first


def _notes(row: Metric, content: dict[str, Any], setup: Setup, num: int, few: int) -> list[str]:
    """Return the value as a line, and what makes it less than a published number."""
    value, width = content["value"], setup.extractor.width
    numbers = value if isinstance(value, dict) else {content["metric"]: value}
    shown = ", ".join(f"{name} {number:.4f}" for name, number in numbers.items())
    notes = [f"{shown} ({num} images)" if num else shown]
    if content.get("rank_deficient"):
        notes.append(
            f"note: {few} images are no more than the {width} features: the covariance is"
            " singular, and the distance is mostly that of few images"
        )
    if content["proxy"] and setup.protocol != "digits":
        notes.append("note: published numbers are of 50,000 images; of fewer they are a proxy")
    split = row.settings.get("is", row.settings).get("split", num)
    if num > split and num % split:
        notes.append(f"note: the last split of the score has {num % split} images, not {split:,}")
    precision = setup.extractor.precision
    made_in = (content["reference"] or {}).get("precision", precision)
    if made_in != precision:
        notes.append(f"note: the reference was made in {made_in}, these features in {precision}")
    return notes
