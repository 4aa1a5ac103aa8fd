"""A comparison of methods: the same images, network, seeds and time of training for each preset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import Dataset
from cmtool.errors import DivergedError, Stopped, UserError
from cmtool.evaluation.during_training import BATCH, Score, score_of
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.metrics import METRICS
from cmtool.evaluation.sets import OnProgress
from cmtool.models import Model, load_model
from cmtool.presets.schema import Card, Preset
from cmtool.presets.toml import is_method_preset, load_preset, preset_names
from cmtool.sampling import OnDrawn, Plan, generate, plan
from cmtool.system.compiled import evaluating
from cmtool.training import run as runs
from cmtool.training.comparison import (
    FILE,
    STEPS,
    Asked,
    Comparison,
    Fitted,
    Point,
    Reference,
    Trained,
    check_asked,
    check_names,
    no_comparison,
    planned_runs,
    read_comparison,
    run_in,
    run_name,
    with_point,
    with_run,
    write_comparison,
)
from cmtool.training.fair import (
    METRIC,
    Terms,
    lap_times,
    own_teacher,
    picked_protocol,
    resolved,
    split_by_memory,
    work_before,
)
from cmtool.training.folder import clear_run, is_resumable, is_run
from cmtool.training.history import time_spent
from cmtool.training.lock import locked
from cmtool.training.log import Watcher, read_log
from cmtool.training.observers import News, Observer, Tools, kept_model
from cmtool.training.plots import Reached, write_methods
from cmtool.training.records import DataFacts
from cmtool.training.start import Run, check_components, check_fit, load_images, versions

POINTS = 6
FIRST_SHARE = 0.05
"""Part of a run at its first point; the others follow evenly in the logarithm."""
SHOWN = 16
"""Images of a method in the picture."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs of a comparison share, and who is told of them.

    `watching` makes the watcher of a run from its number of steps, `showing` the one of other
    work.
    """

    out: Path
    terms: Terms
    note: Callable[[str], None]
    watching: Callable[[int], AbstractContextManager[Watcher]]
    showing: Callable[[], AbstractContextManager[OnProgress]]


def check_presets(asked: Asked) -> None:
    """Raise UserError for presets that do not exist, or that share a name."""
    check_names(asked.presets)
    for preset in asked.presets:
        load_preset(preset)


def default_presets() -> list[str]:
    """Return the presets that name no data and make a consistency model, sorted."""
    own = filter(is_method_preset, preset_names())
    return [name for name in own if load_preset(name).kind == "consistency"]


def compare(bench: Bench, *, overwrite: bool = False) -> Comparison:
    """Train each preset as long as the others, measure it on the way, and draw what they reach.

    The folder gets compare.json, compare.png, and a run folder for each run. A comparison that was
    stopped goes on. Raises UserError for a folder of another comparison or of something else,
    BusyError while another process works in it, and what a run raises. A run that diverges ends
    only itself.
    """
    out, (asked, _, device) = bench.out, bench.terms
    if out.exists() and not out.is_dir():
        raise no_comparison(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, bench.note), resumable():
        stored = stored_comparison(bench, overwrite=overwrite)
        shared = resolved(bench.terms, asked.presets[0]).preset
        data, protocol = load_images(shared, bench.note), picked_protocol(asked.protocol, shared)
        score = score_of(METRIC, protocol, data, device)
        comparison = stored or begun(bench, data, protocol)
        comparison = with_reference(bench, comparison, score)
        for run in comparison.runs:
            if run.state == "left":
                comparison = train_one(bench, comparison, run, score)
        draw_comparison(bench, comparison)
    return comparison


@contextmanager
def resumable() -> Iterator[None]:
    """Let an error that a signal raises in the block tell how to go on."""
    try:
        yield
    except Stopped as error:
        error.hint = "the same command goes on with it"
        raise


def stored_comparison(bench: Bench, *, overwrite: bool) -> Comparison | None:
    """Return the comparison in the folder, None if one begins.

    Raises UserError for one that was asked for something else, or for a teacher in a folder that
    is overwritten; InputError for a folder that holds something else.
    """
    out, (asked, teacher, _) = bench.out, bench.terms
    has_file = (out / FILE).exists()
    if not has_file and any(path.name != ".lock" for path in out.iterdir()):
        raise no_comparison(out)
    stored = read_comparison(out) if has_file and not overwrite else None
    if stored is None:
        if Path(teacher.source).resolve().is_relative_to(out.resolve()):
            what = f"the teacher is in {out}"
            raise UserError(what, "overwriting it would lose it: change --out")
        return None
    check_asked(stored.asked, asked, out)
    if stored.teacher.sha256 != teacher.sha256:
        what = f"the comparison in {out} was begun with another teacher than {teacher.source} now"
        raise UserError(what, "give another --out, or --overwrite")
    return stored


def begun(bench: Bench, data: Dataset, protocol: str) -> Comparison:
    """Return a new comparison, whose presets are fitted to the time; earlier runs are cleared.

    Raises UserError or InputError for a preset, images or a teacher that do not fit.
    """
    asked, teacher, device = bench.terms
    presets = {run_name(name): resolved(bench.terms, name).preset for name in asked.presets}
    for name, preset in presets.items():
        check_components(preset)
        check_fit(preset, data, teacher)
        presets[name] = split_by_memory(bench.terms, preset)
    laps: Mapping[str, float] = {}
    early: dict[str, float] = {}
    if "train.steps" not in asked.values:
        bench.note(f"timing the steps of {', '.join(presets)}")
        for (name, preset), source in zip(presets.items(), asked.presets, strict=True):
            early[name] = work_before(bench.terms, source, preset, data)
        laps = lap_times(bench.terms, presets)
    methods = {}
    for name, source in zip(presets, asked.presets, strict=True):
        preset, lap, before = presets[name], laps.get(name), early.get(name, 0.0)
        left = asked.seconds - before
        steps = preset.train.steps if lap is None else max(int(left / lap), 1)
        methods[name] = fitted(source, preset, steps, lap, before)
    chosen = plan(teacher.preset)
    reference = Reference(
        source=teacher.source, sha256=teacher.sha256, sampler=chosen.sampler.name,
        calls=chosen.evaluations,
    )  # fmt: skip
    facts = DataFacts(name=data.name, images=len(data), fingerprint=data.fingerprint())
    comparison = Comparison(
        asked=asked, metric=METRICS[METRIC].names.get(protocol, METRIC), protocol=protocol,
        data=facts, teacher=reference, methods=methods, runs=planned_runs(asked), device=device,
        threads=torch.get_num_threads(), versions=versions(),
    )  # fmt: skip
    for run in comparison.runs:
        if is_run(bench.out / run.folder):
            with locked(bench.out / run.folder):
                clear_run(bench.out / run.folder)
    write_comparison(bench.out, comparison)
    return comparison


def with_reference(bench: Bench, comparison: Comparison, score: Score) -> Comparison:
    """Return the comparison with the distance of the teacher's images, which is measured once."""
    if comparison.teacher.value is not None:
        return comparison
    asked, teacher, device = bench.terms
    with bench.showing() as progress:
        told = partial(progress, "drawn by the teacher")
        chosen = plan(teacher.preset)
        value = measured_value(score, teacher.f, teacher.preset, chosen, asked.num, device, told)
    measured = comparison.teacher.model_copy(update={"value": value})
    comparison = comparison.model_copy(update={"teacher": measured})
    write_comparison(bench.out, comparison)
    return comparison


def fitted(name: str, preset: Preset, steps: int, lap: float | None, before: float = 0.0) -> Fitted:
    """Return a preset as compare.json tells it."""
    return Fitted(
        preset=name, method=preset.loss.method.name, steps=steps, batch=preset.train.batch,
        accumulate=preset.train.accumulate, seconds_a_step=lap, seconds_before=before,
        calls={str(n): plan(preset, n).evaluations for n in STEPS},
    )  # fmt: skip


def measured_value(
    score: Score,
    f: Preconditioned,
    card: Card,
    chosen: Plan,
    num: int,
    device: str,
    told: OnDrawn | None = None,
) -> float:
    """Return the score of the images that a model draws from the seeds 0 to num - 1."""
    drawn = drawn_batches(f, card, chosen, range(num), batch=BATCH, device=device, on_drawn=told)
    with evaluating(f):
        return score(drawn)


def point_steps(steps: int) -> set[int]:
    """Return the steps at which a run is measured, the last one among them."""
    ratios = (FIRST_SHARE ** (1 - i / (POINTS - 1)) for i in range(POINTS))
    return {max(round(steps * ratio), 1) for ratio in ratios}


def train_one(bench: Bench, comparison: Comparison, run: Trained, score: Score) -> Comparison:
    """Return the comparison after a run is trained to its end, and measured on the way.

    A run that is begun is resumed. compare.json is written after each measurement, before the
    step is saved: so every step before the checkpoint of a resumed run has its measurement.
    """
    method, folder = comparison.methods[run.name], bench.out / run.folder
    preset, origins = resolved(bench.terms, method.preset, method, run.seed)
    resume, wanted = is_resumable(folder), point_steps(method.steps)

    def keep(point: Point) -> None:
        nonlocal comparison
        now = with_point(run_in(comparison, run.folder), point)
        comparison = with_run(comparison, now)
        write_comparison(bench.out, comparison)

    bench.note(f"{run.folder}: {method.steps:,} steps of {method.batch}, seed {run.seed}")
    try:
        with bench.watching(method.steps) as watcher:
            runs.train(
                preset, folder, watcher, teacher=own_teacher(bench.terms, preset), origins=origins,
                device=bench.terms.device, resume=resume, overwrite=is_run(folder) and not resume,
                observers=[measuring(score, bench.terms.asked.num, wanted, keep)],
            )  # fmt: skip
        state = "done"
    except DivergedError as error:
        bench.note(f"{run.folder} diverged: {error.what}")
        state = "diverged"
    ended = timed(run_in(comparison, run.folder), folder)
    comparison = with_run(comparison, ended.model_copy(update={"state": state}))
    write_comparison(bench.out, comparison)
    return comparison


def measuring(score: Score, num: int, steps: set[int], keep: Callable[[Point], None]) -> Observer:
    """Return an observer that measures the kept weights at some steps; its time is not counted."""

    def due(run: Run, news: News) -> bool:
        return news.diverged is None and news.step in steps

    def measure(run: Run, tools: Tools, news: News) -> None:
        f, preset, told = kept_model(run.state), run.preset, run.watcher.working
        with tools.clock.pause():
            values = {
                str(n): measured_value(
                    score, f, preset, plan(preset, n), num, run.device,
                    partial(told, f"images in {n} step{'s' * (n > 1)}"),
                )
                for n in STEPS
            }  # fmt: skip
            keep(Point(step=news.step, images=news.step * preset.train.batch, values=values))

    return due, measure


def timed(run: Trained, folder: Path) -> Trained:
    """Return a run whose points have the times that its log tells."""
    log = read_log(folder / "log.jsonl")
    spent = {point.step: time_spent(log, point.step)._asdict() for point in run.points}
    points = [point.model_copy(update=spent[point.step]) for point in run.points]
    return run.model_copy(update={"points": points})


def draw_comparison(bench: Bench, comparison: Comparison) -> None:
    """Write compare.png: the distances against time and images, and samples from the same noise."""
    done = [run for run in comparison.runs if run.state == "done"]
    ended = {run.name for run in done}
    curves: dict[str, list[list[Reached]]] = {n: [] for n in comparison.methods if n in ended}
    for run in done:
        values = [(p, [p.values[str(n)] for n in STEPS]) for p in run.points]
        curves[run.name].append([Reached(p.seconds or 0.0, p.images, each) for p, each in values])
    reference = comparison.teacher
    assert reference.value is not None
    label = f"teacher, {reference.calls} calls"
    shown: dict[str, Tensor] = {}
    _, teacher, device = bench.terms
    for name in curves:
        first = next(run for run in done if run.name == name)
        model = load_model(bench.out / first.folder, device=device)
        shown[name] = samples(model, plan(model.preset, STEPS[0]), device)
    shown[label] = samples(teacher, plan(teacher.preset), device)
    write_methods(
        bench.out / "compare.png", curves, (label, reference.value), shown, STEPS,
        comparison.metric,
    )  # fmt: skip


def samples(model: Model, chosen: Plan, device: str) -> Tensor:
    """Return images (SHOWN, C, H, W) of the first seeds, classes in turn."""
    classes = model.preset.model.num_classes
    labels = torch.arange(SHOWN) % classes if classes else None
    drawn = generate(model.f, model.preset, chosen, range(SHOWN), labels=labels, device=device)
    return torch.cat(list(drawn)).cpu()
