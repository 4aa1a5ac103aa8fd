"""The folder of a run: who may use it, who holds it, and what is removed from it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cmtool.errors import BusyError, InputError, UserError
from cmtool.formats.checkpoints import clear_temporary, prune_all
from cmtool.models import Model
from cmtool.training.status import launched_by, launcher, read_json

TEMPORARY = r"\..+\.[0-9]+\.tmp"
"""Pattern of the names that files have while they are written."""
MADE_FIRST = {".lock", "checkpoints", "samples"}
"""What a run makes before its folder says that it is a run."""
RESULTS = ("samples/step-*.png", "log*.jsonl", "preset.toml", "summary.png", "report.html")
"""Files of a run that overwriting it removes, beside its checkpoints."""


def is_run(out: Path) -> bool:
    """Tell whether a folder holds a run of ours."""
    versions = read_json(out / "run.json").get("versions")
    return isinstance(versions, dict) and "cmtool" in versions


def is_resumable(out: Path) -> bool:
    """Tell whether a folder holds a run that has written run.json and preset.toml."""
    return is_run(out) and (out / "preset.toml").is_file()


def prepare_folder(out: Path, *, resume: bool, overwrite: bool, teacher: Model | None) -> None:
    """Make the run folder. Raises UserError or InputError for one that must be left alone."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if resume and not is_resumable(out):
        raise InputError(f"no run to resume in {out}", "leave --resume out to start one")
    if is_run(out) and not resume and not overwrite:
        raise UserError(f"{out} holds a run already", "go on with --resume, or --overwrite it")
    if out.exists() and not is_run(out) and not _is_only_begun(out):
        raise UserError(f"{out} is not empty and not a run", "give a new folder with --out")
    if overwrite and teacher and _is_inside(Path(teacher.source), out):
        raise UserError(f"the teacher is in {out}", "overwriting it would lose it: change --out")
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}", "give another --out") from None


def _is_only_begun(out: Path) -> bool:
    """Tell whether a folder holds at most what a run makes before it is one."""
    ours = MADE_FIRST
    if "pid" in read_json(out / "status.json"):
        ours = ours | {"status.json", "preset.toml", "report.html"}
    made = [p for p in out.iterdir() if not re.fullmatch(TEMPORARY, p.name)]
    inside = [p for name in ("checkpoints", "samples") for p in (out / name).glob("*")]
    return {p.name for p in made} <= ours and not inside


def _is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder, or lies within it."""
    path = path.resolve()
    return folder.resolve() in (path, *path.parents)


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Make the first of runs/NAME, runs/NAME-2, ... that is free, and yield it.

    A folder that this process's torchrun began before it started new workers counts as free. The
    folder is removed again if nothing was put into it. Raises InputError where it cannot be made.
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


def refuse_busy(out: Path) -> None:
    """Raise BusyError while another process holds the run folder, before time is spent on data."""
    if (out / ".lock").is_file():
        with locked(out):
            pass


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


def clear_leftovers(out: Path) -> None:
    """Remove files that a killed process left half written; call it only while holding the lock."""
    clear_temporary(out / "checkpoints")
    for folder in (out, out / "checkpoints", out / "samples"):
        for file in folder.glob(".*.tmp"):
            if re.fullmatch(TEMPORARY, file.name):
                file.unlink()


def clear_run(out: Path) -> None:
    """Remove an earlier run's own files, and no others; call it only while holding the lock."""
    prune_all(out / "checkpoints")
    for folder in ("failed", "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for pattern in RESULTS:
        for file in out.glob(pattern):
            file.unlink()
