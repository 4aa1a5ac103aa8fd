"""compare.json: what a comparison of methods was asked, how far it is, and the table it makes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from cmtool.errors import InputError, UserError
from cmtool.system.files import write_json
from cmtool.system.records import Count, Facts, read_facts
from cmtool.training.records import DataFacts

FILE = "compare.json"
STEPS = (1, 2)
"""Steps of the sampler at which each method is measured."""


class Asked(Facts):
    """What the user asks of a comparison; `values` are those of --set, by dotted key."""

    presets: list[str]
    teacher: str | None
    data: str | None
    seeds: list[int]
    seconds: float
    num: Count
    protocol: str | None
    values: dict[str, Any]


class Reference(Facts):
    """The teacher, and the distance of what it draws with its own sampler, once measured."""

    source: str
    sha256: str
    sampler: str
    calls: Count
    value: float | None = None


class Fitted(Facts):
    """A preset fitted to the time; `calls` are the network calls an image, by sampler steps.

    `seconds_before` are those of a run in which its method works before its steps.
    """

    preset: str
    method: str
    steps: Count
    batch: Count
    accumulate: Count
    seconds_a_step: float | None
    seconds_before: float = 0.0
    calls: dict[str, Count]


class Point(Facts):
    """The distance of a run's weights at a step, by sampler steps; the times once it is done."""

    step: Count
    images: Count
    values: dict[str, float]
    seconds: float | None = None
    cpu_seconds: float | None = None


class Trained(Facts):
    """A run of a comparison; `name` is that of its method, `folder` lies in that of compare.json.

    `left` is not begun, or not at its end.
    """

    name: str
    seed: Count
    folder: str
    state: Literal["left", "done", "diverged"] = "left"
    points: list[Point] = Field([])


class Comparison(Facts):
    """compare.json: the metric is the same for all, of `num` images with the same seeds."""

    asked: Asked
    metric: str
    protocol: str
    data: DataFacts
    teacher: Reference
    methods: dict[str, Fitted]
    runs: list[Trained]
    versions: dict[str, str]
    device: str
    threads: Count


class Row(NamedTuple):
    """A row of the table: means over seeds, and the spread of the values for several seeds.

    `values` and `spread` are by sampler steps; `ratio` is of one step to the teacher. None is for
    what is not known, as of runs that all diverged.
    """

    name: str
    state: str
    seeds: list[int]
    steps: int
    images: int
    seconds: float | None
    cpu_seconds: float | None
    values: dict[str, float | None]
    spread: dict[str, float | None]
    calls: dict[str, int]
    ratio: float | None


def read_comparison(out: Path) -> Comparison | None:
    """Return the comparison in a folder, None if there is none. Raises InputError if damaged."""
    return read_facts(out / FILE, Comparison)


def teacher_of(out: Path) -> str | None:
    """Return the teacher of the comparison in a folder, None if there is no comparison."""
    stored = read_comparison(out)
    return stored.teacher.source if stored else None


def write_comparison(out: Path, comparison: Comparison) -> None:
    """Write compare.json."""
    write_json(out / FILE, content_of(comparison), durable=True)


def content_of(comparison: Comparison) -> dict[str, Any]:
    """Return the JSON object of a comparison, with its table."""
    rows = [row._asdict() for row in table(comparison)]
    return {**comparison.model_dump(mode="json"), "table": rows}


def check_asked(before: Asked, now: Asked, out: Path) -> None:
    """Raise UserError unless a comparison is asked for what it was begun with."""
    for key, value in now.model_dump().items():
        old = before.model_dump()[key]
        if old != value:
            name = OPTIONS.get(key, f"--{key}")
            what = f"the comparison in {out} was begun with {name} {shown(old)}, now {shown(value)}"
            raise UserError(what, "go on with the same command, give another --out, or --overwrite")


OPTIONS = {"presets": "the presets", "values": "--set", "seconds": "--max-time"}
"""What the user calls the parts of Asked whose names are not those of options."""


def shown(value: object) -> str:
    """Return a part of Asked as it is typed."""
    if value is None or value in ([], {}):
        return "left out"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_name(preset: str) -> str:
    """Return the name of a preset's runs and row: its own, without the folder and the ending."""
    return Path(preset).stem if preset.endswith(".toml") or "/" in preset else preset


def check_names(presets: Sequence[str]) -> None:
    """Raise UserError for presets of one name, whose runs would share a folder."""
    names = [run_name(preset) for preset in presets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two presets named {name}", "give each once, or rename a file")


def planned_runs(asked: Asked) -> list[Trained]:
    """Return the runs of a comparison, none begun: all methods with the first seed come first."""
    several = len(asked.seeds) > 1
    return [
        Trained(name=name, seed=seed, folder=f"{name}-seed{seed}" if several else name)
        for seed in asked.seeds
        for name in map(run_name, asked.presets)
    ]


def with_run(comparison: Comparison, run: Trained) -> Comparison:
    """Return the comparison with a run in the place of the one of its folder."""
    runs = [run if each.folder == run.folder else each for each in comparison.runs]
    return comparison.model_copy(update={"runs": runs})


def run_in(comparison: Comparison, folder: str) -> Trained:
    """Return the run of a folder."""
    return next(run for run in comparison.runs if run.folder == folder)


def with_point(run: Trained, point: Point) -> Trained:
    """Return the run with a point; one of the same step, from before a resumption, is replaced."""
    points = {each.step: each for each in run.points} | {point.step: point}
    return run.model_copy(update={"points": [points[step] for step in sorted(points)]})


def table(comparison: Comparison) -> list[Row]:
    """Return a row for each method that has a run at its end, the least distance first."""
    made = [row_of(comparison, name) for name in comparison.methods]
    return sorted((row for row in made if row is not None), key=in_one_step)


def in_one_step(row: Row) -> float:
    """Return the distance by which rows are sorted: the largest for runs that all diverged."""
    value = row.values[str(STEPS[0])]
    return math.inf if value is None else value


def row_of(comparison: Comparison, name: str) -> Row | None:
    """Return the row of a method, None while none of its runs is at its end."""
    ended = [run for run in comparison.runs if run.name == name and run.state != "left"]
    done = [run for run in ended if run.state == "done"]
    if not ended:
        return None
    fitted, last = comparison.methods[name], [run.points[-1] for run in done]
    values = {str(n): [point.values[str(n)] for point in last] for n in STEPS}
    means = {n: mean(each) for n, each in values.items()}
    one, reference = means[str(STEPS[0])], comparison.teacher.value
    return Row(
        name=name,
        state="done" if done else "diverged",
        seeds=[run.seed for run in done],
        steps=fitted.steps,
        images=fitted.steps * fitted.batch,
        seconds=mean([point.seconds for point in last]),
        cpu_seconds=mean([point.cpu_seconds for point in last]),
        values=means,
        spread={n: statistics.stdev(each) if len(each) > 1 else None for n, each in values.items()},
        calls=fitted.calls,
        ratio=None if one is None or reference is None else one / reference,
    )


def mean(numbers: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are known, None if there are none."""
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known else None


def no_comparison(out: Path) -> InputError:
    """Return the error for a folder that holds something else."""
    return InputError(f"{out} is not empty and no comparison", "give a new folder with --out")
