"""Where commands write: stdout and stderr, by the first process alone, and what --out names."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cmtool import __version__
from cmtool.errors import InputError, ResourceError, UserError, is_full

if TYPE_CHECKING:
    from cmtool.system.dist import Group


class Lasting(io.RawIOBase):
    """stderr's descriptor. A write that fails is no error, and the next one is tried again.

    A log on a full disk, a closed terminal, or a pipe without a reader must not end a run.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.number

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return os.isatty(self.number)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, content: Any, /) -> int:
        """Write what can be written."""
        left = memoryview(content)
        with suppress(OSError):
            while left:
                left = left[os.write(self.number, left) :]
        return len(content)


def keep_stderr() -> None:
    """Make stderr one that lasts, also for warnings and tracebacks; do nothing if it is no file."""
    stream = sys.stderr
    if isinstance(getattr(stream, "buffer", None), Lasting):
        return
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr = io.TextIOWrapper(
            Lasting(stream.fileno()), stream.encoding, "backslashreplace",
            line_buffering=True, write_through=True,
        )  # fmt: skip


def leads() -> bool:
    """Tell whether this process prints: the first of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of torchrun's processes; 0 and 1 alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_processes() -> None:
    """Raise UserError for variables that torchrun would not set so: some are left by others."""
    hint = "start several processes with torchrun; for one: unset RANK WORLD_SIZE LOCAL_RANK"
    wanted = {
        "WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }  # fmt: skip
    for name, least in wanted.items():
        value = os.environ.get(name, str(least))
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
            raise UserError(f"{name} is {value[:40]!r}, not a whole number from {least}", hint)
    rank, world_size = processes()
    if rank >= world_size:
        raise UserError(f"RANK is {rank} of a WORLD_SIZE of {world_size}", hint)


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
    """Write one line to stderr, if this is the first process, or for `any_rank`."""
    if any_rank or leads():
        print(shown(text), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Return the text as a terminal may show it. Every message passes here."""
    from cmtool.system.text import printable

    return printable(text)


def emit(text: str) -> None:
    """Write one line to stdout, a name of a file byte for byte.

    If the reader is gone, end quietly with exit code 141.
    """
    if leads():
        with _stdout():
            # a bar steps aside for print, and a stream of text (io.StringIO) takes no bytes
            if hasattr(sys.stdout, "rich_proxied_file") or not hasattr(sys.stdout, "buffer"):
                print(text.encode(errors="backslashreplace").decode(), flush=True)
                return
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(f"{text}\n"))
            sys.stdout.buffer.flush()


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
        what = f"cannot write to stdout: {error.strerror}"
        raise ResourceError(what, "send stdout elsewhere; what --out names is written") from None


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


def read_stdin() -> bytes:
    """Return what is on stdin. Raises InputError for more than the file of an image may have."""
    from cmtool.data.decoding import MAX_FILE

    try:
        content = sys.stdin.buffer.read(MAX_FILE + 1)
    except OSError as error:
        what = f"cannot read stdin: {error.strerror}"
        raise InputError(what, "pipe one picture or list in") from None
    if len(content) > MAX_FILE:
        raise InputError(f"more than {MAX_FILE:,} bytes on stdin", "pipe one picture or list in")
    return content


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
