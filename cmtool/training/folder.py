"""The folder of a run: who may use it, its status.json, and what is removed."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from cmtool.errors import InputError, Paused, ResourceError, Stopped, UserError
from cmtool.formats.checkpoints import clear_temporary, prune_all, read_best
from cmtool.models import Model
from cmtool.system.files import is_regular, opened, write_json
from cmtool.system.records import known_facts, read_facts
from cmtool.system.text import is_utf8
from cmtool.training.lock import beating
from cmtool.training.records import Record, Status

StatusWriter = Callable[..., None]
"""Writes status.json: the given fields replace those before."""

TEMPORARY = r"\..+\.[0-9]+\.tmp"
"""Pattern of the names that files have while they are written."""
MADE_FIRST = {".lock", "checkpoints", "samples"}
"""What a run makes before its folder says that it is a run."""
RESULTS = (
    "samples/step-*.png", "log*.jsonl", "preset.toml", "training-images.png", "summary.png",
    "report.html", "wandb.id", "mlflow.id",
)  # fmt: skip
"""Files of a run that overwriting it removes, beside its checkpoints."""


def refuse_special(out: Path) -> None:
    """Raise InputError for a run folder with a link, pipe, socket or device in it, at any depth.

    Someone else may have made the folder: what is written to a link in it lands elsewhere. The
    folder itself may be reached by a link.
    """
    for folder, folders, files in os.walk(out, onerror=_unreadable):
        for path in (Path(folder, name) for name in sorted([*folders, *files])):
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, socket or device"
                what = f"{path} is {kind}: a run folder holds regular files and folders only"
                raise InputError(what, "remove it, or give another folder with --out")


def _unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):  # no run yet
        return
    what = f"cannot look into {error.filename}: {error.strerror}"
    raise InputError(what, "check its permissions, or give another folder with --out")


def is_run(out: Path) -> bool:
    """Tell whether a folder holds a run of ours."""
    return known_facts(out / "run.json", Record) is not None


def refuse_strange(out: Path, *, resume: bool) -> None:
    """Raise InputError for a folder with special files, or damaged JSON files if it is resumed.

    Raises UserError for a name that is not UTF-8, from which safetensors reads no weights again.
    """
    if not is_utf8(str(out)):
        what = f"the name of the run folder {str(out)!r} is not UTF-8"
        raise UserError(what, "give another folder with --out")
    refuse_special(out)
    if resume:
        read_facts(out / "run.json", Record)
        read_facts(out / "status.json", Status)
        read_best(out / "checkpoints")


def is_resumable(out: Path) -> bool:
    """Tell whether a folder holds a run that has written run.json and preset.toml."""
    return is_run(out) and (out / "preset.toml").is_file()


def launcher() -> str:
    """Return the name of the torchrun that started this process; "" without one."""
    return f"{platform.node()}:{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def launched_by(out: Path, launchers: Sequence[str]) -> bool:
    """Tell whether one of these torchruns has begun, or resumed, the run in `out`.

    Then its workers are not the first: it starts new ones when one fails (`--max-restarts`).
    """
    before = known_facts(out / "status.json", Status)
    return before is not None and not {*before.launchers}.isdisjoint(filter(None, launchers))


def prepare_folder(out: Path, *, resume: bool, overwrite: bool, models: Sequence[Model]) -> None:
    """Make the run folder. Raises UserError or InputError for one that must be left alone.

    `models` are the teacher, and the one whose weights the run starts from.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if resume and not is_resumable(out):
        raise InputError(f"no run to resume in {out}", "leave --resume out to start one")
    if is_run(out) and not resume and not overwrite:
        raise UserError(f"{out} holds a run already", "go on with --resume, or --overwrite it")
    if out.exists() and not is_run(out) and not _is_only_begun(out):
        raise UserError(f"{out} is not empty and not a run", "give a new folder with --out")
    for model in models if overwrite else ():
        if Path(model.source).resolve().is_relative_to(out.resolve()):
            what = f"the run learns from {model.source}, which is in {out}"
            raise UserError(what, "overwriting it would lose it: change --out")
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}", "give another --out") from None


def _is_only_begun(out: Path) -> bool:
    """Tell whether a folder holds at most what a run makes before it is one."""
    status = known_facts(out / "status.json", Status)
    has_status = status is not None and status.pid is not None
    ours = MADE_FIRST | ({"status.json", "preset.toml", "report.html"} if has_status else set())
    made = {p.name for p in out.iterdir() if not re.fullmatch(TEMPORARY, p.name)}
    return made <= ours and not any((*out.glob("checkpoints/*"), *out.glob("samples/*")))


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
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make {out}: {error.strerror}", "give another --out") from None
    try:
        yield out
    finally:
        with suppress(OSError):
            out.rmdir()


@contextmanager
def keep_status(out: Path, launchers: Sequence[str] = ()) -> Iterator[StatusWriter]:
    """Keep status.json true during a block: running, done, stopped or failed, step, exit code."""
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
            write_json(out / "status.json", facts, durable=facts["state"] != "running")
        except ResourceError:  # the disk is full; to write over the old file needs no room
            if not (out / "status.json").is_file():
                raise
            with opened(out / "status.json", "r+b") as file:
                file.write(json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n")
                file.truncate()

    write()
    try:
        with beating(out / "status.json"):
            yield write
    except BaseException as error:
        end: dict[str, object] = {"state": "failed", "exit_code": 1, "error": repr(error)}
        if isinstance(error, Stopped | Paused):
            end = {"state": "stopped", "exit_code": error.exit_code}
        elif isinstance(error, UserError):
            end |= {"exit_code": error.exit_code, "error": error.what}
        elif isinstance(error, SystemExit):
            end = {"state": "stopped", "exit_code": error.code, "error": "stopped without saving"}
        with suppress(OSError, ResourceError):  # the error that ended the run is still shown
            write(**end)
        raise


def clear_leftovers(out: Path) -> None:
    """Remove files that a killed process left half written; call it only while holding the lock."""
    clear_temporary(out / "checkpoints")
    for folder in (out, out / "checkpoints", out / "samples"):
        for file in folder.glob(".*.tmp"):
            if re.fullmatch(TEMPORARY, file.name) and is_regular(file):
                file.unlink()


def clear_run(out: Path) -> None:
    """Remove an earlier run's own files, and no others; call it only while holding the lock."""
    prune_all(out / "checkpoints")
    for folder in ("failed", "tensorboard", "averages"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for pattern in RESULTS:
        for file in filter(is_regular, out.glob(pattern)):
            file.unlink()
