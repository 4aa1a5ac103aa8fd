"""From what a command line names to one measurement, and the JSON object about it."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cmtool import __version__
from cmtool.cli._output import say
from cmtool.errors import InputError, ThresholdError, UserError

if TYPE_CHECKING:
    from cmtool.data.datasets import Dataset
    from cmtool.evaluation.measure import Sample, Setting, Values
    from cmtool.models import Model
    from cmtool.sampling import Plan
    from cmtool.system.dist import Group

EVERY = 10.0
"""Seconds between two lines about progress."""

Source = Callable[[int], "tuple[Sample, dict[str, Any]]"]
"""What gives a set at each turn, and what to say of it."""


class Threshold(NamedTuple):
    """What --fail-above and --fail-below ask of a value."""

    above: float | None
    below: float | None


def given_images(images: list[str] | None, checkpoint: str | None) -> list[str] | None:
    """Return the names of images on the command line or stdin; None for a model's."""
    if images and checkpoint is not None:
        raise UserError("both images and --checkpoint", "give one of them")
    piped = images is None and checkpoint is None and not sys.stdin.isatty()
    if images == ["-"] or piped:
        lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
        listed = [path for line in lines if (path := line.removesuffix("\r"))]
        if images and not listed:
            raise InputError("no paths on stdin", "pipe them in, one a line")
        return listed or None
    return images or None


def refuse_options(options: Mapping[str, bool], beside: str, hint: str) -> None:
    """Raise UserError for the first of the options that was given, which would do nothing."""
    for name, given in options.items():
        if given:
            raise UserError(f"{name} {beside}", hint)


def usual_protocol(metric: str, reference: str | None) -> str:
    """Return the protocol when none is named: by the reference, which may say it itself."""
    from cmtool.data.datasets import DATASETS
    from cmtool.evaluation.references import read_reference

    if metric == "is":
        return "edm"
    if reference is None or reference.partition(":")[0] in DATASETS:
        return "digits"
    stored = read_reference(Path(reference))
    return str(stored.about.get("protocol", "edm")) if stored is not None else "edm"


def make_setting(
    protocol: str,
    file: Path | None,
    trust: bool,
    precision: str,
    device: str,
    batch: int,
    workers: int,
    group: Group,
) -> Setting:
    """Return what is the same for both sides, before anything is sampled."""
    from cmtool.evaluation.measure import Setting
    from cmtool.evaluation.protocols import build_extractor

    extractor = build_extractor(
        protocol, file=file, trust=trust, precision=precision, device=device
    )
    for note in extractor.notes:
        say(f"note: {note}")
    return Setting(protocol, extractor, batch, workers, group)


def images_source(metric: str, given: list[str], setting: Setting, num: int | None) -> Source:
    """Return what looks at the images that were named."""
    from cmtool.evaluation.measure import METRICS, set_of

    data = _listed(given)
    name = given[0] if data is None else data.name

    def look(turn: int) -> tuple[Sample, dict[str, Any]]:
        sample, facts = set_of(
            name, METRICS[metric].made, setting, num=num, data=data, tell=ticker("images")
        )
        return sample, {"images": facts}

    return look


def _listed(given: list[str]) -> Dataset | None:
    """Return image files as a data set; None for the name of one, which is opened by its kind."""
    from cmtool.data.datasets import listed_images
    from cmtool.data.images import SUFFIXES

    if len(given) == 1 and not given[0].lower().endswith(SUFFIXES):
        return None
    return listed_images(given)


def model_source(
    metric: str, model: Model, chosen: Plan, setting: Setting, num: int, first: int, device: str
) -> Source:
    """Return what draws the images of a model, for new seeds at each turn."""
    from cmtool.evaluation.measure import METRICS, collect, drawn_batches

    facts: dict[str, Any] = {
        "model": {
            "source": model.source,
            "sha256": model.sha256,
            "weights": model.weights,
            "kind": model.kind,
            "precision": chosen.precision,
        },
        "sampler": chosen.sampler.name,
        "sigmas": chosen.sigmas,
        "evaluations": chosen.evaluations,
        "classes": "drawn from the seeds" if model.preset.model.num_classes else None,
    }

    def draw(turn: int) -> tuple[Sample, dict[str, Any]]:
        seeds = range(first + turn * num, first + (turn + 1) * num)
        drawn = drawn_batches(model, chosen, seeds, setting.batch, setting.group, device)
        sample = collect(
            setting.extractor,
            drawn,
            METRICS[metric].made,
            setting.group,
            ticker("drawn", num),
            f"run {turn}",
        )
        return sample, {
            **facts, "seeds": f"{seeds[0]}-{seeds[-1]}", "fingerprint": sample.fingerprint,
        }  # fmt: skip

    return draw


def ticker(what: str, total: int = 0) -> Callable[[int], None]:
    """Return what says, every ten seconds, how far the leading process is."""
    start = last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < EVERY:
            return
        last = now
        of = f" of {total:,}" if total else ""
        say(f"{what}: {done:,}{of} images, {done / (now - start):,.0f} a second, this process")

    return tell


def measure_all(
    metric: str,
    reference: str,
    source: Source,
    setting: Setting,
    runs: int,
    reference_num: int | None = None,
) -> dict[str, Any]:
    """Return the JSON object of a measurement: its value, and all that it depends on."""
    import torch

    from cmtool.evaluation.measure import (
        METRICS,
        PUBLISHED_NUM,
        Sample,
        extractor_facts,
        measured,
        set_of,
    )

    extractor = setting.extractor
    if METRICS[metric].reference == (False, False):
        target, about = Sample(None, None, 0), None
    else:
        target, about = set_of(
            reference,
            METRICS[metric].reference,
            setting,
            num=reference_num,
            tell=ticker("reference"),
            side="reference",
        )
    found: list[Values] = []
    facts: dict[str, Any] = {}
    for turn in range(runs):
        sample, each = source(turn)
        found.append(measured(metric, sample, target, setting, turn))
        facts = _joined(facts, each) if turn else each
    name = "fd-digits" if (metric, setting.protocol) == ("fid", "digits") else metric
    values = [_plain({key: e.value for key, e in values.items()}) for values in found]
    errors = _plain({key: _or_none(e.error) for key, e in found[0].items()})
    content: dict[str, Any] = {"metric": name, "value": values[0]}
    if runs > 1:
        content |= _spread(values, least=metric in ("fid", "kid"))
    elif errors is not None:
        content["standard_error"] = errors
    content |= {
        "protocol": setting.protocol,
        "num_images": sample.num or None,
        "proxy": sample.num < PUBLISHED_NUM if sample.num else None,
        **facts,
        "reference": about,
        "features": extractor_facts(extractor),
        "settings": METRICS[metric].settings,
        "cmtool": __version__,
        "torch": torch.__version__,
    }
    _comment(name, content, [sample.num, target.num if about else 0], extractor.width)
    split = METRICS[metric].settings.get("is", METRICS[metric].settings).get("split", sample.num)
    if sample.num > split and sample.num % split:
        say(f"note: the last split of the score has {sample.num % split} images, not {split:,}")
    made_in = (about or {}).get("precision", extractor.precision)
    if made_in != extractor.precision:
        say(f"note: the reference was made in {made_in}, these features in {extractor.precision}")
    return content


def _plain(values: dict[str, Any]) -> Any:
    """Return the only value, or all by name; None for Nones alone."""
    if len(values) == 1:
        return next(iter(values.values()))
    return None if all(value is None for value in values.values()) else values


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what to say of several runs of a model, which differ in seeds and images."""
    first, last = before["seeds"].partition("-")[0], now["seeds"].rpartition("-")[2]
    marks = [before["fingerprint"], now["fingerprint"]]
    return {**before, "seeds": f"{first}-{last}", "fingerprint": ",".join(marks)}


def _spread(values: list[Any], least: bool) -> dict[str, Any]:
    """Return the `least` value of several runs, as EDM reports, or their mean; and the spread."""
    if isinstance(values[0], dict):
        keys = values[0].keys()
        columns = {key: [value[key] for value in values] for key in keys}
        return {
            "value": {key: statistics.fmean(column) for key, column in columns.items()},
            "value_is": f"mean of {len(values)} runs",
            "spread": {key: statistics.stdev(column) for key, column in columns.items()},
            "runs": values,
        }
    mean = statistics.fmean(values)
    return {
        "value": min(values) if least else mean,
        "value_is": f"{'minimum' if least else 'mean'} of {len(values)} runs",
        "mean": mean,
        "spread": statistics.stdev(values),
        "runs": values,
    }


def _comment(name: str, content: dict[str, Any], counts: list[int], width: int) -> None:
    """Say the value, and on what it does not stand."""
    value = content["value"]
    shown = (
        ", ".join(f"{key} {each:.4f}" for key, each in value.items())
        if isinstance(value, dict)
        else f"{name} {value:.4f}"
    )
    say(f"{shown} ({counts[0]} images)" if counts[0] else shown)
    few = min((count for count in counts if count), default=width + 1)
    if "fid" in shown.split() or name == "fd-digits":
        content["rank_deficient"] = few <= width
        if few <= width:
            say(
                f"note: {few} images are no more than the {width} features: the covariance is"
                " singular, and the distance is mostly that of few images"
            )
    if content["proxy"] and content["protocol"] != "digits":
        say("note: published numbers are of 50,000 images; of fewer they are a proxy")


def check_threshold(content: dict[str, Any], threshold: Threshold) -> None:
    """Raise ThresholdError for a value that is beyond a threshold."""
    name, value = content["metric"], content["value"]
    if threshold.above is not None and value > threshold.above:
        raise ThresholdError(
            f"{name} {value:.4f} is above {threshold.above:g}", "train longer, or use more --steps"
        )
    if threshold.below is not None and value < threshold.below:
        raise ThresholdError(
            f"{name} {value:.4f} is below {threshold.below:g}", "train longer, or use more --steps"
        )
