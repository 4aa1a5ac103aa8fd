"""cmtool eval: numbers for images or for a model, with what they depend on."""

from __future__ import annotations

import codecs
import math
import os
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from cmtool.cli import _completion
from cmtool.cli._devices import pick_device, pick_precision
from cmtool.cli._options import (
    NUM,
    AsJson,
    Batch,
    Checkpoint,
    Device,
    Features,
    FeaturesInput,
    FirstSeed,
    Guidance,
    KindOption,
    ModelPreset,
    Precision,
    Sampler,
    Sigmas,
    Steps,
    Trust,
    Weights,
    pick_model,
    pick_plan,
)
from cmtool.cli._output import (
    check_free,
    emit,
    emit_json,
    joined,
    make_folder,
    read_stdin,
    say,
)
from cmtool.cli._watching import showing
from cmtool.cli.consistency import consistency
from cmtool.errors import InputError, ThresholdError, UserError, nearest

DRAWN = 2048  # images drawn from a model if the user gives no number
TIMEOUT = 1800.0  # seconds without an answer after which another process counts as lost
SETS = (
    ".zip", ".npz", ".pkl", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".parquet", ".arrow",
)  # fmt: skip
"""Endings of files that hold more than one image."""
OF_MODELS = {
    "runs": 1, "steps": None, "sigmas": None, "sampler": None, "preset": None, "kind": None,
    "weights": "ema", "first_seed": 0, "precision": "fp32", "classes": "uniform",
    "guidance": 1.0,
}  # fmt: skip
"""Options of models alone, and their defaults."""


class MetricCommands(TyperGroup):
    """Its own commands, and one for each row of METRICS, which is read late: it needs torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return [*metric_commands(), *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name, None if there is none."""
        return super().get_command(ctx, cmd_name) or metric_commands().get(cmd_name)


@cache
def metric_commands() -> dict[str, Any]:
    """Return a command for each row of METRICS."""
    from cmtool.evaluation.metrics import METRICS

    made = typer.Typer(rich_markup_mode="markdown")
    for name, row in METRICS.items():
        made.command(name, help=row.help)(metric_command)
    return dict(get_group(made).commands)


app = typer.Typer(
    cls=MetricCommands, no_args_is_help=True, help="Measure images, or the images of a model."
)

Images = Annotated[
    list[str] | None,
    typer.Argument(help="A folder, zip, npz, image files, a data set's name, or - for paths."),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="What to compare with: data, or statistics (npz, pkl). Default: the bundled data that"
        " the model was trained on, else digits.",
        autocompletion=_completion.data_sets,
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="edm, adm, clean, legacy-tf, dinov2, clip, digits, emoji, pixels, vgg16 (pr only),"
        " own (with --features). Default: that of bundled data against them, else edm.",
        autocompletion=_completion.protocols,
    ),
]
FeatureWeights = Annotated[
    Path | None,
    typer.Option(help="The weight file of the feature network, if it is in another place."),
]
FeaturePrecision = Annotated[
    str,
    typer.Option(
        help="Precision of the feature network: fp32; or bf16, which is faster but gives a slightly"
        " different number."
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Runs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of measurements, with new seeds each: the value is the least FID or KID,"
        " else the mean.",
    ),
]
Classes = Annotated[
    str,
    typer.Option(
        help="How often a model draws each class: uniform, equally often, as published numbers do;"
        " or reference, as often as the reference has it."
    ),
]
ReferenceNum = Annotated[
    int | None,
    typer.Option(
        min=2, help="Images of the reference to use, always the same random ones. Default: all."
    ),
]
Num = Annotated[
    int | None,
    typer.Option(
        *NUM, min=2, help=f"Images to use. Default: all that are given; {DRAWN} of a model."
    ),
]
CrossCheck = Annotated[
    bool,
    typer.Option(
        "--cross-check",
        help="Compute the FID by clean-fid too, from the same images and the same weight file, and"
        " print both. For fid with --protocol clean, legacy-tf, edm or adm; takes a second pass.",
    ),
]
FailAbove = Annotated[float | None, typer.Option(help="Exit 8 if the value is larger.")]
FailBelow = Annotated[float | None, typer.Option(help="Exit 8 if the value is smaller.")]


def metric_command(
    ctx: typer.Context,
    images: Images = None,
    checkpoint: Checkpoint = None,
    reference: Reference = None,
    protocol: ProtocolOption = None,
    num: Num = None,
    reference_num: ReferenceNum = None,
    first_seed: FirstSeed = 0,
    runs: Runs = 1,
    classes: Classes = "uniform",
    steps: Steps = None,
    sigmas: Sigmas = None,
    sampler: Sampler = None,
    guidance: Guidance = 1.0,
    batch: Batch = 256,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    feature_weights: FeatureWeights = None,
    features: Features = None,
    features_input: FeaturesInput = "",
    trust: Trust = False,
    feature_precision: FeaturePrecision = "fp32",
    cross_check: CrossCheck = False,
    workers: Workers = 2,
    device: Device = "auto",
    precision: Precision = "fp32",
    as_json: AsJson = False,
    fail_above: FailAbove = None,
    fail_below: FailBelow = None,
) -> None:
    """Measure by the metric that the command is named after."""
    from cmtool.evaluation.measure import measure
    from cmtool.evaluation.request import ModelImages, Request

    check_usage(metric := str(ctx.command.name), ctx.params)
    where = pick_device(device)

    def draw() -> ModelImages:
        model = pick_model(checkpoint, weights, where, said=kind, preset=preset)
        chosen = pick_plan(model, sampler, None, steps, sigmas, guidance=guidance)
        chosen = chosen._replace(precision=pick_precision(precision, where))
        return ModelImages(model, chosen, num or DRAWN, first_seed)

    with joined(where, TIMEOUT) as group, showing() as progress:
        given = group.agreed(lambda: given_images(metric, images, checkpoint), "names of images")
        if given is not None:
            refuse_options(ctx.params)
        content, notes = measure(Request(
            images=draw if given is None else given, metric=metric, protocol=protocol, num=num,
            reference=reference, reference_num=reference_num, classes=classes, runs=runs,
            cross_check=cross_check, feature_weights=feature_weights, features=features,
            features_input=features_input, trust=trust, feature_precision=feature_precision,
            batch=batch, workers=workers, device=where, group=group, progress=progress,
        ))  # fmt: skip
    for note in notes:
        say(note)
    emit_json(content, compact=as_json)
    check_value(content, fail_above, fail_below)


def check_usage(metric: str, given: dict[str, Any]) -> None:
    """Raise UserError for options that do not fit the metric, or bounds that no value can pass."""
    from cmtool.evaluation.metrics import METRICS
    from cmtool.evaluation.request import CLASSES

    row = METRICS[metric]
    if given["classes"] not in CLASSES:
        what = f"--classes {given['classes']}"
        raise UserError(what, nearest(given["classes"], CLASSES))
    bounds = options_among(given, "fail_above", "fail_below")
    if len(row.values) > 1 and bounds:
        raise UserError(f"a threshold for {metric}, which is several numbers", "use fid or kid")
    named = options_among(given, "reference", "reference_num")
    if named and not any(row.reference):
        hint = f"leave {' and '.join(named)} out"
        raise UserError(f"eval {metric} compares with no reference", hint)
    for option, bound in bounds.items():
        if math.isnan(bound):
            raise UserError(f"{option} must be a number, not nan", f"for example {option} 20")


def options_among(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return those of some options that are given, as they are typed, with their values."""
    return {f"--{n.replace('_', '-')}": given[n] for n in names if given[n] is not None}


def check_value(content: dict[str, Any], above: float | None, below: float | None) -> None:
    """Raise ThresholdError for a value beyond a bound: --fail-above or --fail-below."""
    name, value = content["metric"], content["value"]
    hint = "train longer, or use more --steps"
    if above is not None and value > above:
        raise ThresholdError(f"{name} {value:.4f} is above {above:g}", hint)
    if below is not None and value < below:
        raise ThresholdError(f"{name} {value:.4f} is below {below:g}", hint)


def refuse_options(given: dict[str, Any]) -> None:
    """Raise UserError for an option of models that is not at its default, for images."""
    for name, default in OF_MODELS.items():
        if given[name] != default:
            option = f"--{name.replace('_', '-')} {given[name]}"
            what = f"{option} says how a model draws, and images were given"
            raise UserError(what, "leave it out, or measure a model with --checkpoint")


def given_images(metric: str, images: list[str] | None, checkpoint: str | None) -> list[str] | None:
    """Return the names of images on the command line or stdin; None if a model is measured.

    Raises UserError for a set among several names, which other tools take as the reference.
    """
    if images and checkpoint is not None:
        raise UserError("both images and --checkpoint", "give one of them")
    piped = images is None and checkpoint is None and not sys.stdin.isatty()
    if images == ["-"] or piped:
        content = read_stdin()
        if b"\0" in content:
            hint = "write one path a line (find without -print0), or name the files"
            raise InputError("stdin is no list of paths: it has NUL bytes", hint)
        lines = os.fsdecode(content.removeprefix(codecs.BOM_UTF8)).split("\n")
        listed = [path for line in lines if (path := line.removesuffix("\r"))]
        if images and not listed:
            raise InputError("no paths on stdin", "pipe them in, one a line")
        return listed or None
    if images and len(images) > 1 and any(map(_is_set, images)):
        first, second, *more = map(shlex.quote, images)
        hint = "give one folder, zip or npz, or image files alone"
        if not more:
            hint = f"cmtool eval {metric} {first} --reference {second}"
        what = f"eval {metric} measures one set of images, and {len(images)} were named"
        raise UserError(what, hint)
    return images or None


def _is_set(name: str) -> bool:
    """Tell whether a name is that of many images: a folder, an archive, a bundled data set."""
    from cmtool.data.datasets import DATASETS

    return Path(name).is_dir() or name.lower().endswith(SETS) or name.partition(":")[0] in DATASETS


@app.command("reference")
def reference_command(
    data: Annotated[str, typer.Argument(help="A folder, zip, npz, tarball, or a data set's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The npz to write.")],
    protocol: ProtocolOption = None,
    num: Annotated[
        int | None, typer.Option(*NUM, min=2, help="Images to use. Default: all.")
    ] = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep the single features too, for kid and pr.")
    ] = False,
    batch: Batch = 256,
    feature_weights: FeatureWeights = None,
    features: Features = None,
    features_input: FeaturesInput = "",
    trust: Trust = False,
    feature_precision: FeaturePrecision = "fp32",
    workers: Workers = 2,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the statistics of a data set, which EDM's and clean-fid's tools read too.

    `cmtool eval reference cifar-10-python.tar.gz -o cifar10.npz`

    `cmtool eval reference faces.zip -o faces-clean.npz --protocol clean --keep-features`

    The file says which protocol it is made by, and eval refuses to mix two protocols.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: statistics are an npz", "end it with .npz")
    check_free(out, overwrite)
    if Path(data).resolve() == out.resolve():
        raise UserError(f"--out {out} is the data itself", "give another --out")
    make_folder(out.parent)

    from cmtool.evaluation.measure import save_reference
    from cmtool.evaluation.request import Request

    where = pick_device(device)
    with joined(where, TIMEOUT) as group, showing() as progress:
        request = Request(
            images=data, protocol=protocol, num=num, feature_weights=feature_weights,
            features=features, features_input=features_input, trust=trust,
            feature_precision=feature_precision, batch=batch, workers=workers, device=where,
            group=group, progress=progress,
        )  # fmt: skip
        count = save_reference(out, request, keep_features=keep_features)
    say(f"{count:,} images")
    emit(os.fspath(out))


app.command()(consistency)
