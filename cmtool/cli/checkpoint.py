"""cmtool checkpoint: what a model file holds, other formats, and averages after training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli._devices import importing_torch
from cmtool.cli._options import (
    AsJson,
    KindOption,
    ModelPreset,
    Weights,
    parse_kind,
    pick_plan,
    tell_notes,
)
from cmtool.cli._output import emit, emit_json, make_folder, say, shown
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.models import Model

app = typer.Typer(no_args_is_help=True, help="Describe a model file, convert it, average a run.")

Source = Annotated[
    str,
    Argument(
        metavar="PATH",
        help="Run, checkpoint, .safetensors; EDM .pkl, openai .pt, diffusers folder, JAX file.",
        autocompletion=_completion.models,
    ),
]


@app.command("info")
def info(
    path: Source,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model file: format, architecture, parameters, kind, image size, classes, weights.

    `cmtool checkpoint info edm-cifar10-32x32-cond-vp.pkl`

    `cmtool checkpoint info cd_imagenet64_lpips.pt --json`

    No code in the file is executed.
    """
    with importing_torch():
        from cmtool.models import load_model

    said = parse_kind(kind)
    model = load_model(path, weights=weights, preset=preset, kind=said, otherwise="teacher")
    tell_notes(model)
    facts = describe(model)
    if as_json:
        emit_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
        emit(shown(f"{key.replace('_', ' '):<14} {_shown(value)}"))


@app.command("convert")
def convert(
    path: Source,
    out: Annotated[
        Path,
        Argument(help="A .safetensors or .onnx file, or a folder for a diffusers pipeline."),
    ],
    steps: Annotated[
        int | None, Option(min=1, help="For .onnx: number of steps. Default: the model's.")
    ] = None,
    sigmas: Annotated[
        str | None, Option(help="For .onnx: noise levels from high to low, for example 80,0.8.")
    ] = None,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model to cmtool's own format, a diffusers ConsistencyModelPipeline, or ONNX.

    `cmtool checkpoint convert edm-cifar10-32x32-cond-vp.pkl teacher.safetensors`

    `cmtool checkpoint convert runs/mine pipeline/`

    `cmtool checkpoint convert cd_imagenet64_lpips.pt cd.safetensors --kind consistency`

    `cmtool checkpoint convert runs/mine mine.onnx --steps 2`

    Every tensor is converted, or the command fails. At the end, source and result are run on the
    same input and must agree to the last bit; an ONNX file must agree to 1e-4 in ONNX Runtime. It
    takes noise, one for each step, and classes, and gives images in [-1, 1] (cmtool[onnx]).
    """
    from cmtool.convert import check_out
    from cmtool.convert import convert as convert_model

    to_onnx = out.suffix == ".onnx"
    if not to_onnx and (steps is not None or sigmas is not None):
        raise UserError("--steps and --sigmas are only for .onnx files", "leave them out")

    with importing_torch():
        from cmtool.models import load_model

    check_out(out, overwrite=overwrite)
    make_folder(out.parent)
    model = load_model(path, weights=weights, preset=preset, kind=parse_kind(kind))
    tell_notes(model)
    left = [name for name in model.held if name != model.weights]
    if left:
        say(f"note: converted {model.weights}; left behind: {', '.join(left)}")
    if to_onnx:
        written = _export(model, out, steps, sigmas)
    else:
        written = convert_model(model, out, overwrite=overwrite)
        say(f"checked: {parameters(model):,} parameters, equal answers on the same input")
    if as_json:
        emit_json({"path": str(out), "format": written, "from": describe(model)})
    else:
        emit(str(out))


def _export(model: Model, out: Path, steps: int | None, sigmas: str | None) -> str:
    """Write an ONNX file and say how near it is; return the format."""
    from cmtool.export import check_exportable, export_onnx

    check_exportable(model)
    chosen = pick_plan(model, None, None, steps, sigmas)
    say(f"exporting: {len(chosen.sigmas)} steps; this takes half a minute or more")
    error = export_onnx(model, chosen, out)
    say(f"checked: ONNX Runtime's images are within {error:.1g} of ours, in [-1, 1]")
    return "onnx"


@app.command("push")
def push(
    path: Source,
    repository: Annotated[
        str, Argument(metavar="hf:ORG/NAME", help="Repository; it is made unless it is there.")
    ],
    licence: Annotated[
        str | None,
        Option("--license", help="Licence of the weights, as the hub names it: apache-2.0, mit."),
    ] = None,
    weights: Weights = "ema",
    kind: KindOption = None,
    private: Annotated[
        bool, Option("--private", help="Make a new repository a private one.")
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace files in the repository, by a new commit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a model onto the Hugging Face hub, with a card that says how it was made.

    `cmtool checkpoint push runs/mine hf:me/my-model --license apache-2.0`

    The hub gets the weights in cmtool's format, the preset, a README.md with what the run knows of
    its data, teacher and numbers, and its last samples. The token is that of `hf auth login`, or
    HF_TOKEN. Prints hf:ORG/NAME@COMMIT, which every command takes as a model.
    """
    if licence is None:
        hint = "say under which licence others may use it, for example --license apache-2.0"
        raise UserError("checkpoint push needs --license", hint)
    with importing_torch():
        from cmtool.models import load_model
        from cmtool.publish import push as push_model

    model = load_model(path, weights=weights, kind=parse_kind(kind))
    tell_notes(model)
    name = push_model(model, repository, licence, private=private, overwrite=overwrite)
    if as_json:
        emit_json({"name": name, "license": licence, "from": describe(model)})
    else:
        emit(name)


@app.command("average")
def average(
    run: Annotated[
        Path,
        Argument(help="Run folder with stored averages.", autocompletion=_completion.runs),
    ],
    sigma_rel: Annotated[
        float,
        Option(min=0.001, max=0.28, help="Width of the new average, as a share of the run."),
    ],
    out: Annotated[Path, Option(help="The .safetensors file to write.")],
    step: Annotated[
        int | None, Option(min=1, help="Step at whose end the average is; else the last stored.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an average of a run's weights after training, of any width (EDM2's post-hoc EMA).

    `cmtool checkpoint average runs/mine --sigma-rel 0.12 --out wide.safetensors`

    The run must have stored averages: it had run.ema_every, and two of train.ema with sigma_rel,
    such as 0.05 and 0.10. Widths between those and somewhat beyond are close to what training with
    them gives.
    """
    from cmtool.convert import check_out
    from cmtool.convert import convert as convert_model

    if out.suffix != ".safetensors":
        raise UserError(f"{out} is no .safetensors file", "give --out a name that ends so")
    with importing_torch():
        from cmtool.training.averages import average as average_of

    check_out(out, overwrite=overwrite)
    make_folder(out.parent)
    model, stored = average_of(run, sigma_rel, step)
    convert_model(model, out, overwrite=overwrite)
    last = stored[-1].profile.step
    say(f"made of {len(stored)} stored averages, the last of step {last:,}")
    if as_json:
        emit_json({"path": str(out), "sigma_rel": sigma_rel, "step": last, "made_of": len(stored)})
    else:
        emit(str(out))


@app.command("guide")
def guide(
    path: Source,
    weaker: Annotated[
        str,
        Argument(
            metavar="WEAKER",
            help="A teacher of the same preset that was trained for less long.",
            autocompletion=_completion.models,
        ),
    ],
    out: Annotated[Path, Option(help="The .safetensors file to write.")],
    weight: Annotated[
        float, Option(min=1, max=1000, help="How far answers are moved away from the weaker one's.")
    ] = 2.0,
    no_class: Annotated[
        bool, Option("--no-class", help="Tell the weaker model no class: classes are clearer.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one teacher of two: a weaker one guides the other (autoguidance).

    `cmtool checkpoint guide runs/teacher runs/early --weight 3 --out guided.safetensors`

    Images are clearer, and of less variety. The weaker model has the same preset and a tenth of
    the steps, or is an early checkpoint. The file is a teacher for `sample`, `eval` and `distill`;
    its student has one network. A call costs two.
    """
    from cmtool.convert import check_out
    from cmtool.convert import convert as convert_model

    if out.suffix != ".safetensors":
        raise UserError(f"{out} is no .safetensors file", "give --out a name that ends so")
    with importing_torch():
        from cmtool.guide import guided_model
        from cmtool.models import load_model

    check_out(out, overwrite=overwrite)
    make_folder(out.parent)
    main, guiding = (load_model(name, otherwise="teacher") for name in (path, weaker))
    made = guided_model(main, guiding, weight, hears_class=not no_class)
    convert_model(made, out, overwrite=overwrite, guide=guiding)
    if as_json:
        facts = {"path": str(out), "weight": weight, "hears_class": not no_class}
        emit_json({**facts, "from": describe(main), "guide": describe(guiding)})
    else:
        emit(str(out))


def describe(model: Model) -> dict[str, Any]:
    """Return the facts of a model as plain data."""
    card = model.preset
    guidance = {
        "weight": card.model.guidance, "hears_class": card.model.guide_hears_class
    }  # fmt: skip
    return {
        "path": model.source,
        "format": model.format,
        "kind": model.kind if model.kind_is_said else None,
        "network": card.model.network.name,
        "options": card.model.network.options,
        "parameters": parameters(model),
        "image_size": list(card.model.image_size),
        "channels": card.model.channels,
        "classes": card.model.num_classes,
        "class_names": list(model.class_names) or None,
        "sigma": {
            "min": card.noise.sigma_min,
            "max": card.noise.sigma_max,
            "data": card.model.sigma_data,
        },
        "scalings": card.model.scalings.name,
        "noise_label": card.model.noise_label.name,
        **({} if card.model.guidance is None else {"guidance": guidance}),
        "weights": model.weights,
        "held": list(model.held),
        "sha256": model.sha256,
    }


def parameters(model: Model) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.f.network.parameters())


def _shown(value: Any) -> str:
    if value is None:
        return "not in the file"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)
