"""One training run: the folder, resume, the loop, and everything that happens every N steps."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from cmtool import __version__
from cmtool.build import (
    Model,
    build_curriculum,
    build_objective,
    build_sampler,
    build_state,
    fit_settings,
)
from cmtool.core import checkpoint
from cmtool.core.data import Dataset, batches, load_dataset
from cmtool.core.images import png_bytes
from cmtool.core.precond import Preconditioned
from cmtool.core.samplers import check_levels
from cmtool.core.trainer import StepInfo, TrainState, fit
from cmtool.errors import BusyError, InputError, Stopped, UserError
from cmtool.presets import Preset, load_preset, to_toml
from cmtool.report import picture, read_log, write_summary
from cmtool.sampling import generate, plan

GRID_SEEDS = range(40)
GRID_COLUMNS = 10
FREE_TO_CHANGE = ("description", "run")


class Progress(NamedTuple):
    """One step's news for whoever watches."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float
    is_log_line: bool


class Watcher(Protocol):
    """Somebody who is told how a run goes."""

    def progress(self, news: Progress) -> None:
        """Take the news of one step."""

    def note(self, text: str) -> None:
        """Take a remark worth a line."""


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
) -> Path:
    """Train in the run folder `out` and return the final checkpoint's folder.

    Raises UserError for an existing run without `resume` or `overwrite` or with another preset,
    BusyError while another process holds the folder, InputError for data or a teacher that do not
    fit, DivergedError, ResourceError, and Stopped when a signal ended it after saving.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite", "give one of them")
    data = load_dataset(preset.data.path)
    check_fit(preset, data, teacher)
    chosen = plan(preset)  # what the sample grids will use
    build_sampler(chosen.sampler)
    check_levels(chosen.sigmas, preset.noise.sigma_min)
    objective = build_objective(preset, teacher.f if teacher else None)
    curriculum = build_curriculum(preset)
    curriculum(0, preset.train.steps)
    state = build_state(preset, teacher, device)
    settings = fit_settings(preset)
    microbatch = batches(
        data, batch=preset.train.batch, shards=settings.rounds, seed=settings.seed, device=device
    )
    about = {"kind": preset.kind, "preset": preset.model_dump(mode="json"), "cmtool": __version__}
    prepare_folder(out, resume=resume, overwrite=overwrite, teacher=teacher)
    with locked(out):
        if resume:
            check_same(out, preset, data, teacher)
        return _train(
            preset, out, watcher, state, fit(state, objective, microbatch, curriculum, settings),
            data=data, teacher=teacher, origins=origins or {}, about=about, device=device,
            resume=resume,
        )  # fmt: skip


def _train(
    preset: Preset,
    out: Path,
    watcher: Watcher,
    state: TrainState,
    steps: Iterator[StepInfo],
    *,
    data: Dataset,
    teacher: Model | None,
    origins: Mapping[str, str],
    about: dict[str, Any],
    device: str,
    resume: bool,
) -> Path:
    """Run the steps and what happens every N of them; the folder is ours and everything fits."""
    with status(out) as write_status, stop_signals() as caught:
        checkpoint.clear_temporary(out / "checkpoints")
        if resume:
            resume_state(out, state, watcher)
        else:
            clear_run(out)
        write_run_files(out, preset, origins, data, teacher)
        write_status(step=state.step)
        saved = state.step if resume else -1
        clock = Clock(state.step, preset)
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            for info in steps:
                last = info.step == preset.train.steps
                is_line = last or info.step % preset.run.log_every == 0
                line = clock.tick(info)
                if is_line:
                    log.write(json.dumps(clock.log_line(info)) + "\n")
                    log.flush()
                    write_status(state="running", step=info.step)
                watcher.progress(line._replace(is_log_line=is_line))
                if last or info.step % preset.run.checkpoint_every == 0 or caught:
                    checkpoint.save_checkpoint(out / "checkpoints", state, about)
                    checkpoint.prune(out / "checkpoints", preset.run.keep)
                    saved = info.step
                if caught and not last:
                    write_status(step=info.step)
                    raise Stopped(
                        f"stopped by signal {caught[0]} after saving step {info.step}",
                        f"go on with --resume --out {out}", caught[0],
                    )  # fmt: skip
                if last or info.step % preset.run.sample_every == 0:
                    draw_samples(out, preset, state, device)
        if saved != state.step:
            checkpoint.save_checkpoint(out / "checkpoints", state, about)
        summarise(out, preset, state, teacher, device)
        write_status(state="done", step=state.step, exit_code=0)
    return out / "checkpoints" / f"step-{state.step:07d}"


def check_fit(preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise InputError unless data, preset and teacher agree on size, channels and classes."""
    h, w = preset.model.image_size
    wanted = (preset.model.channels, h, w)
    if tuple(data.images.shape[1:]) != wanted:
        c, dh, dw = data.images.shape[1:]
        raise InputError(
            f"{data.name} has images of {dw}x{dh} with {c} channels, the model wants {w}x{h} with"
            f" {preset.model.channels}",
            f"resize the images, or --set model.image_size=[{dh},{dw}] --set model.channels={c}",
        )
    if preset.model.num_classes != data.num_classes:
        raise InputError(
            f"{data.name} has {data.num_classes} classes, the model {preset.model.num_classes}",
            f"--set model.num_classes={data.num_classes}, and a teacher that knows them",
        )
    if teacher is not None and teacher.kind != "teacher":
        raise InputError(
            f"{teacher.source} is a consistency model, not a teacher",
            "give a model trained with an edm preset",
        )


def is_run(out: Path) -> bool:
    """Tell whether a folder holds a run of ours."""
    versions = _read_json(out / "run.json").get("versions")
    return isinstance(versions, dict) and "cmtool" in versions


def prepare_folder(out: Path, *, resume: bool, overwrite: bool, teacher: Model | None) -> None:
    """Make the run folder. Raises UserError or InputError for one that must be left alone."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if resume and not (is_run(out) and (out / "preset.toml").is_file()):
        raise InputError(f"no run to resume in {out}", "leave --resume out to start one")
    if is_run(out) and not resume and not overwrite:
        raise UserError(f"{out} holds a run already", "go on with --resume, or --overwrite it")
    if out.exists() and not is_run(out) and any(p.name != ".lock" for p in out.iterdir()):
        raise UserError(f"{out} is not empty and not a run", "give a new folder with --out")
    if overwrite and teacher and out.resolve() in [p.resolve() for p in _above(teacher.source)]:
        raise UserError(f"the teacher is in {out}", "overwriting it would lose it: change --out")
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}", "give another --out") from None


def _above(source: str) -> list[Path]:
    """Return a path and all folders above it."""
    path = Path(source).resolve()
    return [path, *path.parents]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder's lock. Raises BusyError naming the holder."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = _read_json(out / "status.json")
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        raise BusyError(
            f"{out} is in use by {who} since {holder.get('since', '?')}",
            "wait for it, or give another --out",
        ) from None
    try:
        yield
    finally:
        lock.release()


class StatusWriter(Protocol):
    """Writes status.json with the given fields over the ones before."""

    def __call__(self, **fields: object) -> None:
        """Write."""


@contextmanager
def status(out: Path) -> Iterator[StatusWriter]:
    """Keep status.json true: running, done, stopped or failed, with step, exit code and error."""
    facts: dict[str, object] = {
        "state": "running",
        "step": 0,
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def write(**fields: object) -> None:
        facts.update(fields)
        checkpoint.write_json(out / "status.json", facts)

    write()
    try:
        yield write
    except Stopped as stop:
        write(state="stopped", exit_code=stop.exit_code)
        raise
    except UserError as error:
        write(state="failed", exit_code=error.exit_code, error=error.what)
        raise
    except SystemExit as end:
        write(state="stopped", exit_code=end.code, error="stopped without saving")
        raise
    except BaseException as error:
        write(state="failed", exit_code=1, error=repr(error))
        raise


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the number of a stopping signal; a second Ctrl-C ends at once."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise SystemExit(130)
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def check_same(out: Path, preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise UserError unless the run in `out` was started with this preset, data and teacher."""
    made = _read_json(out / "run.json")
    for name, now in run_inputs(data, teacher).items():
        if made.get(name) is not None and made[name] != now:
            before, after = _difference(made[name], now)
            raise UserError(
                f"the run in {out} was started with another {name}: {before}, now {after}",
                "resume with the same, or start a run of its own",
            )
    stored = load_preset(str(out / "preset.toml")).model_dump()
    for key, value in preset.model_dump().items():
        if key not in FREE_TO_CHANGE and stored[key] != value:
            before, now = _difference(stored[key], value)
            raise UserError(
                f"the run in {out} was started with another preset: {key} had {before}, now {now}",
                "resume without changing it, or start a run of its own",
            )


def resume_state(out: Path, state: TrainState, watcher: Watcher) -> None:
    """Set `state` to the run's newest good checkpoint, and drop log lines past it."""
    newest, complaints = checkpoint.newest_checkpoint(out / "checkpoints")
    for complaint in complaints:
        watcher.note(f"passed over: {complaint}")
    if newest is None:
        watcher.note("no checkpoint yet: starting at step 0")
    else:
        checkpoint.load_checkpoint(newest, state)
        watcher.note(f"resumed from {newest}")
    log = out / "log.jsonl"
    if log.exists():
        kept = [line for line in read_log(log) if line["step"] <= state.step]
        checkpoint.write_atomic(log, "".join(json.dumps(k) + "\n" for k in kept).encode())


def clear_run(out: Path) -> None:
    """Remove an earlier run's own files, and no others; called under the lock."""
    checkpoint.prune_all(out / "checkpoints")
    for pattern in ("samples/step-*.png", "log.jsonl", "preset.toml", "summary.png"):
        for file in out.glob(pattern):
            file.unlink()


def write_run_files(
    out: Path, preset: Preset, origins: Mapping[str, str], data: Dataset, teacher: Model | None
) -> None:
    """Write preset.toml and run.json."""
    if not (out / "preset.toml").is_file():  # a resumed run keeps its own, with its origins
        checkpoint.write_atomic(out / "preset.toml", to_toml(preset, origins).encode())
    facts = {
        "arguments": sys.argv[1:],
        "versions": {
            "cmtool": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "threads": torch.get_num_threads(),
        "seed": preset.train.seed,
        **run_inputs(data, teacher),
    }
    checkpoint.write_json(out / "run.json", facts)


def run_inputs(data: Dataset, teacher: Model | None) -> dict[str, object]:
    """Return what run.json says of data and teacher, by which a resumed run knows them again."""
    return {
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint()},
        "teacher": teacher and {"source": teacher.source, "sha256": teacher.sha256},
    }


class Clock:
    """Speed, time left, and the mean loss since the last log line."""

    def __init__(self, step: int, preset: Preset) -> None:
        self.first, self.start = step, time.monotonic()
        self.steps, self.batch = preset.train.steps, preset.train.batch
        self.sum, self.count = 0.0, 0
        self.rate = 0.0

    def tick(self, info: StepInfo) -> Progress:
        """Return the news of one step."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        self.rate = (info.step - self.first) / seconds
        self.sum, self.count = self.sum + float(info.loss.mean()), self.count + 1
        left = (self.steps - info.step) / self.rate
        mean = self.sum / self.count
        return Progress(info.step, self.steps, mean, self.rate * self.batch, left, False)

    def log_line(self, info: StepInfo) -> dict[str, float]:
        """Return the line for log.jsonl and start the next mean."""
        line = {
            "step": info.step,
            "images": info.step * self.batch,
            "loss": self.sum / self.count,
            "grad_norm": info.grad_norm,
            "lr": info.lr,
            "n": info.n,
            "mu": info.mu,
            "images_per_second": round(self.rate * self.batch, 1),
        }
        self.sum, self.count = 0.0, 0
        return line


def grid_samples(
    model: Preconditioned, preset: Preset, device: str, steps: int | None = None
) -> Tensor:
    """Return the run's fixed images: seeds 0 to 39, classes in turn."""
    labels = None
    if preset.model.num_classes:
        labels = torch.arange(len(GRID_SEEDS)) % preset.model.num_classes
    was_training = model.training
    model.eval()
    chosen = plan(preset, steps=steps)
    images = torch.cat(
        list(generate(model, preset, chosen, GRID_SEEDS, labels=labels, device=device))
    )
    model.train(was_training)
    return images.cpu()


def kept_model(state: TrainState) -> Preconditioned:
    """Return what is sampled from: the first weights EMA, else the student."""
    return next(iter(state.emas.values())).model if state.emas else state.student


def draw_samples(out: Path, preset: Preset, state: TrainState, device: str) -> None:
    """Write samples/step-NNNNNNN.png, the same seeds each time."""
    images = grid_samples(kept_model(state), preset, device)
    path = out / "samples" / f"step-{state.step:07d}.png"
    checkpoint.write_atomic(path, png_bytes(picture(images, GRID_COLUMNS)))


def summarise(
    out: Path, preset: Preset, state: TrainState, teacher: Model | None, device: str
) -> None:
    """Write summary.png: the curve, and images of teacher and model from the same noise."""
    panels = {}
    if teacher is not None:
        panels["teacher"] = grid_samples(teacher.f, teacher.preset, device)
    name = "samples" if preset.kind == "teacher" else f"{preset.sample.steps} step"
    panels[name] = grid_samples(kept_model(state), preset, device)
    write_summary(out / "summary.png", read_log(out / "log.jsonl"), panels, preset.description)


def _difference(before: object, now: object) -> tuple[object, object]:
    """Return the first differing part of two values, tables by their differing keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        odd = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        return {k: before.get(k) for k in odd}, {k: now.get(k) for k in odd}
    return before, now


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
