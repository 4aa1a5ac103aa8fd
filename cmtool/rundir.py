"""The folder of a run: whose it is, what it says of itself, and what may happen to it."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from cmtool import __version__
from cmtool.build import Model, build_curriculum, fit_settings
from cmtool.core import checkpoint_folder
from cmtool.core.checkpoint import load_checkpoint
from cmtool.core.data import Dataset
from cmtool.core.dist import Group
from cmtool.core.files import write_atomic, write_json
from cmtool.core.formats.native import write_weights
from cmtool.core.images import png_bytes
from cmtool.core.trainer import Diverged, TrainState, learning_rate
from cmtool.errors import (
    BusyError,
    InputError,
    Paused,
    ResourceError,
    Stopped,
    UserError,
    is_full,
)
from cmtool.plots import picture
from cmtool.presets import Preset, flat, load_preset, origin_of
from cmtool.toml import to_toml, with_values

FREE_TO_CHANGE = {
    "description", "run", "data.path", "data.workers", "data.timeout", "train.accumulate",
    "train.max_bad_steps", "train.checkpoint_activations", "train.compile",
}  # fmt: skip
"""What a resumed run may have otherwise: it has no part in the result, or no more than rounding.

The data may have moved but are known by their fingerprint. Another number of parts draws other
noise, as another number of processes does.
"""
WHERE = ("name", "source")
"""What run.json says of data and teacher that is no part of what they are."""
PROBES = 1000
"""Steps at which two lengths of a run are compared."""
TEMPORARY = r"\..+\.[0-9]+\.tmp"
"""The names that a file has while it is written."""


def is_run(out: Path) -> bool:
    """Tell whether a folder holds a run of ours."""
    versions = read_json(out / "run.json").get("versions")
    return isinstance(versions, dict) and "cmtool" in versions


def is_resumable(out: Path) -> bool:
    """Tell whether a folder holds a run that got as far as to say what it is."""
    return is_run(out) and (out / "preset.toml").is_file()


def prepare_folder(out: Path, *, resume: bool, overwrite: bool, teacher: Model | None) -> None:
    """Make the run folder. Raises UserError or InputError for one that must be left alone."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if resume and not is_resumable(out):
        raise InputError(f"no run to resume in {out}", "leave --resume out to start one")
    if is_run(out) and not resume and not overwrite:
        raise UserError(f"{out} holds a run already", "go on with --resume, or --overwrite it")
    if out.exists() and not is_run(out) and not _only_begun(out):
        raise UserError(f"{out} is not empty and not a run", "give a new folder with --out")
    if overwrite and teacher and out.resolve() in [p.resolve() for p in _above(teacher.source)]:
        raise UserError(f"the teacher is in {out}", "overwriting it would lose it: change --out")
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}", "give another --out") from None


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Yield runs/NAME, else NAME-2, ..., the first that is free, and make it, so that it is ours.

    One that this process's torchrun began before it started new workers is as good as free. It is
    removed again if nothing was put into it. Raises InputError where it cannot be made.
    """
    for number in itertools.count(1):
        out = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if os.environ.get("RANK", "0") != "0" or launched_by(out, [launcher()]):
            break
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make {out}: {error.strerror}", "give another --out") from None
        break
    try:
        yield out
    finally:
        with suppress(OSError):
            out.rmdir()


def _only_begun(out: Path) -> bool:
    """Tell whether a folder is empty but for what a run makes before it is one."""
    ours = {".lock", "checkpoints", "samples"}
    if "pid" in read_json(out / "status.json"):
        ours |= {"status.json", "preset.toml", "report.html"}
    made = [p for p in out.iterdir() if not re.fullmatch(TEMPORARY, p.name)]
    inside = [p for name in ("checkpoints", "samples") for p in (out / name).glob("*")]
    return {p.name for p in made} <= ours and not inside


def refuse_busy(out: Path) -> None:
    """Raise BusyError while another process holds the run folder, before time is spent on data."""
    if (out / ".lock").is_file():
        with locked(out):
            pass


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
        holder = read_json(out / "status.json")
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        raise BusyError(
            f"{out} is in use by {who} since {holder.get('since', '?')}",
            "wait for it, or give another --out",
        ) from None
    try:
        yield
    finally:
        lock.release()


class Notes(Protocol):
    """Somebody who takes remarks."""

    def note(self, text: str) -> None:
        """Take a remark worth a line."""


class StatusWriter(Protocol):
    """Writes status.json with the given fields over the ones before."""

    def __call__(self, **fields: object) -> None:
        """Write."""


def launcher() -> str:
    """Return the name of the torchrun that started this process; none without one."""
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    return f"{platform.node()}:{os.getppid()}" if elastic else ""


def launched_by(out: Path, launchers: Sequence[str]) -> bool:
    """Tell whether one of these torchruns has begun, or resumed, the run in `out`.

    Then its workers are not the first: it starts new ones when one fails (`--max-restarts`).
    """
    before = read_json(out / "status.json").get("launchers")
    return isinstance(before, list) and not {*before}.isdisjoint(filter(None, launchers))


@contextmanager
def status(out: Path, launchers: Sequence[str] = ()) -> Iterator[StatusWriter]:
    """Keep status.json true: running, done, stopped or failed, with step, exit code and error."""
    facts: dict[str, object] = {
        "state": "running",
        "step": 0,
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "launchers": sorted(filter(None, set(launchers))),
    }

    def write(**fields: object) -> None:
        facts.update(fields)
        try:
            ended = facts["state"] != "running"
            write_json(out / "status.json", facts, durable=ended)
        except ResourceError:  # in place no room is needed
            _overwrite(out / "status.json", json.dumps(facts, indent=1, sort_keys=True))

    def end(state: str, code: object, error: str | None = None) -> None:
        with suppress(OSError):  # what ended the run is told all the same
            write(state=state, exit_code=code, **({"error": error} if error else {}))

    write()
    try:
        yield write
    except (Stopped, Paused) as stop:
        end("stopped", stop.exit_code)
        raise
    except UserError as error:
        end("failed", error.exit_code, error.what)
        raise
    except SystemExit as stop:
        end("stopped", stop.code, "stopped without saving")
        raise
    except BaseException as error:
        end("failed", 1, repr(error))
        raise


def _overwrite(path: Path, text: str) -> None:
    with path.open("r+") as file:
        file.write(text + "\n")
        file.truncate()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of log.jsonl by step, which no clock can turn back, each step's last.

    A line that was cut short or holds rubbish is left out.
    """
    if not path.is_file():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return [lines[step] for step in sorted(lines)]


class LogFile:
    """log.jsonl; lines that find no room wait for the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def write(self, line: dict[str, Any]) -> None:
        """Append a line and those that wait, or nothing. Raises ResourceError on a full disk."""
        self.waiting.append(json.dumps(line) + "\n")
        content = "".join(self.waiting).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(content)
            except OSError as error:
                if not is_full(error):
                    raise
                written = 0
            if written < len(content):
                file.truncate(end)
                raise ResourceError(f"no room on the disk for {self.path}", "free some")
        self.waiting.clear()


def check_same(out: Path, preset: Preset, data: Dataset, teacher: Model | None) -> None:
    """Raise UserError unless the run in `out` was started with this preset, data and teacher.

    What is FREE_TO_CHANGE may differ, and train.steps where the steps both have are the same.
    """
    made = read_json(out / "run.json")
    for name, now in run_inputs(data, teacher).items():
        before = made.get(name)
        if isinstance(before, dict) and isinstance(now, dict):  # where they lie is no matter
            before, now = ({k: v for k, v in d.items() if k not in WHERE} for d in (before, now))
        if before is not None and before != now:
            was, is_now = _difference(before, now)
            raise UserError(
                f"the run in {out} was started with another {name}: {was}, now {is_now}",
                "resume with the same, or start a run of its own",
            )
    stored = load_preset(str(out / "preset.toml"))
    for key in sorted(changes(stored, preset)):
        section = key.partition(".")[0]
        if key in FREE_TO_CHANGE or section in FREE_TO_CHANGE:
            continue
        if key == "train.steps":
            check_steps(out, stored, preset)
            continue
        was, is_now = _difference(stored.model_dump()[section], preset.model_dump()[section])
        raise UserError(
            f"the run in {out} was started with another preset: {section} had {was}, now {is_now}",
            "resume without changing it, or start a run of its own",
        )


def split_as_before(
    out: Path, preset: Preset, processes: int, *, asked: bool
) -> tuple[Preset, str | None]:
    """Return the preset with a batch in as many parts as the run in `out` has had, and a note.

    The parts, processes times train.accumulate, are the key of the noise. Where the processes do
    not divide them, or an `asked` number stands against it, the noise is another from here on.
    """
    stored = read_json(out / "run.json").get("processes")
    if not isinstance(stored, int) or not is_resumable(out):
        return preset, None
    accumulate, batch = preset.train.accumulate, preset.train.batch
    before = load_preset(str(out / "preset.toml")).train.accumulate * stored
    if not asked:
        least = -(-before // processes)  # no part may be larger than before
        fitting = (n for n in range(least, batch + 1) if batch % (n * processes) == 0)
        accumulate = next(fitting, least)
    train = preset.train.model_copy(update={"accumulate": accumulate})
    parts, note = accumulate * processes, None
    if parts != before:
        note = (
            f"a batch has {parts} parts now, {before} before: the images are the same, their noise"
            " is another from here on"
        )
    elif processes != stored:
        note = f"a batch has {parts} parts as before, {accumulate} a process"
    return preset.model_copy(update={"train": train}), note


def check_steps(out: Path, stored: Preset, preset: Preset) -> None:
    """Raise UserError unless the run in `out` may have another number of steps."""
    before, now = stored.train.steps, preset.train.steps
    found = checkpoint_folder.checkpoints(out / "checkpoints")
    done = int(found[-1].name[5:]) if found else 0
    if now < done:
        raise UserError(f"train.steps = {now}: {out} is at step {done}", "give more steps")
    if not same_so_far(stored, preset):
        raise UserError(
            f"the run in {out} was started with train.steps = {before}, now {now}: N(k), mu(k) or"
            " the learning rate of the steps it has done would have been others",
            "resume without changing it, or start a run of its own",
        )


def same_so_far(a: Preset, b: Preset) -> bool:
    """Tell whether two presets, alike but for train.steps, are one run as far as both go."""
    curriculum, common = build_curriculum(a), min(a.train.steps, b.train.steps)
    probes = {*range(0, common, max(common // PROBES, 1)), common - 1}
    sides = []
    for settings in (fit_settings(a), fit_settings(b)):
        stages = {step: curriculum(step, settings.steps) for step in probes}
        rates = [learning_rate(settings, step, stage.progress) for step, stage in stages.items()]
        sides.append(([stage._replace(progress=0.0) for stage in stages.values()], rates))
    return sides[0] == sides[1]


def changes(before: Preset, now: Preset) -> dict[str, Any]:
    """Return the dotted keys whose values differ, with those of `now`; None where it has none."""
    old, new = (dict(flat(preset.model_dump())) for preset in (before, now))
    return {key: new.get(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def resume_state(out: Path, state: TrainState, watcher: Notes, group: Group) -> None:
    """Set `state` to the run's newest good checkpoint, which the leading process finds."""
    newest, complaints = group.agreed(
        lambda: checkpoint_folder.newest_checkpoint(out / "checkpoints"), "resume"
    )
    for complaint in complaints:
        watcher.note(f"passed over: {complaint}")
    if newest is None:
        watcher.note("no checkpoint yet: starting at step 0")
    else:
        load_checkpoint(newest, state)
        watcher.note(f"resumed from {newest}")


def trim_log(out: Path, step: int) -> None:
    """Move the log lines past a step, which will be written again, to log.superseded.jsonl."""
    log = out / "log.jsonl"
    if not log.exists():
        return
    lines = read_log(log)
    kept = [line for line in lines if line["step"] <= step]
    superseded = [line for line in lines if line["step"] > step]
    if superseded:
        with (out / "log.superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in superseded)
    write_atomic(log, "".join(json.dumps(k) + "\n" for k in kept).encode())


def clear_temporary(out: Path) -> None:
    """Remove what a process that was killed had half written; called under the lock."""
    checkpoint_folder.clear_temporary(out / "checkpoints")
    for folder in (out, out / "checkpoints", out / "samples"):
        for left in folder.glob(".*.tmp"):
            if re.fullmatch(TEMPORARY, left.name):
                left.unlink()


def clear_run(out: Path) -> None:
    """Remove an earlier run's own files, and no others; called under the lock."""
    checkpoint_folder.prune_all(out / "checkpoints")
    for folder in ("failed", "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for pattern in (
        "samples/step-*.png",
        "log*.jsonl",
        "preset.toml",
        "summary.png",
        "report.html",
    ):
        for file in out.glob(pattern):
            file.unlink()


def write_run_files(
    out: Path,
    preset: Preset,
    origins: Mapping[str, str],
    data: Dataset,
    teacher: Model | None,
    processes: int,
) -> None:
    """Write preset.toml and run.json; a resumed run's preset keeps the origins of what it keeps."""
    path = out / "preset.toml"
    if path.is_file():
        changed = changes(load_preset(str(path)), preset)
        told = {key: (value, origin_of(key, origins)) for key, value in changed.items()}
        text = with_values(path.read_text(), told)
    else:
        text = to_toml(preset, origins)
    write_atomic(path, text.encode(), durable=True)
    facts = {
        "arguments": sys.argv[1:],
        "versions": {
            "cmtool": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": preset.train.precision,
        "seed": preset.train.seed,
        **run_inputs(data, teacher),
    }
    write_json(out / "run.json", facts, durable=True)


def write_failure(out: Path, error: Diverged, preset: Preset, group: Group) -> Path:
    """Write what the last step of a run that diverged saw, and return the folder.

    fault.json says what was not finite and gives the key (seed, step, shard) of each microbatch's
    randomness, batch.safetensors has x0, labels, sigma and loss, images.png shows x0. It is no
    checkpoint. Of several processes the first has the folder, the others one each within it.
    """
    info, batch = error.info, error.batch
    folder = out / "failed" / f"step-{info.step:07d}"
    if not group.leads:
        folder = folder / f"rank-{group.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x0": batch.x0, "sigma": batch.sigma, "loss": batch.loss}
    tensors |= {} if batch.labels is None else {"labels": batch.labels}
    write_weights(folder / "batch.safetensors", tensors, {"step": info.step})
    write_atomic(folder / "images.png", png_bytes(picture(batch.x0.cpu(), 16)))
    facts = {
        "error": error.what,
        "step": info.step,
        "keys": [[preset.train.seed, info.step - 1, shard] for shard in batch.shards],
        "lr": info.lr,
        "n": info.n,
        "mu": info.mu,
        "precision": preset.train.precision,
    }
    write_json(folder / "fault.json", facts)
    return folder


def run_inputs(data: Dataset, teacher: Model | None) -> dict[str, object]:
    """Return what run.json says of data and teacher, by which a resumed run knows them again."""
    return {
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint()},
        "teacher": teacher and {"source": teacher.source, "sha256": teacher.sha256},
    }


def _difference(before: object, now: object) -> tuple[object, object]:
    """Return the first differing part of two values, tables by their differing keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        odd = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        return {k: before.get(k) for k in odd}, {k: now.get(k) for k in odd}
    return before, now


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one for a file that holds none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
