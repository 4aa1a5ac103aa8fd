"""Where commands write: stdout and stderr, by the first process alone, and what --out names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cmtool import __version__
from cmtool.errors import InputError, ResourceError, UserError, is_full

if TYPE_CHECKING:
    from cmtool.system.dist import Group

MAX_LINE = 700


def leads() -> bool:
    """Tell whether this process prints: the first of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of torchrun's processes; 0 and 1 alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str, timeout: float, facts: Mapping[str, Any] | None = None) -> Iterator[Group]:
    """Yield the group of torchrun's processes, and leave it after the block.

    Raises UserError if the `facts` of another process, about what it is to do, differ.
    """
    from cmtool.system import dist

    facts = {"cmtool": __version__, "--device": device.partition(":")[0], **(facts or {})}
    group = dist.join(*processes(), device, timeout, facts=facts)
    try:
        yield group
    except RuntimeError as error:
        raise dist.lost_contact(error, group, 0) or error from None
    finally:
        dist.leave()


def say(text: str, any_rank: bool = False) -> None:
    """Write one line to stderr, if this is the first process, or for `any_rank`.

    A closed stderr is no reason to stop.
    """
    if not (any_rank or leads()):
        return
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # kept for the rest of the process


def printable(text: str) -> str:
    """Return the text without the control characters that files may hold, and shortened."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def emit(text: str) -> None:
    """Write one line to stdout; if the reader is gone, end quietly with exit code 141."""
    if leads():
        with _stdout():
            print(text, flush=True)


@contextmanager
def _stdout() -> Iterator[None]:
    """Turn a failed write to stdout into its exit code; Python would write again at its end."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(141) from None
        if is_full(error):
            raise ResourceError("no room on the disk for stdout", "free disk space") from None
        raise


def write_bytes(out: str, content: bytes, *, tell: bool = False) -> None:
    """Write one file, or stdout for - if it is no terminal; print the path of a file if `tell`."""
    from cmtool.system.files import write_atomic

    if out != "-":
        write_atomic(Path(out), content)
        if tell:
            emit(out)
        return
    refuse_terminal()
    with _stdout():
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


def refuse_terminal() -> None:
    """Raise UserError when a picture would go to a terminal."""
    if sys.stdout.isatty():
        raise UserError("a picture would go to the terminal", "use --out FILE, or a pipe")


def check_free(path: Path, overwrite: bool) -> None:
    """Raise UserError for a file that exists, unless it may be overwritten."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists", "give another --out, or --overwrite")


def emit_json(content: dict[str, Any], *, compact: bool = True) -> None:
    """Write one JSON object to stdout, on one line if `compact`."""
    emit(json.dumps(content, indent=None if compact else 1))


def prepare_output(out: str, overwrite: bool, endings: Sequence[str]) -> None:
    """Make the folder of the results: --out itself, or that of a file with one of the endings.

    Raises UserError for an --out that cannot be written: a terminal, a file that exists, a picture
    with another ending.
    """
    target = Path(out)
    suffix = target.suffix.lower()
    if out == "-":
        refuse_terminal()
    elif suffix in endings:
        check_free(target, overwrite)
        make_folder(target.parent)
    elif suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"):
        hint = f"give a folder, or a file ending in {', '.join(endings)}"
        raise UserError(f"--out {out}: this command does not write {suffix}", hint)
    else:
        make_folder(target)


def make_folder(folder: Path) -> None:
    """Make a folder for results. Raises InputError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}", "give another --out") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}", "give another --out")
