"""What commands share: their options, and what is chosen where an option is left out."""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from cmtool.cli import _completion
from cmtool.cli._output import say
from cmtool.errors import InputError, UserError, nearest

if TYPE_CHECKING:
    from cmtool.models import Model
    from cmtool.presets.schema import Choice, Kind
    from cmtool.sampling import Plan

LabelRule = Annotated[
    str,
    Option(
        "--labels",
        help="How classes are found: auto, folders, prefix (cat of cat_01.png), none, or the name"
        " of a column. In training: --set data.labels.",
    ),
]
BUNDLED_MODEL, BUNDLED_TEACHER = "emoji-cmt", "emoji-edm"
"""What --checkpoint is where it is left out and runs/ holds no finished run."""

Checkpoint = Annotated[
    str | None,
    Option(
        "--checkpoint",
        "-c",
        help="Run, checkpoint, weight file of any format, hf:ORG/NAME, a published name, or what is"
        " bundled: emoji-cmt, emoji-edm, digits-cmt, digits-cd, digits-edm."
        " Default: the newest finished run under runs/, else emoji-cmt.",
        autocompletion=_completion.models,
    ),
]
Weights = Annotated[
    str,
    Option(
        help="Weights of a checkpoint to use: ema, model, target, ema-NAME.",
        autocompletion=_completion.weights,
    ),
]
Device = Annotated[
    str,
    Option(
        help="Device: cpu, cuda, cuda:1, mps, ..., or auto, which is a GPU if there is one.",
        autocompletion=_completion.devices,
    ),
]
Precision = Annotated[
    str,
    Option(
        help="Precision of the network: fp32, bf16, fp16, or auto, which is bf16 where the device"
        " computes in it. bf16 and fp16 are faster; images differ a little between precisions.",
        autocompletion=_completion.precisions,
    ),
]
Guidance = Annotated[
    float,
    Option(
        help="Weight of classifier-free guidance, for a teacher that learned images of no class"
        " too (data.label_dropout). 1 is none; 2 to 4 give clearer images of less variety.",
        min=0,
        max=100,
    ),
]
Seeds = Annotated[str, Option(help="Seeds, one per image: 0-15, or 3,7,10-12.")]
Sigmas = Annotated[str | None, Option(help="Noise levels from high to low, for example 80,0.8.")]
NUM = ("--num-images", "--num")
"""Names of the option for a number of images."""
FirstSeed = Annotated[int, Option(min=0, help="Seed of the first image that is drawn.")]
Steps = Annotated[
    int | None, Option(min=1, help="Number of steps. The model's preset has the noise levels.")
]
Indices = Annotated[
    str | None,
    Option(help="Noise levels by the paper's indices: 0,22,39. The last index is the clean image."),
]
Grid = Annotated[
    int | None,
    Option(help="Points of the grid that --ts counts on. Default: the model's own grid."),
]
Sampler = Annotated[
    str | None,
    Option(
        help="multistep for a consistency model; heun, euler, dpm2, dpmpp_2m, ancestral or"
        " stochastic_heun for a teacher.",
        autocompletion=_completion.samplers,
    ),
]
SamplerOptions = Annotated[
    list[str] | None,
    Option("--set", help="An option of the sampler, such as s_churn=40; repeatable."),
]
Batch = Annotated[
    int,
    Option(
        min=1,
        help="Images drawn at a time; on a GPU the network sees as many of them at once as there is"
        " room for. It does not change the images.",
    ),
]
ModelPreset = Annotated[
    str | None,
    Option(
        help="Preset with what a file from elsewhere does not say: image size, kind, head width.",
        autocompletion=_completion.presets,
    ),
]
KindOption = Annotated[
    str | None,
    Option(
        help="teacher or consistency, for a file that does not say it.",
        autocompletion=_completion.kinds,
    ),
]
NoMetadata = Annotated[
    bool, Option("--no-metadata", help="Do not write into the PNG how it was made.")
]
Features = Annotated[
    Path | None,
    Option(
        "--features",
        help="Feature network of your own, a TorchScript file: images in, features out. It is code:"
        " it runs only with --trust.",
    ),
]
FeaturesInput = Annotated[
    str,
    Option(
        "--features-input",
        help="What your network takes: size, range (-1..1, 0..1, 0..255, uint8, imagenet, clip) and"
        " resize rule (bicubic, bilinear, nearest, crop), as in 224,imagenet,bicubic. Default: what"
        " the file says, else images of their own size in -1..1.",
    ),
]
Trust = Annotated[
    bool, Option("--trust", help="Use a weight file of unknown sha256, or run your own.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace existing files.")]

Command = Callable[..., Any]
MOST_NAMES = 10
"""Names of classes that a hint offers."""
MAX_SEEDS = 10_000_000
T = TypeVar("T")


def with_options(
    run: Command, options: type[Any], own: Command | None = None, without: Collection[str] = ()
) -> Command:
    """Return a command with the options of a dataclass, and with the parameters of a function.

    So commands share options that are declared once. The command calls `run`, with an instance of
    the dataclass and with what its own options were set to: the parameters of `own`, else those of
    `run` itself. Names in `without` are no options of the command, and keep their defaults.
    """
    own = own or run
    signature = inspect.signature(own, eval_str=True)
    mine = [p for p in signature.parameters.values() if p.name != "options"]
    shared = inspect.signature(options, eval_str=True).parameters.values()

    def command(**given: Any) -> None:
        values = {parameter.name: given.pop(parameter.name) for parameter in mine}
        run(options(**given), **values)

    every = [*mine, *(p for p in shared if p.name not in without)]
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__doc__ = own.__doc__
    return command


def parse_seeds(text: str) -> list[int]:
    """Return [0, 1, 2, 9] for "0-2,9". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match and match[2] and int(match[2]) < int(match[1]):
            what = f"--seeds {text!r}: {match[1]} is larger than {match[2]}"
            raise UserError(what, f"--seeds {match[2]}-{match[1]}")
        if not match:
            hint = "for example 0-15 or 3,7,10-12"
            raise UserError(f"--seeds {text!r} is not a list of seeds", hint)
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first >= MAX_SEEDS:
            hint = f"ask for at most {MAX_SEEDS:,} at a time"
            raise UserError(f"--seeds {text!r} asks for too many images", hint)
        seeds += range(first, last + 1)
    return seeds


def parse_list(text: str, number: Callable[[str], T], what: str, hint: str) -> list[T]:
    """Return the numbers of a text like "80,0.8". Raises UserError(what, hint)."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise UserError(what, hint) from None


def parse_classes(text: str, model: Model) -> list[int]:
    """Return the classes of a text: a name of the model's, or numbers and names with commas.

    Raises UserError for one that the model does not have.
    """
    from cmtool.sampling import check_classes

    known = {name: index for index, name in reversed([*enumerate(model.class_names)])}
    parts = [text] if text in known else text.split(",")
    classes = []
    for part in map(str.strip, parts):
        if re.fullmatch("-?[0-9]{1,18}", part):
            classes.append(int(part))
        elif part in known:
            classes.append(known[part])
        elif known:
            close = difflib.get_close_matches(part, known, n=MOST_NAMES, cutoff=0.5)
            good = close or list(known)[:MOST_NAMES]
            raise UserError(f"the model has no class {part!r}", nearest(part, good))
        elif not model.preset.model.num_classes:
            raise UserError(f"class {part!r} for an unconditional model", "leave the class out")
        else:
            what = f"--class {text!r}: the model knows its classes by number alone"
            raise UserError(what, "a class index, or one per seed: 0,1,2")
    check_classes(classes, len(classes), model.preset.model.num_classes)
    return classes


def parse_sigmas(text: str | None) -> list[float] | None:
    """Return [80.0, 0.8] for "80,0.8". Raises UserError."""
    if text is None:
        return None
    what = f"--sigmas {text!r} is not a list of numbers"
    return parse_list(text, float, what, "for example 80,0.8")


def parse_kind(text: str | None) -> Kind | None:
    """Return the kind of --kind. Raises UserError."""
    match text:
        case None | "teacher" | "consistency":
            return text
    raise UserError(f"unknown --kind {text!r}", nearest(text, ["teacher", "consistency"]))


def tell_notes(model: Model) -> None:
    """Print what had to be assumed about a model."""
    for note in model.notes:
        say(f"note: {note}")


def pick_model(
    checkpoint: str | None,
    weights: str,
    device: str,
    kind: Kind | None = None,
    *,
    said: str | None = None,
    preset: str | None = None,
) -> Model:
    """Return the model of --checkpoint, else of the newest finished run, else the bundled one.

    `said` and `preset` are the user's --kind and --preset. Raises InputError for a model that is
    not of `kind`, if given.
    """
    from cmtool.models import load_model

    if checkpoint is None:
        checkpoint = default_model(kind)
        say(f"model: {checkpoint}")
    model = load_model(
        checkpoint, weights=weights, device=device, kind=parse_kind(said), preset=preset,
        otherwise=kind,
    )  # fmt: skip
    tell_notes(model)
    if kind is not None and model.kind != kind:
        wanted = "a consistency model" if kind == "consistency" else "a teacher"
        raise InputError(f"{checkpoint} is not {wanted}", "give another with --checkpoint")
    return model


def pick_plan(
    model: Model,
    sampler: str | None,
    options: list[str] | None,
    steps: int | None,
    sigmas: str | None,
    ts: str | None = None,
    grid: int | None = None,
    guidance: float = 1.0,
) -> Plan:
    """Return the sampler and the levels that the command line asks for. Raises UserError."""
    from cmtool.sampling import indexed_levels, plan

    levels = parse_sigmas(sigmas)
    if ts is not None:
        if levels is not None or steps is not None:
            raise UserError(f"--ts {ts} and another choice of levels", "give only one of them")
        what = f"--ts {ts!r} is not a list of indices"
        indices = parse_list(ts, int, what, "for example 0,22,39")
        levels = indexed_levels(model.preset, indices, grid)
    elif grid is not None:
        hint = "--grid is the grid of the indices: give --ts too"
        raise UserError(f"--grid {grid} without --ts", hint)
    chosen = pick_sampler(model.preset.sample.sampler, sampler, options or [])
    return plan(model.preset, sampler=chosen, steps=steps, sigmas=levels, guidance=guidance)


def pick_sampler(own: Choice, name: str | None, options: list[str]) -> Choice:
    """Return the sampler of --sampler and --set; without a name it is the model's `own`.

    The model's own options stay unless another sampler is named. Raises UserError.
    """
    from pydantic import ValidationError

    from cmtool.presets.schema import Choice
    from cmtool.presets.toml import parse_override

    given = dict(map(parse_override, options))
    if "name" in given:
        chosen = shlex.quote(str(given["name"]))
        raise UserError("--set does not choose the sampler", f"use --sampler {chosen}")
    name = name or own.name
    kept = own.options if name == own.name else {}
    try:
        return Choice(name=name, **{**kept, **given})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--set: {reason}", "give a number, for example s_churn=40") from None


def default_model(kind: Kind | None = None) -> str:
    """Return what stands in for --checkpoint: the newest finished run, or a bundled model."""
    return newest_run(kind) or (BUNDLED_TEACHER if kind == "teacher" else BUNDLED_MODEL)


def newest_run(kind: Kind | None = None) -> str | None:
    """Return the newest finished run folder under runs/ that holds a model of `kind`."""
    from cmtool.formats.checkpoints import kind_of_run
    from cmtool.training.lock import read_status

    def changed(run: Path) -> float:
        try:
            return (run / "status.json").lstat().st_mtime
        except OSError:  # another's folder, or no run
            return 0.0

    for run in sorted(Path("runs").glob("*/"), key=changed, reverse=True):
        status = read_status(run)
        try:
            made = kind_of_run(run) if status and status.state == "done" else None
        except (OSError, ValueError, InputError):
            continue
        if made is not None and kind in (None, made):
            return str(run)
    return None
