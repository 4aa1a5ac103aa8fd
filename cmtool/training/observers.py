"""What a run does between two steps: a table of observers, each with the steps at which it is due.

A new one is a function, and one line in the table at the end. An observer may call all processes
together. So each process goes through the same table, and whether an observer that does so is due
depends on what is the same in all of them. Only the leading process has a saver and a writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmtool.core.methods import Models
from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import examples
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError, ResourceError
from cmtool.evaluation.during_training import Verdict, evaluate
from cmtool.formats.checkpoints import Score
from cmtool.presets.schema import Card
from cmtool.presets.toml import flat
from cmtool.sampling import generate, plan
from cmtool.system.compiled import evaluating
from cmtool.system.files import write_atomic
from cmtool.training.averages import FOLDER, average_tensors, store
from cmtool.training.checkpoint import Saver, about_model, take_part
from cmtool.training.fit import Diverged, StepInfo
from cmtool.training.folder import StatusWriter
from cmtool.training.guide import about, short
from cmtool.training.log import Clock, LogFile, Meter, Progress, log_line, scalars
from cmtool.training.plots import picture, write_summary
from cmtool.training.report import TRAINING_IMAGES, write_run_report
from cmtool.training.start import Run
from cmtool.training.state import TrainState
from cmtool.training.trackers import TRACKERS, Told, Tracker, told_as_ours, trackers_of

COLUMNS = 10


@dataclass
class News:
    """What is known of a finished step; all but `info` is the same in every process.

    After it, `diverged` ends the run, or a `stop_reason` other than 0, which `Stop.reason` gave.
    """

    info: StepInfo
    is_last: bool
    diverged: Diverged | None
    stop_reason: int
    verdict: Verdict | None = None
    is_logged: bool = False

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.info.step

    def is_every(self, steps: int) -> bool:
        """Tell whether `steps` divides the step, or it is the last one; never for 0."""
        return steps > 0 and (self.is_last or self.step % steps == 0)


class RunWriter:
    """Writes what people read of a run. A run goes on without any of it, and says so."""

    def __init__(self, run: Run, write_status: StatusWriter) -> None:
        self.run, self.write_status = run, write_status
        self.log_file = LogFile(run.out / "log.jsonl")
        self.trackers: dict[str, Tracker] = {}
        self.failing: set[str] = set()
        self.examples: Tensor | None = None

    def __enter__(self) -> RunWriter:
        run = self.run
        told = Told(run.out, dict(flat(run.preset.model_dump())), run.state.step)
        for name in trackers_of(run.preset):
            with self.expendable(name), told_as_ours(name):
                self.trackers[name] = TRACKERS[name][0](told)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # a second Ctrl-C, which is no Exception, waits for nothing
        if kind is None or issubclass(kind, Exception):
            self.show(lambda tracker: tracker.close())

    def show(self, action: Callable[[Tracker], None]) -> None:
        """Let each tracker show something."""
        for name, tracker in self.trackers.items():
            with self.expendable(name), told_as_ours(name):
                action(tracker)

    @contextmanager
    def expendable(self, what: str) -> Iterator[None]:
        """Go on if something cannot be written; say so once until it can be written again."""
        try:
            yield
        except (OSError, InputError, ResourceError) as error:
            if what not in self.failing:
                self.run.watcher.note(f"{what} cannot be written: going on without it; {error}")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def log(self, line: dict[str, Any], seconds_left: float) -> None:
        """Write a line of log.jsonl, and its main figures to status.json."""
        with self.expendable("log.jsonl"):
            self.log_file.write(line)
        values = dict(scalars(line))
        self.show(lambda tracker: tracker.scalars(values, line["step"]))
        facts = {key: line[key] for key in ("step", "loss", "eval") if key in line}
        with self.expendable("status.json"):
            self.write_status(state="running", **facts, seconds_left=round(seconds_left))

    def samples(self, images: Tensor, step: int) -> None:
        """Write samples/step-NNNNNNN.png."""
        shown = picture(images, COLUMNS)
        path = self.run.out / "samples" / f"step-{step:07d}.png"
        with self.expendable("the sample grid"):
            write_atomic(path, png_bytes(shown))
        self.show(lambda tracker: tracker.picture("samples", shown, step))

    def training_images(self) -> None:
        """Write training-images.png: as many images as a sample grid has, of the same classes."""
        with self.expendable(TRAINING_IMAGES):
            self.examples = examples(self.run.data, self.run.preset.run.sample_grid)
            shown = png_bytes(picture(self.examples, COLUMNS))
            write_atomic(self.run.out / TRAINING_IMAGES, shown)

    def report(self) -> None:
        """Write report.html, as the run stands."""
        with self.expendable("report.html"):
            write_run_report(self.run.out)

    def summary(self, panels: dict[str, Tensor]) -> None:
        """Write summary.png: the curve, training images, and the images of the panels by title."""
        run, out = self.run, self.run.out
        origin = run.teacher or run.init
        source = origin.source if origin else None
        title = "\n".join(about(run.preset, source, run.data.name))
        if self.examples is not None:
            panels = {"training images": self.examples, **panels}
        with self.expendable("summary.png"):
            write_summary(out / "summary.png", self.log_file.lines(), panels, title)


@dataclass
class Tools:
    """What observers work with; `line` is the last log line, `images` the last sample grid's."""

    meter: Meter
    clock: Clock
    saver: Saver | None
    writer: RunWriter | None
    line: dict[str, Any]
    images: Tensor | None = None


def always(run: Run, news: News) -> bool:
    """At every step."""
    return True


def measure(run: Run, tools: Tools, news: News) -> None:
    """Add the step to the sums that the next log line shows."""
    tools.meter.add(news.info)
    tools.clock.waited += news.info.waited


def note_skipped(run: Run, tools: Tools, news: News) -> None:
    """Tell the watcher why a step was skipped."""
    run.watcher.note(f"step {news.step} skipped: {news.info.fault}")


def tend_saver(run: Run, tools: Tools, news: News) -> None:
    """Prepare the saver once the optimizer has its moments; note what went wrong with a write."""
    if tools.saver:
        if not tools.saver.is_prepared:
            tools.saver.prepare(run.state)
        tools.saver.poll()


def evaluates(run: Run, news: News) -> bool:
    """Every run.eval_every steps, if the run goes on."""
    ends = news.stop_reason or news.diverged
    return not ends and news.is_every(run.preset.run.eval_every)


def evaluate_model(run: Run, tools: Tools, news: News) -> None:
    """Evaluate the kept model."""
    assert run.evaluation is not None
    with tools.clock.pause():
        news.verdict = evaluate(
            run.evaluation, kept_models(run.state), news.step, run.group,
            on_drawn=partial(run.watcher.working, "images to evaluate"),
        )  # fmt: skip


def logs(run: Run, news: News) -> bool:
    """Every run.log_every steps, at an evaluation, and where the run diverges."""
    is_due = news.is_every(run.preset.run.log_every)
    return is_due or news.diverged is not None or news.verdict is not None


def log(run: Run, tools: Tools, news: News) -> None:
    """Make the log line, together; the leading process writes it."""
    tools.line = log_line(news.info, tools.meter, tools.clock, run.group, run.device)
    tools.line |= {"eval": news.verdict._asdict()} if news.verdict else {}
    news.is_logged = True
    if tools.writer:
        tools.writer.log(tools.line, tools.clock.seconds_left(news.step))


def show_progress(run: Run, tools: Tools, news: News) -> None:
    """Show the watcher the step and the last log line."""
    if run.group.leads:
        steps, left = run.preset.train.steps, tools.clock.seconds_left(news.step)
        run.watcher.progress(Progress(news.step, steps, left, tools.line, news.is_logged))


def must_save(run: Run, news: News) -> bool:
    """Every run.checkpoint_every steps, and before the run stops."""
    return news.stop_reason > 0 or news.is_every(run.preset.run.checkpoint_every)


def may_save(run: Run, news: News) -> bool:
    """Where a checkpoint must be saved, and at an evaluation."""
    return news.diverged is None and (must_save(run, news) or news.verdict is not None)


def save(run: Run, tools: Tools, news: News) -> None:
    """Save a checkpoint; one that need not be saved only if it is among the best.

    Other processes give the parts of the models that they hold, and wait for a slow disk here,
    since in a collective they would time out.
    """
    state, group, saver, verdict = run.state, run.group, tools.saver, news.verdict
    state.unlogged = tools.meter.sums(group)
    score = verdict and Score(verdict.metric, verdict.num, verdict.value)
    if not must_save(run, news) and not group.agreed(
        lambda: bool(saver and score and saver.would_keep(score)), f"judged {news.step}"
    ):
        return
    if saver:
        with tools.clock.pause():
            saver.finish(final=False)
    if group.mesh is not None:
        group.meet(f"saves {news.step}")
    if saver:
        with tools.clock.pause():
            saver.save(state, wait=news.is_last or news.stop_reason > 0, score=score)
    elif group.mesh is not None:
        take_part(state)
    group.meet(f"saved {news.step}")


def stores_averages(run: Run, news: News) -> bool:
    """Every run.ema_every steps."""
    return news.diverged is None and news.is_every(run.preset.run.ema_every)


def store_averages(run: Run, tools: Tools, news: News) -> None:
    """Store the averages with powers as profiles, of which others can be made after the run."""
    if run.group.leads or run.group.mesh is not None:
        averages = average_tensors(run.state)
        if tools.writer:
            with tools.clock.pause(), tools.writer.expendable(f"{FOLDER}/"):
                about = about_model(run.preset, run.data.class_names)
                store(run.out, news.step, averages, about)
    run.group.meet(f"averaged {news.step}")


def samples(run: Run, news: News) -> bool:
    """Every run.sample_every steps."""
    return news.diverged is None and news.is_every(run.preset.run.sample_every)


def draw_samples(run: Run, tools: Tools, news: News) -> None:
    """Draw and write the fixed images and the report, unless the run stops; meet the others."""
    if run.group.has_models and not news.stop_reason:
        with tools.clock.pause():
            tools.images = fixed_images(run, kept_model(run.state), run.preset, "samples")
            if tools.writer:
                tools.writer.samples(tools.images, news.step)
                if not news.is_last:  # the report is written at the end of the run anyway
                    tools.writer.report()
    run.group.meet(f"sampled {news.step}")


def kept_model(state: TrainState) -> Preconditioned:
    """Return the model that is sampled: the first weights EMA, else the student."""
    return next(iter(state.emas.values())).model if state.emas else state.student


def kept_models(state: TrainState) -> Models:
    """Return the kept model as a student, with the target of the run and its method's module."""
    student = kept_model(state)
    return Models(student, state.target or student, own=state.own)


def fixed_images(run: Run, model: Preconditioned, card: Card, what: str) -> Tensor:
    """Return images of seeds 0, 1, ..., classes in turn: the same noise each time.

    There are run.sample_grid of them. The watcher is told how far they are, under the name `what`.
    """
    seeds, classes = range(run.preset.run.sample_grid), card.model.num_classes
    labels = torch.arange(len(seeds)) % classes if classes else None
    tell = partial(run.watcher.working, what)
    with evaluating(model):
        drawn = generate(
            model, card, plan(card), seeds, labels=labels, device=run.device, on_drawn=tell
        )
        return torch.cat(list(drawn)).cpu()


def final_images(run: Run, last: Tensor | None) -> dict[str, Tensor]:
    """Return the fixed images of the teacher, if there is one, and of the kept model, by title.

    `last` are those of the kept model, if they are drawn already.
    """
    preset, teacher, drawn = run.preset, run.teacher, {}
    if teacher:
        title = f"teacher {short(teacher.source)}\n{calls(teacher.preset)}"
        drawn[title] = fixed_images(run, teacher.f, teacher.preset, "samples of the teacher")
    if last is None:  # the run had no step left to take
        last = fixed_images(run, kept_model(run.state), preset, "samples")
    return {**drawn, f"{'student' if teacher else 'samples'}\n{calls(preset)}": last}


def calls(card: Card) -> str:
    """Return how many network calls an image of a model takes, in words."""
    number = plan(card).evaluations
    return f"{number} network call{'s' * (number != 1)} an image"


Observer = tuple[Callable[[Run, News], bool], Callable[[Run, Tools, News], None]]
OBSERVERS: list[Observer] = [
    (always, measure),
    (lambda run, news: news.info.skipped and run.group.leads, note_skipped),
    (always, tend_saver),
    (evaluates, evaluate_model),
    (logs, log),
    (always, show_progress),
    (may_save, save),
    (stores_averages, store_averages),
    (samples, draw_samples),
]
"""When something is due, and what is done then, in this order."""
