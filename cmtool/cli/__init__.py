"""The command line: it turns argv into one call of the package. Functions import torch late."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from typer import Option

from cmtool import __version__
from cmtool.cli._output import check_processes, keep_stderr, processes, say
from cmtool.cli._usage import UsageError, explained
from cmtool.errors import InputError, Paused, ResourceError, Stopped, UserError, is_full

COMMANDS = {
    "train": ("train", "train"),
    "distill": ("train", "distill"),
    "compare": ("compare", "compare"),
    "bench": ("bench", "bench"),
    "sample": ("sample", "sample"),
    "search": ("search", "search"),
    "edit": ("edit", "app"),
    "eval": ("evaluate", "app"),
    "preset": ("preset", "app"),
    "checkpoint": ("checkpoint", "app"),
    "weights": ("weights", "app"),
    "data": ("data", "app"),
    "runs": ("runs", "app"),
    "demo": ("demo", "demo"),
    "explain": ("explain", "explain"),
}
"""Where each command lies: its module in this package, and its function or group there."""
HELP = """Consistency models: images from noise in one network call.

Try `cmtool demo` first: it distills, samples, edits and evaluates on bundled digits.

    cmtool sample --seeds 0-15 --out grid.png

    cmtool distill --preset digits-cd --out runs/mine

    cmtool edit inpaint face.png --mask mask.png > mended.png

Results go to stdout, everything else to stderr; `-` is stdin or stdout."""


def build_app(word: str = "") -> typer.Typer:
    """Return the command line: of the command of that name alone, or else of all.

    To load all commands takes 0.1 s, which is much beside one small picture.
    """
    app = typer.Typer(
        name="cmtool",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="markdown",
        help=HELP,
    )
    app.callback()(_root)
    for name in [word] if word in COMMANDS else COMMANDS:
        module, attribute = COMMANDS[name]
        found = getattr(import_module(f"cmtool.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def with_auto_resume(words: Sequence[str]) -> list[str]:
    """Return the command line with `--resume auto` as --auto-resume: --resume takes no value."""
    found = list[str]()
    for word in words:
        if word == "auto" and found[-1:] == ["--resume"]:
            found[-1] = "--auto-resume"
        else:
            found.append("--auto-resume" if word == "--resume=auto" else word)
    return found


def with_homes(words: Sequence[str]) -> list[str]:
    """Return the command line with ~ as the home folder in --out=~/x: a shell leaves it there."""
    if not any("=~/" in word for word in words):
        return list(words)
    from cmtool.system.files import expanded

    parts = [word.partition("=") for word in words]
    return [
        f"{name}={expanded(value)}" if name.startswith("--") and value.startswith("~/") else word
        for word, (name, _, value) in zip(words, parts, strict=True)
    ]


_SPLIT = "split the batch: --accumulate 2, or take a smaller network"
_FEWER = "use a smaller --batch, a smaller network, or --device cpu"
LESS = {
    "train": _SPLIT,
    "distill": _SPLIT,
    "bench": _SPLIT,
    "compare": "take fewer images a step: --set train.batch=16, or a smaller network",
    "edit": "give a smaller picture, or fewer at once",
    "sample": _FEWER,
    "eval": _FEWER,
    "search": _FEWER,
}
"""What a command can do to take less memory."""


@contextmanager
def telling_of_memory(command: str) -> Iterator[None]:
    """Raise ResourceError where the block ends because there is no more memory."""
    try:
        yield
    except ImportError as error:
        if "failed to map" not in str(error):
            raise
        hint = "allow this process more memory, for example: ulimit -v unlimited"
        raise ResourceError(f"no memory to load a library: {error}", hint) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError):
            from cmtool.system.devices import is_out_of_memory

            if not is_out_of_memory(error):
                raise
        hint = LESS.get(command, "end programs that take memory, or use a machine with more")
        full = ResourceError("out of memory", hint)
        full.rank = processes()[0]
        raise full from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: bool = Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _stop(number: int, _: FrameType | None) -> None:
    """Raise Stopped: no file is left half written. A training run handles signals itself."""
    raise Stopped(f"stopped by signal {number}", "", number)


def entry() -> None:
    """Run `main`, and end the process without taking torch apart, which takes up to 0.5 s.

    Tasks of srun are processes of one run.
    """
    from cmtool.system.slurm import ranks

    os.environ.update(ranks(os.environ))
    try:
        main()
    except SystemExit as ended:
        if threading.active_count() > 1 or not isinstance(ended.code, int):
            raise
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # a full disk or a closed pipe: Python says so
            raise ended from None
        os._exit(ended.code)


def _end(what: str, hint: str, code: int, *, any_rank: bool = False) -> NoReturn:
    """Write what is wrong and what to do, and end with an exit code."""
    say(f"error: {what}", any_rank)
    say(f"hint: {hint}", any_rank)
    sys.exit(code)


def ends_well_for_torchrun(error: UserError) -> bool:
    """Tell whether torchrun is to take a stop on purpose for an end in good order.

    Else it would start the processes again, or print a traceback of its own when the time is up. A
    signal is another matter: torchrun got it too, and on another node it would wait for this one.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not isinstance(error, Stopped | Paused):
        return False
    return isinstance(error, Paused) or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a UserError becomes two lines on stderr and its exit code."""
    from cmtool.system.portable import is_nohup, signals

    for number in signals():
        if not is_nohup(number):
            signal.signal(number, _stop)
    # a stream the caller closed is None, and print(file=None) would write to the other one
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    keep_stderr()
    words = sys.argv[1:] if argv is None else argv
    try:
        check_processes()
    except UserError as error:
        _end(error.what, error.hint, error.exit_code, any_rank=True)
    try:
        words = with_homes(with_auto_resume(words))
        with telling_of_memory(words[0] if words else ""):
            # not by itself: Typer would end the process, and draw a box around a wrong usage
            # by its name: --install-completion would make a script of `python -m cmtool`
            app = build_app(words[0] if words else "")
            code = app(words, standalone_mode=False, prog_name="cmtool")
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _end(*explained(error, words), error.exit_code)
        sys.exit(error.exit_code)
    except OSError as error:
        if is_full(error):
            what = f"no room on the disk for {error.filename or 'the output'}"
            _end(what, "free disk space", ResourceError.exit_code)
        if error.filename is None:
            raise
        what = f"{error.strerror}: {error.filename}"
        _end(what, "check the path and its permissions", InputError.exit_code)
    except UserError as error:
        mine = error.rank is not None and "WORLD_SIZE" in os.environ
        say(f"error: rank {error.rank}: {error.what}" if mine else f"error: {error.what}", mine)
        if error.hint:
            say(f"hint: {error.hint}", mine)
        if ends_well_for_torchrun(error):
            sys.exit(0)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
