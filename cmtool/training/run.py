"""One training run: how it starts, its loop, and how it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cmtool.errors import ResourceError, Stopped, UserError
from cmtool.models import Model
from cmtool.presets.build import noise_range
from cmtool.presets.schema import Preset
from cmtool.system import dist
from cmtool.system.determinism import deterministic
from cmtool.system.devices import timed_convolutions
from cmtool.system.dist import ALONE, Group
from cmtool.system.files import check_temporary, sync
from cmtool.training.checkpoint import Saver, about_model, load_newest
from cmtool.training.compiling import with_compile_decided
from cmtool.training.fit import Diverged, StepInfo, fit
from cmtool.training.folder import clear_leftovers, clear_run, keep_status, prepare_folder
from cmtool.training.lock import locked, tell_killed
from cmtool.training.log import Clock, Meter, Watcher, trim_log
from cmtool.training.observers import OBSERVERS, News, Observer, RunWriter, Tools, final_images
from cmtool.training.report import write_run_report
from cmtool.training.same import check_same, data_facts, start_facts
from cmtool.training.start import Run, Start, decide_start, set_up, write_record
from cmtool.training.state import fit_settings
from cmtool.training.stop import Stop, explained, stop_signals, stopped, with_dump
from cmtool.training.utilisation import ideal_seconds


def train(
    preset: Preset,
    out: Path,
    watcher: Watcher,
    *,
    teacher: Model | None = None,
    init: Model | None = None,
    origins: Mapping[str, str] | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_seconds: float | None = None,
    observers: Sequence[Observer] = (),
) -> Path:
    """Train in the run folder `out` and return the final checkpoint's folder.

    A new run starts from the weights of `init`, as far as they fit, else from the teacher's.
    `observers` come before those that each run has: what they see of a step is done before it is
    saved.

    Under torchrun every process calls this, and the first one writes. Raises UserError for
    processes that differ, and for an existing run without `resume` or `overwrite` or with another
    preset; BusyError while another process holds the folder, InputError for data or a teacher that
    do not fit, DivergedError, ResourceError, and after saving Stopped (by a signal) or Paused
    (after `max_seconds`).
    """
    check_temporary()
    facts = start_facts(preset, teacher, init, device, resume=resume, overwrite=overwrite)
    with (
        stop_signals(max_seconds) as stop,
        deterministic(device, wanted=preset.train.deterministic),
        joined(preset, device, facts) as group,
        ExitStack() as claim,
    ):
        start = decide_start(
            preset, out, origins or {}, device, group, resume=resume, overwrite=overwrite
        )
        start = with_compile_decided(start, teacher, device, group)
        for note in start.notes:
            watcher.note(note)
        exact = start.preset.train.deterministic
        claim.enter_context(timed_convolutions(device, wanted=not exact))
        run = group.together(lambda: set_up(start, watcher, teacher, init, device, group), "built")
        group.alike(lambda: data_facts(run.data, run.held), "data")
        group.agreed(lambda: claim.enter_context(claimed(run, start)), "claimed")
        if group.leads:
            lead(run, start, stop, observers)
        else:
            assist(run, start, stop, observers)
    return run.out / "checkpoints" / f"step-{run.state.step:07d}"


@contextmanager
def joined(preset: Preset, device: str, facts: Mapping[str, object]) -> Iterator[Group]:
    """Join the processes that torchrun started, if it did, and leave them after the block.

    Raises UserError if they are not all about to do the same.
    """
    rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    is_sharded = preset.run.sharding == "fsdp"
    group = dist.join(rank, world_size, device, preset.run.timeout, sharded=is_sharded, facts=facts)
    try:
        yield group
    finally:
        dist.leave()


@contextmanager
def claimed(run: Run, start: Start) -> Iterator[None]:
    """Make the run folder and hold its lock. Raises UserError for one that must be left alone."""
    models = [model for model in (run.teacher, run.init) if model is not None]
    prepare_folder(run.out, resume=start.resume, overwrite=start.overwrite, models=models)
    with locked(run.out, run.watcher.note):
        if not sync(run.out):
            lacks = f"{run.out} is on a file system that cannot sync folders"
            run.watcher.note(f"{lacks}: after a power cut the newest checkpoint may be missing")
        if start.resume:
            check_same(run)
        yield


def lead(run: Run, start: Start, stop: Stop, observers: Sequence[Observer]) -> None:
    """Train as the leading process, which writes the run's files."""
    out, state = run.out, run.state
    with reported(out, run.watcher), keep_status(out, start.launchers) as write, explained(run):
        clear_leftovers(out)
        if start.resume:
            load_newest(out / "checkpoints", state, run.group, run.watcher.note)
            trim_log(out, state.step)
        else:
            clear_run(out)
        write_record(run, start)
        write(step=state.step, steps=run.preset.train.steps)
        with make_saver(run) as saver, RunWriter(run, write) as writer:
            writer.training_images()
            follow(run, stop, saver, writer, observers)
        write(state="done", step=state.step, seconds_left=0, exit_code=0)


def assist(run: Run, start: Start, stop: Stop, observers: Sequence[Observer]) -> None:
    """Train as one of the other processes, which write nothing while the leading one lives."""
    try:
        with explained(run):
            if start.resume:
                load_newest(run.out / "checkpoints", run.state, run.group, run.watcher.note)
            follow(run, stop, None, None, observers)
    except ResourceError as error:
        tell_killed(run.out, error)
        raise


@contextmanager
def reported(out: Path, watcher: Watcher) -> Iterator[None]:
    """Write report.html after the block, however it ends; a second Ctrl-C waits for nothing."""

    def report() -> None:
        try:
            write_run_report(out)
        except (OSError, UserError) as error:  # the error that ended the run is still shown
            watcher.note(f"report.html cannot be written: {error}")

    try:
        yield
    except Exception:
        report()
        raise
    report()


def make_saver(run: Run) -> Saver:
    """Return what writes the run's checkpoints."""
    preset = run.preset
    about = about_model(preset, run.data.class_names)
    folder, keep = run.out / "checkpoints", preset.run.keep
    return Saver(folder, about, keep=keep, keep_best=preset.run.keep_best, note=run.watcher.note)


def follow(
    run: Run,
    stop: Stop,
    saver: Saver | None,
    writer: RunWriter | None,
    observers: Sequence[Observer],
) -> None:
    """Take the steps, and let the observers do what is due after each.

    Only the leading process has a saver and a writer. Raises Diverged, Stopped or Paused.
    """
    preset, group = run.preset, run.group
    stop.at_once = False
    ideal = ideal_seconds(preset, run.teacher, run.device, group.world_size) if writer else None
    clock, meter = Clock(run.state.step, preset, ideal), Meter(noise_range(preset), run.device)
    meter.restore(run.state.unlogged, leads=group.leads)
    tools = Tools(meter, clock, saver, writer, line={})
    for info, diverged in finished_steps(run, tools, stop):
        is_last = info.step == preset.train.steps
        news = News(info, is_last, diverged, 0 if is_last else group.any(stop.reason()))
        for due, observe in (*observers, *OBSERVERS):
            if due(run, news):
                observe(run, tools, news)
        if diverged is not None:
            raise with_dump(diverged, run)
        if news.stop_reason:
            if writer:
                writer.write_status(step=info.step)
            raise stopped(news.stop_reason, info.step, saver.seconds if saver else 0.0, run.out)
    if group.has_models:
        images = final_images(run, tools.images)
        if writer:
            writer.summary(images)


def finished_steps(
    run: Run, tools: Tools, stop: Stop
) -> Iterator[tuple[StepInfo, Diverged | None]]:
    """Yield the news of each step, and with the last of a run that diverges the error that ends it.

    A process on its own may be stopped while it waits for images. If a signal ends the wait, or
    images fail to come, it saves before the end.
    """
    state, first, saver, writer = run.state, run.state.step, tools.saver, tools.writer
    settings, alone = fit_settings(run.preset, run.group), run.group.world_size == 1
    microbatch = stop.interruptible(run.microbatch) if alone else run.microbatch
    try:
        for info in fit(state, run.objective, microbatch, run.curriculum, settings, run.before):
            yield info, None
    except Diverged as error:
        yield error.info, error
    except UserError as error:
        if alone and saver and writer:
            saver.close()
            if state.step > max(first, saver.saved):
                state.unlogged = tools.meter.sums(ALONE)
                saver.save(state, wait=True)
            writer.write_status(step=state.step)
            if isinstance(error, Stopped) and state.step:
                number = error.exit_code - 128
                raise stopped(number, state.step, saver.seconds, run.out) from None
        raise
