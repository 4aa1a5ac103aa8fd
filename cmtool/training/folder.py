"""The folder of a run: whose it is, what it says of itself, and what may happen to it."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from cmtool.data.images import png_bytes
from cmtool.errors import (
    BusyError,
    InputError,
    Paused,
    ResourceError,
    Stopped,
    UserError,
)
from cmtool.formats import checkpoints as checkpoint_folder
from cmtool.formats.native import write_weights
from cmtool.models import Model
from cmtool.presets.schema import Preset
from cmtool.system.dist import Group
from cmtool.system.files import write_atomic, write_json
from cmtool.training.fit import Diverged
from cmtool.training.log import read_log
from cmtool.training.plots import picture

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


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one for a file that holds none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
