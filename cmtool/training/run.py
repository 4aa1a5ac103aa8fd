"""One training run: the folder, resume, the loop, and everything that happens every N steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from cmtool import __version__
from cmtool.core.methods import Objective
from cmtool.core.noise import Curriculum
from cmtool.core.precond import Preconditioned
from cmtool.core.samplers import check_levels
from cmtool.data.batches import BatchFn, batches
from cmtool.data.datasets import Dataset, load_dataset
from cmtool.data.images import png_bytes
from cmtool.data.survey import check_images
from cmtool.errors import InputError, ResourceError, Stopped, UserError
from cmtool.evaluation.during_training import Evaluation, build_evaluation, evaluate
from cmtool.formats import checkpoints as checkpoint_folder
from cmtool.formats.checkpoints import Score
from cmtool.models import Model
from cmtool.presets.build import build_curriculum, build_objective, build_sampler, noise_range
from cmtool.presets.schema import Card, Preset
from cmtool.sampling import evaluating, generate, plan
from cmtool.system import dist
from cmtool.system.devices import best_precision, is_out_of_memory
from cmtool.system.dist import ALONE, Group
from cmtool.system.files import write_atomic
from cmtool.training import checkpoint
from cmtool.training.events import Events, event_writer
from cmtool.training.fit import Diverged, StepInfo, fit
from cmtool.training.folder import (
    StatusWriter,
    clear_run,
    clear_temporary,
    is_resumable,
    launched_by,
    launcher,
    locked,
    prepare_folder,
    refuse_busy,
    status,
    trim_log,
    write_failure,
)
from cmtool.training.log import Clock, LogFile, Meter, Progress, Watcher, log_line, read_log
from cmtool.training.plots import picture, write_summary
from cmtool.training.report import write_run_report
from cmtool.training.start import (
    check_same,
    resume_state,
    split_as_before,
    with_precision,
    write_run_files,
)
from cmtool.training.state import TrainState, build_state, fit_settings
from cmtool.training.stop import Stop, stop_signals, stopped
from cmtool.training.utilisation import ideal_seconds

GRID_SEEDS = range(40)
GRID_COLUMNS = 10


def train(
    preset: Preset,
    out: Path,
    watcher: Watcher,
    *,
    teacher: Model | None = None,
    origins: Mapping[str, str] | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_seconds: float | None = None,
) -> Path:
    """Train in the run folder `out` and return the final checkpoint's folder.

    Under torchrun every process calls this, and the first one writes. Raises UserError for an
    existing run without `resume` or `overwrite` or with another preset, BusyError while another
    process holds the folder, InputError for data or a teacher that do not fit, DivergedError,
    ResourceError, and after saving Stopped (by a signal) or Paused (after `max_seconds`).
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite", "give one of them")
    with stop_signals(max_seconds) as stop, ExitStack() as stack:
        rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        is_sharded = preset.run.sharding == "fsdp"
        group = dist.join(rank, world_size, device, preset.run.timeout, sharded=is_sharded)
        stack.callback(dist.leave)
        out, launchers = group.tell(out), group.gather(launcher())
        preset, origins = with_precision(preset, origins or {}, group.tell(best_precision(device)))
        group.agreed(lambda: refuse_busy(out), "not busy")
        # torchrun starts workers anew when one failed; they go on with what the first ones began
        again = group.tell(launched_by(out, launchers) and is_resumable(out))
        resume, overwrite = resume or again, overwrite and not again
        if resume:
            asked = not again and origins.get("train.accumulate", "").startswith("--")
            preset, note = group.agreed(
                lambda: split_as_before(out, preset, world_size, asked=asked), "split"
            )
            if note is not None:
                watcher.note(note)
        parts = group.together(
            lambda: build_parts(preset, watcher, teacher, device, group, resume), "built"
        )
        state = parts.state

        def claim() -> None:
            prepare_folder(out, resume=resume, overwrite=overwrite, teacher=teacher)
            stack.enter_context(locked(out))
            if resume:
                check_same(out, preset, parts.data, teacher)

        group.agreed(claim, "claimed")
        microbatch = parts.microbatch
        if world_size == 1:  # several processes must agree on a step
            microbatch = stop.interruptible(microbatch)
        settings = fit_settings(preset, group)
        steps = fit(state, parts.objective, microbatch, parts.curriculum, settings)
        job = Job(preset, out, watcher, teacher, parts.evaluation, device, group)
        if not group.leads:
            with contact(group, state, preset):
                if resume:
                    resume_state(out, state, watcher, group)
                stop.at_once = False
                work(job, state, steps, stop, None)
            return out / "checkpoints" / f"step-{state.step:07d}"
        with (
            reported(out, watcher),
            status(out, launchers) as write_status,
            contact(group, state, preset),
        ):
            clear_temporary(out)
            if resume:
                resume_state(out, state, watcher, group)
                trim_log(out, state.step)
            else:
                clear_run(out)
            write_run_files(out, preset, origins, parts.data, teacher, world_size)
            write_status(step=state.step, steps=preset.train.steps)
            saved = state.step if resume else -1
            stop.at_once = False
            with Desk(job, write_status, state.step, saved) as desk:
                work(job, state, steps, stop, desk)
            write_status(state="done", step=state.step, seconds_left=0, exit_code=0)
    return out / "checkpoints" / f"step-{state.step:07d}"


@contextmanager
def reported(out: Path, watcher: Watcher) -> Iterator[None]:
    """Write report.html after the block, however it ends; a second Ctrl-C waits for nothing."""

    def report() -> None:
        try:
            write_run_report(out)
        except (OSError, UserError) as error:  # what ended the run is told all the same
            watcher.note(f"report.html cannot be written: {error}")

    try:
        yield
    except Exception:
        report()
        raise
    report()


class Parts(NamedTuple):
    """What a run is made of."""

    data: Dataset
    evaluation: Evaluation | None
    objective: Objective
    curriculum: Curriculum
    state: TrainState
    microbatch: BatchFn


def build_parts(
    preset: Preset,
    watcher: Watcher,
    teacher: Model | None,
    device: str,
    group: Group,
    resume: bool,
) -> Parts:
    """Return the parts of a run. Raises UserError or InputError for any that does not fit."""
    data = load_images(preset, watcher)
    check_fit(preset, data, teacher)
    chosen = plan(preset)  # what the sample grids will use
    build_sampler(chosen.sampler)
    check_levels(chosen.sigmas, preset.noise.sigma_min)
    evaluation = build_evaluation(preset, data, device)
    if preset.run.tensorboard:
        event_writer()  # or it says now that it is missing
    objective = build_objective(preset, teacher.f if teacher else None, device)
    curriculum = build_curriculum(preset)
    curriculum(0, preset.train.steps)
    if data.is_checked_first and not resume:
        watcher.note(f"decoding all {len(data):,} images once, to name bad ones before a step")
        check_images(data, preset.data.workers, group.rank, group.world_size)
    state = build_state(preset, teacher, device, group)
    microbatch = batches(
        data, batch=preset.train.batch, shards=preset.train.accumulate * group.world_size,
        seed=preset.train.seed, device=device, flip=preset.data.flip, workers=preset.data.workers,
        timeout=preset.data.timeout, rank=group.rank, world_size=group.world_size,
    )  # fmt: skip
    return Parts(data, evaluation, objective, curriculum, state, microbatch)


class Job(NamedTuple):
    """A run as every process knows it."""

    preset: Preset
    out: Path
    watcher: Watcher
    teacher: Model | None
    evaluation: Evaluation | None
    device: str
    group: Group


class Due(NamedTuple):
    """What happens after a step."""

    last: bool
    log_line: bool
    evaluation: bool
    checkpoint: bool
    samples: bool


def due(preset: Preset, step: int, end: Diverged | None) -> Due:
    """Return what happens after a step; after the last one, everything."""
    last, every = step == preset.train.steps, preset.run
    judged = every.eval_every > 0 and (last or step % every.eval_every == 0)
    return Due(
        last,
        log_line=last or end is not None or step % every.log_every == 0,
        evaluation=judged and end is None,
        checkpoint=last or step % every.checkpoint_every == 0,
        samples=last or step % every.sample_every == 0,
    )


class Desk:
    """The writing of the leading process: log, status, checkpoints, samples.

    A run goes on without all but the last checkpoint, and says so.
    """

    def __init__(self, job: Job, write_status: StatusWriter, step: int, saved: int) -> None:
        preset, self.job, self.write_status = job.preset, job, write_status
        about = {
            "kind": preset.kind,
            "preset": preset.model_dump(mode="json"),
            "cmtool": __version__,
        }
        self.saver = checkpoint.Saver(
            job.out / "checkpoints", about, keep=preset.run.keep, keep_best=preset.run.keep_best,
            note=job.watcher.note,
        )  # fmt: skip
        self.saver.saved = saved
        self.log_file = LogFile(job.out / "log.jsonl")
        self.events = Events(job.out / "tensorboard", step) if preset.run.tensorboard else None
        self.failing: set[str] = set()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # a second Ctrl-C waits for nothing
            self.saver.close()
            if self.events:
                with self.expendable("tensorboard/"):
                    self.events.close()

    @contextmanager
    def expendable(self, what: str) -> Iterator[None]:
        """Tell that something cannot be written, once until it works again, and go on."""
        try:
            yield
        except (OSError, ResourceError) as error:
            if what not in self.failing:
                self.job.watcher.note(f"{what} cannot be written: going on without it; {error}")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def log(self, line: dict[str, Any], seconds_left: float) -> None:
        """Write a line of log.jsonl, and what of it belongs into status.json."""
        with self.expendable("log.jsonl"):
            self.log_file.write(line)
        if self.events:
            with self.expendable("tensorboard/"):
                self.events.log(line)
        facts = {key: line[key] for key in ("step", "loss", "eval") if key in line}
        with self.expendable("status.json"):
            self.write_status(state="running", **facts, seconds_left=round(seconds_left))

    def samples(self, images: Tensor, step: int) -> None:
        """Write samples/step-NNNNNNN.png, the same seeds each time."""
        shown = picture(images, GRID_COLUMNS)
        path = self.job.out / "samples" / f"step-{step:07d}.png"
        with self.expendable("the sample grid"):
            write_atomic(path, png_bytes(shown))
        if self.events:
            with self.expendable("tensorboard/"):
                self.events.picture("samples", shown, step)

    def report(self) -> None:
        """Write report.html, as the run stands."""
        with self.expendable("report.html"):
            write_run_report(self.job.out)

    def summarise(self, panels: dict[str, Tensor]) -> None:
        """Write summary.png: the curve, and images of teacher and model from the same noise."""
        out = self.job.out
        with self.expendable("summary.png"):
            log, title = read_log(out / "log.jsonl"), self.job.preset.description
            write_summary(out / "summary.png", log, panels, title)


def saved_first(
    steps: Iterator[StepInfo], state: TrainState, meter: Meter, desk: Desk
) -> Iterator[StepInfo]:
    """Yield the steps; when images fail to come, or a signal ends the wait, save before the end."""
    first = state.step
    try:
        yield from steps
    except Diverged:
        raise
    except UserError as error:
        desk.saver.close()
        if state.step > max(first, desk.saver.saved):
            state.unlogged = meter.held(ALONE)
            desk.saver.save(state, wait=True)
        desk.write_status(step=state.step)
        if isinstance(error, Stopped) and state.step:
            number = error.exit_code - 128
            raise stopped(number, state.step, desk.saver.seconds, desk.job.out) from None
        raise


def work(
    job: Job, state: TrainState, steps: Iterator[StepInfo], stop: Stop, desk: Desk | None
) -> None:
    """Run the steps and what happens every N of them; only the leading process has a desk."""
    preset, group = job.preset, job.group
    ideal = ideal_seconds(preset, job.teacher, job.device, group.world_size) if desk else None
    clock, meter = Clock(state.step, preset), Meter(noise_range(preset), job.device)
    meter.go_on(state.unlogged, leads=group.leads)
    line: dict[str, Any] = {}
    is_first = True
    if desk and group.world_size == 1:
        steps = saved_first(steps, state, meter, desk)
    for info, end in until_divergence(steps):
        if desk and is_first:  # now the optimizer has its moments
            desk.saver.prepare(state)
            is_first = False
        now = due(preset, info.step, end)
        meter.add(info)
        clock.waited += info.waited
        if desk and info.skipped:
            job.watcher.note(f"step {info.step} skipped: {info.fault}")
        reason = 0 if now.last else group.any(stop.reason())
        verdict = None
        if now.evaluation and job.evaluation and not reason:
            with clock.pause():
                f = kept_model(state)
                verdict = evaluate(job.evaluation, f, preset, info.step, group, job.device)
        is_line = now.log_line or verdict is not None
        if is_line:
            line = log_line(info, meter, clock, group, job.device, ideal)
            line |= {"eval": verdict._asdict()} if verdict else {}
        if desk:
            desk.saver.poll()
            left = clock.seconds_left(info.step)
            if is_line:
                desk.log(line, left)
            job.watcher.progress(Progress(info.step, preset.train.steps, left, line, is_line))
        if end is not None:
            raise dumped(end, job)
        if now.checkpoint or reason or verdict:
            state.unlogged = meter.held(group)
        score = verdict and Score(verdict.metric, verdict.num, verdict.value)
        saves = now.checkpoint or reason > 0
        if score and not saves:
            best = partial(is_best, desk, score)
            saves = group.agreed(best, f"judged {info.step}")
        if saves:
            save(state, group, desk, score, wait=bool(now.last or reason))
        if now.samples and group.has_models and not reason:
            with clock.pause():
                images = grid_samples(kept_model(state), preset, job.device)
                if desk:
                    desk.samples(images, info.step)
                if desk and not now.last:
                    desk.report()
        if now.samples:
            group.meet(f"sampled {info.step}")
        if reason:
            if desk:
                desk.write_status(step=info.step)
            raise stopped(reason, info.step, desk.saver.seconds if desk else 0.0, job.out)
    if group.has_models:
        drawn = panels(job, state)
        if desk:
            desk.summarise(drawn)


def is_best(desk: Desk | None, score: Score) -> bool:
    """Tell whether a checkpoint with a score would be kept for it; the leading process knows."""
    if desk is None:
        return False
    desk.saver.finish(final=False)  # it may be about to write what best.json names
    return checkpoint_folder.is_best(desk.saver.folder, score, desk.saver.keep_best)


def save(
    state: TrainState,
    group: Group,
    desk: Desk | None,
    score: Score | None,
    *,
    wait: bool,
) -> None:
    """Save a checkpoint; a process without a desk gives the parts of the models that it holds.

    For a slow disk the others wait here: in a collective they would give the leading one up.
    """
    if desk:
        desk.saver.finish(final=False)
    if group.mesh is not None:
        group.meet(f"saves {state.step}")
    if desk:
        desk.saver.save(state, wait=wait, score=score)
    elif group.mesh is not None:
        checkpoint.take_part(state)
    group.meet(f"saved {state.step}")


def until_divergence(steps: Iterator[StepInfo]) -> Iterator[tuple[StepInfo, Diverged | None]]:
    """Yield each step's news, and with that of a run's divergence the error that ends it."""
    try:
        for info in steps:
            yield info, None
    except Diverged as error:
        yield error.info, error


def dumped(error: Diverged, job: Job) -> Diverged:
    """Return the error after writing down the batch it happened with, and where that is."""
    try:
        folder = write_failure(job.out, error, job.preset, job.group)
    except (OSError, ResourceError, SafetensorError) as reason:
        error.hint += f"; what this step saw cannot be written: {reason}"
    else:
        error.hint += f", and what this step saw is in {folder}"
    return error


@contextmanager
def contact(group: Group, state: TrainState, preset: Preset) -> Iterator[None]:
    """When memory or another process is gone, say so instead of what torch says."""
    with dist.contact(group, lambda: state.step):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, preset, group, state.step) from None


def out_of_memory(error: Exception, preset: Preset, group: Group, step: int) -> ResourceError:
    """Return the error to show for one that means there is no more memory."""
    t = preset.train
    parts = range(t.accumulate + 1, t.batch + 1)
    more = next((n for n in parts if t.batch % (n * group.world_size) == 0), None)
    remedies = [
        f"split the batch: --accumulate {more}" if more is not None else "lower train.batch",
        *([] if t.checkpoint_activations else ["--set train.checkpoint_activations=true"]),
        *(["--set run.sharding=fsdp"] if group.world_size > 1 and group.mesh is None else []),
    ]
    reason = str(error).splitlines()[0] if str(error) else "MemoryError"
    return ResourceError(
        f"out of memory after step {step}, with {t.batch // t.accumulate // group.world_size}"
        f" images at a time: {reason[:200]}",
        f"{', or '.join(remedies)}; the last checkpoint is intact",
    )


def load_images(preset: Preset, watcher: Watcher) -> Dataset:
    """Return the preset's data set; for a model that knows no classes without its labels."""
    data = load_dataset(
        preset.data.path, size=preset.model.image_size, channels=preset.model.channels,
        fit=preset.data.fit,
    )  # fmt: skip
    if data.labels is None or preset.model.num_classes:
        return data
    watcher.note(
        f"the {data.num_classes} classes of {data.name} are left aside: the model has none"
    )
    return replace(data, labels=None, num_classes=0)


def check_fit(preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise InputError unless data, preset and teacher agree on size, channels and classes."""
    if teacher is not None and teacher.kind != "teacher":
        raise InputError(
            f"{teacher.source} is a consistency model, not a teacher",
            "give a model trained with an edm preset",
        )
    who = "the model" if teacher is None else f"the teacher {teacher.source}"
    channels, h, w = preset.model.channels, *preset.model.image_size
    c, dh, dw = data.images.shape[1:]
    if (c, dh, dw) != (channels, h, w):
        raise InputError(
            f"{data.name} has images of {dw}x{dh} with {c} channels, {who} wants {w}x{h} with"
            f" {channels}",
            f"resize the images, or --set model.image_size=[{dh},{dw}] --set model.channels={c}"
            if teacher is None
            else "bring the images to the teacher's size and channels, or give another teacher",
        )
    if preset.model.num_classes != data.num_classes:
        raise InputError(
            f"{data.name} has {data.num_classes} classes, {who} {preset.model.num_classes}",
            f"--set model.num_classes={data.num_classes}"
            if teacher is None
            else "give the classes the teacher was trained with, or another teacher",
        )


def grid_samples(
    model: Preconditioned, preset: Card, device: str, steps: int | None = None
) -> Tensor:
    """Return the run's fixed images: seeds 0 to 39, classes in turn."""
    labels = None
    if preset.model.num_classes:
        labels = torch.arange(len(GRID_SEEDS)) % preset.model.num_classes
    chosen = plan(preset, steps=steps)
    with evaluating(model):
        images = torch.cat(
            list(generate(model, preset, chosen, GRID_SEEDS, labels=labels, device=device))
        )
    return images.cpu()


def kept_model(state: TrainState) -> Preconditioned:
    """Return what is sampled from: the first weights EMA, else the student."""
    return next(iter(state.emas.values())).model if state.emas else state.student


def panels(job: Job, state: TrainState) -> dict[str, Tensor]:
    """Return the fixed images of the teacher, if there is one, and of what is kept."""
    preset, teacher, device = job.preset, job.teacher, job.device
    name = "samples" if preset.kind == "teacher" else f"{preset.sample.steps} step"
    drawn = {"teacher": grid_samples(teacher.f, teacher.preset, device)} if teacher else {}
    return {**drawn, name: grid_samples(kept_model(state), preset, device)}
