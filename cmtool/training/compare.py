"""A comparison of methods: the same images, network, seeds and time of training for each preset."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cmtool import __version__
from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import DATASETS, Dataset, load_dataset
from cmtool.errors import DivergedError, Stopped, UserError, nearest
from cmtool.evaluation.during_training import BATCH, Score, score_of
from cmtool.evaluation.features import PROTOCOLS
from cmtool.evaluation.measure import drawn_batches
from cmtool.evaluation.metrics import METRICS
from cmtool.evaluation.sets import OnProgress
from cmtool.models import Model, load_model
from cmtool.presets.build import needs_teacher
from cmtool.presets.schema import Card, Preset
from cmtool.presets.toml import Resolved, is_method_preset, load_preset, preset_names, resolve
from cmtool.sampling import OnDrawn, Plan, evaluating, generate, plan
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
from cmtool.training.cost import step_times
from cmtool.training.folder import clear_run, is_resumable, is_run
from cmtool.training.history import time_spent
from cmtool.training.lock import locked
from cmtool.training.log import Watcher, read_log
from cmtool.training.observers import News, Observer, Tools, kept_model
from cmtool.training.planning import Layers, memory_layers, scaled, teacher_layers
from cmtool.training.plots import Reached, write_methods
from cmtool.training.start import Run, check_components, with_teacher

METRIC = "fid"
"""The metric of METRICS that is measured, under its name by the protocol."""
POINTS = 6
FIRST_SHARE = 0.05
"""Part of a run at its first point; the others follow evenly in the logarithm."""
TIMED_SHARE, ROUNDS, LEAST_LAPS = 0.01, 2, 3
"""Part of the time of a run for which its steps are timed in a round; rounds; steps in a round."""
LOG_LINES = 50
SHOWN = 16
"""Images of a method in the picture."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs of a comparison share, and who is told of them.

    `watching` makes the watcher of a run from its number of steps, `showing` the one of other
    work.
    """

    out: Path
    asked: Asked
    teacher: Model
    device: str
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
    if bench.out.exists() and not bench.out.is_dir():
        raise no_comparison(bench.out)
    bench.out.mkdir(parents=True, exist_ok=True)
    with locked(bench.out, bench.note), resumable():
        comparison = found_or_begun(bench, overwrite=overwrite)
        score = build_score(bench, comparison)
        for waiting in comparison.runs:
            if run_in(comparison, waiting.folder).state == "left":
                comparison = train_one(bench, comparison, waiting, score)
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


def found_or_begun(bench: Bench, *, overwrite: bool) -> Comparison:
    """Return the comparison in the folder, else a new one: fitted to the time, with its teacher.

    Raises UserError for one that was asked for something else, InputError for a folder that holds
    none.
    """
    out, asked = bench.out, bench.asked
    has_file = (out / FILE).exists()
    if not has_file and any(path.name != ".lock" for path in out.iterdir()):
        raise no_comparison(out)
    stored = read_comparison(out) if has_file and not overwrite else None
    if stored is not None:
        check_asked(stored.asked, asked, out)
        if stored.teacher.sha256 != bench.teacher.sha256:
            what = f"the comparison in {out} has another teacher than {bench.teacher.source} is now"
            raise UserError(what, "give another --out, or --overwrite")
        return stored
    if Path(bench.teacher.source).resolve().is_relative_to(out.resolve()):
        raise UserError(f"the teacher is in {out}", "give another --out")
    comparison = begun(bench)
    for run in comparison.runs:
        if is_run(out / run.folder):
            with locked(out / run.folder):
                clear_run(out / run.folder)
    write_comparison(out, comparison)
    return comparison


def begun(bench: Bench) -> Comparison:
    """Return a new comparison: the steps that fill the time, and the teacher's distance."""
    asked, teacher, device = bench.asked, bench.teacher, bench.device
    names = {run_name(preset): preset for preset in asked.presets}
    first = {name: resolved(bench, preset).preset for name, preset in names.items()}
    for preset in first.values():
        check_components(preset)
    shared = next(iter(first.values()))
    protocol = picked_protocol(asked.protocol, shared)
    score = score_of(METRIC, protocol, images_of(shared), device)  # what it lacks, it says now
    laps: Mapping[str, float] = {}
    if "train.steps" not in asked.values:
        bench.note(f"timing {len(first)} methods")
        laps = lap_times(first, teacher, device, asked.seconds)
    methods = {}
    for name, preset in first.items():
        steps = int(asked.seconds / laps[name]) if name in laps else preset.train.steps
        methods[name] = fitted(names[name], preset, max(steps, 1), laps.get(name))
        bench.note(f"{name}: {steps:,} steps of {preset.train.batch}")
    with bench.showing() as progress:
        told = partial(progress, "drawn by the teacher")
        chosen = plan(teacher.preset)
        value = distance(score, teacher.f, teacher.preset, chosen, asked.num, device, told)
    reference = Reference(
        source=teacher.source, sha256=teacher.sha256, calls=chosen.evaluations, value=value
    )
    return Comparison(
        asked=asked, metric=METRICS[METRIC].names.get(protocol, METRIC), protocol=protocol,
        data=shared.data.path, teacher=reference, methods=methods, runs=planned_runs(asked),
        versions={"cmtool": __version__, "torch": torch.__version__,
                  "python": platform.python_version()},
        device=device,
    )  # fmt: skip


def fitted(name: str, preset: Preset, steps: int, lap: float | None) -> Fitted:
    """Return a preset as compare.json tells it."""
    return Fitted(
        preset=name, method=preset.loss.method.name, steps=steps, batch=preset.train.batch,
        accumulate=preset.train.accumulate, seconds_a_step=lap,
        calls={str(n): plan(preset, n).evaluations for n in STEPS},
    )  # fmt: skip


def resolved(bench: Bench, name: str, plan: Fitted | None = None, seed: int = 0) -> Resolved:
    """Return a preset on the shared images, with the teacher's network and the user's values.

    `plan` has its steps: what the preset counts in steps or images keeps its share of the run.
    """
    teacher, values = bench.teacher, bench.asked.values
    layers = {**(teacher_layers(name, teacher) if is_method_preset(name) else {})}
    layers |= shared_layers(bench)

    def made() -> Resolved:
        own = {"--set": values, "--seeds": {"train.seed": seed}}
        return with_teacher(resolve(name, {**layers, **own}), teacher)

    preset = made().preset
    if not preset.data.path:
        raise UserError(f"preset {name} names no images, nor does the teacher", "add --data DIR")
    if plan is None:
        layers |= memory_layers(preset, own_teacher(bench, preset), bench.device)
        return made()
    steps = plan.steps
    counts = scaled(load_preset(name), steps, steps * plan.batch)
    rare = {"run.sample_every": steps, "run.log_every": max(steps // LOG_LINES, 1)}
    layers["equal time"] = {**counts, **rare, "train.accumulate": plan.accumulate}
    return made()


def shared_layers(bench: Bench) -> Layers:
    """Return what is the same for all presets: images and batch, the teacher's own if it has any.

    Else they are those of the first preset.
    """
    asked, theirs = bench.asked, bench.teacher.preset
    own = theirs if isinstance(theirs, Preset) else load_preset(asked.presets[0])
    data, is_theirs = own.data, asked.data in (None, own.data.path)
    return {
        "the comparison": {
            "data.path": data.path if asked.data is None else asked.data,
            "data.fit": data.fit if is_theirs or data.fit != "exact" else "adm",
            "data.background": data.background,
            "data.flip": data.flip,
            "train.batch": own.train.batch,
        }
    }


def own_teacher(bench: Bench, preset: Preset) -> Model | None:
    """Return the teacher for a preset that needs one."""
    return bench.teacher if needs_teacher(preset) else None


def lap_times(
    presets: Mapping[str, Preset], teacher: Model, device: str, seconds: float
) -> dict[str, float]:
    """Return the seconds that a step of each preset takes: the median of some.

    The presets are timed in turns, so that a while in which the machine is busy is in all of them.
    """
    laps: dict[str, list[float]] = {name: [] for name in presets}
    for _ in range(ROUNDS):
        for name, preset in presets.items():
            parts = preset.train.accumulate
            own = teacher if needs_teacher(preset) else None
            each = step_times(preset, own, device, preset.train.batch // parts)
            next(each)
            end, least = time.monotonic() + seconds * TIMED_SHARE, len(laps[name]) + LEAST_LAPS
            while time.monotonic() < end or len(laps[name]) < least:
                laps[name].append(next(each) * parts)
    return {name: statistics.median(found) for name, found in laps.items()}


def picked_protocol(asked: str | None, preset: Preset) -> str:
    """Return the protocol: the user's, else digits for the bundled digits and pixels for others.

    Raises UserError for one that is unknown, or is not for these images.
    """
    shape = (preset.model.channels, *preset.model.image_size)
    good = [name for name, row in PROTOCOLS.items() if row.metric in (None, METRIC)]
    good = [name for name in good if PROTOCOLS[name].shape in (None, shape)]
    if asked is None:
        is_bundled = preset.data.path.partition(":")[0] in DATASETS
        return "digits" if is_bundled and "digits" in good else "pixels"
    if asked not in good:
        what = f"--protocol {asked!r} for images of {shape[2]}x{shape[1]}"
        raise UserError(what, nearest(asked, good))
    return asked


def images_of(preset: Preset) -> Dataset:
    """Return the images that all runs learn from, and are measured against."""
    return load_dataset(
        preset.data.path, size=preset.model.image_size, channels=preset.model.channels,
        fit=preset.data.fit, background=preset.data.background,
    )  # fmt: skip


def build_score(bench: Bench, comparison: Comparison) -> Score:
    """Return the score of a comparison."""
    data = images_of(resolved(bench, bench.asked.presets[0]).preset)
    return score_of(METRIC, comparison.protocol, data, bench.device)


def distance(
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
    step is saved: so no step that a resumed run skips is missing.
    """
    plan, folder = comparison.methods[run.name], bench.out / run.folder
    preset, origins = resolved(bench, plan.preset, plan, run.seed)
    resume = is_resumable(folder)

    def keep(point: Point) -> None:
        nonlocal comparison
        now = with_point(run_in(comparison, run.folder), point)
        comparison = with_run(comparison, now)
        write_comparison(bench.out, comparison)

    bench.note(f"{run.folder}: {plan.steps:,} steps of {plan.batch}, seed {run.seed}")
    try:
        with bench.watching(plan.steps) as watcher:
            runs.train(
                preset, folder, watcher, teacher=own_teacher(bench, preset), origins=origins,
                device=bench.device, resume=resume, overwrite=is_run(folder) and not resume,
                observers=[measuring(score, bench.asked.num, point_steps(plan.steps), keep)],
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
    """Return an observer that measures the kept weights at some steps, and leaves no time out."""

    def due(run: Run, news: News) -> bool:
        return news.diverged is None and news.step in steps

    def measure(run: Run, tools: Tools, news: News) -> None:
        f, preset, told = kept_model(run.state), run.preset, run.watcher.working
        with tools.clock.pause():
            values = {
                str(n): distance(
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
    curves: dict[str, list[list[Reached]]] = {name: [] for name in comparison.methods}
    for run in done:
        values = [(p, [p.values[str(n)] for n in STEPS]) for p in run.points]
        curves[run.name].append([Reached(p.seconds or 0.0, p.images, each) for p, each in values])
    reference = comparison.teacher
    label = f"teacher, {reference.calls} calls"
    shown: dict[str, Tensor] = {}
    for name in comparison.methods:
        first = next((run for run in done if run.name == name), None)
        if first is not None:
            model = load_model(bench.out / first.folder, device=bench.device)
            shown[name] = samples(model, plan(model.preset, STEPS[0]), bench.device)
    shown[label] = samples(bench.teacher, plan(bench.teacher.preset), bench.device)
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


def teacher_of(out: Path) -> str | None:
    """Return the teacher of the comparison in a folder, None if there is no comparison."""
    stored = read_comparison(out)
    return stored.teacher.source if stored else None
