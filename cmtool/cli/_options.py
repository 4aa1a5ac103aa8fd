"""What commands share: options, seeds, the model by default, and the two streams."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from cmtool.build import Kind, Model

Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="Run folder, checkpoint, .safetensors file or bundled model (digits-cd, digits-edm)."
        " Default: the newest finished run under runs/, else digits-cd.",
    ),
]
Weights = Annotated[
    str, typer.Option(help="Which weights of a checkpoint: ema, model, target, ema-NAME.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
]
Seeds = Annotated[str, typer.Option(help="Seeds, one per image: 0-15, or 3,7,10-12.")]
Sigmas = Annotated[
    str | None, typer.Option(help="Noise levels from high to low, for example 80,0.8.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Number of steps; levels come from the model's preset.")
]
Sampler = Annotated[str | None, typer.Option(help="multistep; for a teacher heun or euler.")]
ClassIndex = Annotated[int | None, typer.Option("--class", help="Class index for every image.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per network call; changes no result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


MAX_SEEDS = 10_000_000


def say(text: str) -> None:
    """Write one line to stderr; a closed stderr is no reason to stop."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # kept for the rest of the process


def emit(text: str) -> None:
    """Write one line to stdout; when nobody reads any more, end quietly as a pipe does (141)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _end_of_pipe()


def emit_bytes(content: bytes) -> None:
    """Write bytes to stdout. Raises UserError on a terminal."""
    if sys.stdout.isatty():
        raise UserError("a picture would go to the terminal", "use --out FILE, or a pipe")
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _end_of_pipe()


def _end_of_pipe() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(141)


def emit_json(content: dict[str, Any], *, compact: bool = True) -> None:
    """Write one JSON object to stdout, on one line if `compact`."""
    emit(json.dumps(content, indent=None if compact else 1))


def parse_seeds(text: str) -> list[int]:
    """Return [0, 1, 2, 9] for "0-2,9". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(
                f"--seeds {text!r} is not a list of seeds", "for example 0-15 or 3,7,10-12"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first >= MAX_SEEDS:
            raise UserError(f"--seeds {text!r} asks for too many images", f"at most {MAX_SEEDS:,}")
        seeds += range(first, last + 1)
    return seeds


def parse_sigmas(text: str | None) -> list[float] | None:
    """Return [80.0, 0.8] for "80,0.8". Raises UserError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--sigmas {text!r} is not a list of numbers", "for example 80,0.8"
        ) from None


def pick_device(name: str) -> str:
    """Return the device to use. Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {name!r}: {reason}", "use auto, cpu, or a device torch sees"
        ) from None
    return name


def pick_model(
    checkpoint: str | None, weights: str, device: str, kind: Kind | None = None
) -> Model:
    """Return the model of --checkpoint, else of the newest finished run, else the bundled one."""
    from cmtool.build import load_model

    if checkpoint is None:
        checkpoint = newest_run(kind) or ("digits-edm" if kind == "teacher" else "digits-cd")
        say(f"model: {checkpoint}")
    model = load_model(checkpoint, weights=weights, device=device)
    if kind is not None and model.kind != kind:
        wanted = "a consistency model" if kind == "consistency" else "a teacher"
        raise InputError(f"{checkpoint} is not {wanted}", "give another with --checkpoint")
    return model


def newest_run(kind: Kind | None = None) -> str | None:
    """Return the newest finished run folder under runs/ that holds a model of `kind`."""
    from cmtool.build import find_weights
    from cmtool.core.formats.native import read_about

    done = []
    for status in Path("runs").glob("*/status.json"):
        try:
            finished = json.loads(status.read_text()).get("state") == "done"
            if finished and kind in (None, read_about(find_weights(status.parent))["kind"]):
                done.append((status.stat().st_mtime, str(status.parent)))
        except (OSError, ValueError, InputError):
            continue
    return max(done)[1] if done else None


def check_class(index: int | None, num_classes: int) -> None:
    """Raise UserError for a class the model does not know."""
    if index is None:
        return
    if not num_classes:
        raise UserError(f"--class {index} given to an unconditional model", "leave --class out")
    if not 0 <= index < num_classes:
        raise UserError(f"no class {index}", f"the model knows 0 to {num_classes - 1}")
