"""Wrong usage: what is wrong with the words of a command line, and the command that is meant."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from typer import BadParameter

UsageError: Any = BadParameter.__base__
"""What Typer raises for wrong usage: a class of click, which newer Typers have a copy of."""

Meant = Callable[[str], Sequence[str]]


def _key(name: str) -> Meant:
    """Return what sets a preset's key to the value of an option."""
    return lambda value: ("--set", f"{name}={value}")


def _option(name: str) -> Meant:
    return lambda value: (name, value)


def _going_on(value: str) -> Sequence[str]:
    return ("--out", value, "--resume")


def _seeds(value: str) -> Sequence[str]:
    return ("--seeds", f"0-{_count(value) - 1}")


def _square(value: str) -> Sequence[str]:
    return ("--set", f"model.image_size=[{_count(value)},{_count(value)}]")


def _count(value: str) -> int:
    """Return a number of 1 or more. Raises ValueError for anything else."""
    if (number := int(value)) < 1:
        raise ValueError(value)
    return number


HABITS: dict[str, Sequence[Meant]] = {
    "--batch": (_key("train.batch"),),
    "--batch-size": (_option("--batch"), _key("train.batch")),
    "--checkpoint-path": (_option("--checkpoint"),),
    "--ckpt": (_option("--checkpoint"),),
    "--ckpt-path": (_option("--checkpoint"),),
    "--config": (_option("--preset"),),
    "--data-dir": (_option("--data"),),
    "--dataset": (_option("--data"),),
    "--global-batch-size": (_key("train.batch"),),
    "--image-size": (_square,),
    "--iterations": (_key("train.steps"),),
    "--learning-rate": (_key("train.lr"),),
    "--lr": (_key("train.lr"),),
    "--max-steps": (_key("train.steps"),),
    "--model": (_option("--checkpoint"),),
    "--model-path": (_option("--checkpoint"),),
    "--n": (_seeds,),
    "--n-samples": (_seeds,),
    "--network": (_option("--checkpoint"),),
    "--num": (_seeds,),
    "--num-images": (_seeds,),
    "--num-inference-steps": (_option("--steps"),),
    "--num-samples": (_option("--num-images"), _seeds),
    "--num-steps": (_option("--steps"),),
    "--num-workers": (_option("--workers"), _key("data.workers")),
    "--outdir": (_option("--out"),),
    "--output-dir": (_option("--out"),),
    "--output": (_option("--out"),),
    "--ref": (_option("--reference"),),
    "--resolution": (_square,),
    "--resume-checkpoint": (_going_on,),
    "--resume-from": (_going_on,),
    "--seed": (_option("--seeds"),),
    "--size": (_square,),
    "--steps": (_key("train.steps"),),
    "--teacher-path": (_option("--teacher"),),
    "--workers": (_key("data.workers"),),
}
"""Options of other tools, and what they mean here: the first that the command has is taken.

The same with underscores, as many have them, is understood too.
"""


def explained(error: Any, argv: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong by a UsageError, and the command that is meant or where to look."""
    what = error.format_message().strip().removesuffix(".")
    options = [opt for param in error.ctx.command.params for opt in param.opts] if error.ctx else []
    names, context = list[str](), error.ctx
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    name = " ".join(["cmtool", *names])
    is_command = what.lower().startswith("no such command")
    hint = f"{name} --help lists all {'commands' if is_command else 'options'}"
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        what = f"{name} has no option {error.option_name}"
        close = difflib.get_close_matches(error.option_name, options, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}? {hint}" if close else hint
        hint = _translated(error.option_name, options, argv) or hint
    elif "unexpected extra argument" in what and "--resume" in argv[:-1] and "--out" not in argv:
        at = argv.index("--resume")
        if not argv[at + 1].startswith("-"):
            what = "--resume takes no value"
            hint = _command([*argv[:at], "--out", argv[at + 1], "--resume", *argv[at + 2 :]])
    return what[:1].lower() + what[1:], hint


def _translated(name: str, options: Sequence[str], argv: Sequence[str]) -> str | None:
    """Return the command line with options of other tools replaced by ours, if we have `name`."""
    words, left, is_known = list[str](), list(argv), False
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if not equals and left:
            value = left[0]
        meant = [] if option in options else _meant(option, value, options)
        words += meant or [word]
        if meant and not equals:
            left.pop(0)
        is_known = is_known or bool(meant and option == name)
    return _command(words) if is_known else None


def _meant(option: str, value: str, options: Sequence[str]) -> Sequence[str]:
    """Return what an option of another tool means among ours, nothing if it is not known."""
    if not value or value.startswith("-"):
        return ()
    for meant in HABITS.get(option.replace("_", "-"), ()):
        try:
            words = meant(value)
        except ValueError:
            continue
        # --set is of samplers too
        takes_preset = words[0] != "--set" or not {"--dry-run", "--price"}.isdisjoint(options)
        if words[0] in options and takes_preset:
            return words
    return ()


def _command(words: Sequence[str]) -> str:
    return shlex.join(["cmtool", *words])
