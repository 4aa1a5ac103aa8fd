"""cmtool edit: zero-shot edits of pictures with a consistency model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli._edits import Common, box_mask, edit_all, read_input, target_of, write_answers
from cmtool.cli._options import (
    Checkpoint,
    Device,
    ModelPreset,
    NoMetadata,
    Precision,
    Sigmas,
    Steps,
    Weights,
    check_class,
    parse_seeds,
    parse_sigmas,
    pick_device,
    pick_model,
    pick_precision,
    precision_info,
)
from cmtool.cli._output import emit, say
from cmtool.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.editing import Job
    from cmtool.models import Model

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Edit pictures; the model was never trained to.

    cmtool edit inpaint face.png --mask m.png > fixed.png

    cmtool edit superres small.png --factor 4 --compare --out both.png

    cat grey.png | cmtool edit colorize --variations 5 > five.png""",
)

Images = Annotated[
    list[str] | None, typer.Argument(help="Pictures; - or nothing in a pipe is stdin.")
]
ClassIndex = Annotated[
    int | None, typer.Option("--class", help="Class of a conditional model. Default: fits best.")
]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, another answer.")]
Variations = Annotated[
    int, typer.Option(min=1, help="Answers a picture, from seeds --seed, --seed + 1, ...")
]
Fit = Annotated[
    str,
    typer.Option(
        help="A picture of another size: exact refuses it, crop takes its centre, pad fills it up,"
        " tile works in overlapping tiles."
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="What was given, what the model saw, and the answer.")
]
Out = Annotated[
    str, typer.Option("--out", "-o", help="A .png, a folder (one file an answer), - for stdout.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


@app.command("inpaint")
def inpaint(
    images: Images = None,
    mask: Annotated[
        Path | None, typer.Option(help="Mask of the picture's size: white is regenerated.")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="Instead of a mask: LEFT,TOP,WIDTH,HEIGHT in pixels.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Instead of a mask: letters, as large as fits.")
    ] = None,
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Seed = 0,
    variations: Variations = 1,
    fit: Fit = "exact",
    compare: Compare = False,
    out: Out = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Regenerate the white part of a mask; every other pixel stays as it is.

    `cmtool edit inpaint digit.png --mask mask.png --out mended.png`

    `cat digit.png | cmtool edit inpaint --box 4,0,4,8 --seed 3 > mended.png`

    `cmtool edit inpaint digit.png --text S --variations 4 --compare > all.png`

    A class-conditional model takes --class; without it, the class that explains the known pixels
    best is used.
    """
    if sum(given is not None for given in (mask, box, text)) != 1:
        raise UserError("which part to regenerate", "give one of --mask, --box and --text")

    def make_job(picture: Tensor, model: Model, name: str) -> Job:
        from cmtool.data.images import read_image, text_mask
        from cmtool.editing import inpaint_job

        h, w = picture.shape[1:]
        if mask is not None:
            painted = read_image(mask, mode="L")
        elif text is not None:
            painted = text_mask(text, h, w)
        else:
            painted = box_mask(box or "", h, w)
        return inpaint_job(picture, painted, model, fit, name)

    edit_all("inpaint", make_job, Common(
        images, checkpoint, steps, sigmas, class_, seed, variations, fit, compare, out, overwrite,
        no_metadata, weights, preset, device, precision,
    ))  # fmt: skip


@app.command("superres")
def superres(
    images: Images = None,
    factor: Annotated[
        int, typer.Option(help="How many times larger; divides the model's size.")
    ] = 2,
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Seed = 0,
    variations: Variations = 1,
    fit: Fit = "exact",
    compare: Compare = False,
    out: Out = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Enlarge a picture; the means of the answer's blocks are its pixels.

    `cmtool edit superres small.png --factor 2 --out large.png`

    `cmtool edit superres photo.png --factor 4 --fit tile -c cd_bedroom256_lpips.pt > large.png`

    A picture of the model's own size is taken as one that was enlarged by repeating pixels: the
    means of its blocks are kept, and it is sharpened.
    """

    def make_job(picture: Tensor, model: Model, name: str) -> Job:
        from cmtool.editing import superres_job

        return superres_job(picture, factor, model, fit, name)

    edit_all("superres", make_job, Common(
        images, checkpoint, steps, sigmas, class_, seed, variations, fit, compare, out, overwrite,
        no_metadata, weights, preset, device, precision,
    ))  # fmt: skip


@app.command("colorize")
def colorize(
    images: Images = None,
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Seed = 0,
    variations: Variations = 1,
    fit: Fit = "exact",
    compare: Compare = False,
    out: Out = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Give a picture new colours; its luma stays.

    `cmtool edit colorize grey.png --variations 4 --compare --out colours.png`

    A picture in colour loses its colours first.
    """

    def make_job(picture: Tensor, model: Model, name: str) -> Job:
        from cmtool.editing import colorize_job

        return colorize_job(picture, model, fit, name)

    edit_all("colorize", make_job, Common(
        images, checkpoint, steps, sigmas, class_, seed, variations, fit, compare, out, overwrite,
        no_metadata, weights, preset, device, precision,
    ))  # fmt: skip


@app.command("stroke")
def stroke(
    images: Images = None,
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Seed = 0,
    variations: Variations = 1,
    fit: Fit = "exact",
    compare: Compare = False,
    out: Out = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Make a picture of a rough painting.

    `cmtool edit stroke painting.png --out picture.png`

    `cmtool edit stroke painting.png --sigmas 9.7,2.5 --variations 4 > four.png`

    It starts from the painting under noise of the first level: a higher one leaves less of it.
    """

    def make_job(picture: Tensor, model: Model, name: str) -> Job:
        from cmtool.editing import stroke_job

        return stroke_job(picture, model, fit, name)

    edit_all("stroke", make_job, Common(
        images, checkpoint, steps, sigmas, class_, seed, variations, fit, compare, out, overwrite,
        no_metadata, weights, preset, device, precision,
    ))  # fmt: skip


@app.command("denoise")
def denoise(
    images: Images = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Deviation of the noise, 1 being half of the range: 0.2 is 25 grey"
            " levels. Default: estimated."
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    class_: ClassIndex = None,
    seed: Seed = 0,
    fit: Fit = "exact",
    compare: Compare = False,
    out: Out = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Take white noise out of a picture, in one network call.

    `cmtool edit denoise noisy.png --sigma 0.25 --out clean.png`

    `cmtool edit denoise scans/*.png --out clean/`
    """  # fmt: skip

    def make_job(picture: Tensor, model: Model, name: str) -> Job:
        from cmtool.editing import denoise_job

        job = denoise_job(picture, sigma, model, fit, name)
        if sigma is None and job.levels:
            level = job.levels[0]
            say(f"{name}: sigma {level:.3g} ({127.5 * level:.0f} grey levels) by estimate")
        return job

    edit_all("denoise", make_job, Common(
        images, checkpoint, None, None, class_, seed, 1, fit, compare, out, overwrite,
        no_metadata, weights, preset, device, precision,
    ))  # fmt: skip


@app.command("interpolate")
def interpolate(
    images: Annotated[
        list[str] | None, typer.Argument(help="Two pictures; or none, and --seeds.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Two seeds: 3,7.")] = None,
    frames: Annotated[
        int, typer.Option(min=2, help="Pictures on the way, both ends included.")
    ] = 8,
    checkpoint: Checkpoint = None,
    steps: Steps = None,
    sigmas: Sigmas = None,
    class_: ClassIndex = None,
    seed: Annotated[int, typer.Option(min=0, help="Noise that pictures are mixed under.")] = 0,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A .png strip, an animated .gif or .webp, a folder, or - for the strip on stdout.",
        ),
    ] = "-",
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Go from one picture to another, or from one seed to another.

    `cmtool edit interpolate --seeds 3,7 --frames 12 --out strip.png`

    `cmtool edit interpolate --seeds 3,7 --frames 48 --out morph.gif`

    `cmtool edit interpolate a.png b.png --sigmas 5.1,2.5 > strip.png`

    Between seeds the noise travels a great circle. Pictures are mixed under noise of the first
    level: a high one mixes what they show, a low one their pixels.
    """  # fmt: skip
    ends = parse_seeds(seeds) if seeds is not None else []
    if (len(images or []), len(ends)) not in ((2, 0), (0, 2)):
        raise UserError(
            f"{len(images or [])} pictures and {len(ends)} seeds", "give two of one of them"
        )
    levels = parse_sigmas(sigmas)
    target = target_of(out, overwrite, (".png", ".gif", ".webp"))

    from cmtool.data.images import ANIMATIONS, animation_bytes, canvas, read_image
    from cmtool.editing import between_pictures, between_seeds, stroke_levels
    from cmtool.sampling import edit_plan, plan
    from cmtool.system.files import write_atomic

    where = pick_device(device)
    kept = pick_precision(precision, where)
    pictures = [read_image(read_input(image), image) for image in images or []]
    model = pick_model(checkpoint, weights, where, kind="consistency", preset=preset)
    check_class(class_, model.preset.model.num_classes)
    if pictures:
        for picture, name in zip(pictures, images or [], strict=True):
            h, w = picture.shape[1:]
            canvas(h, w, model.preset.model.image_size, "exact", name)
        chosen = edit_plan(model.preset, steps=steps, sigmas=levels, default=stroke_levels(model))
        chosen = chosen._replace(precision=kept)
        answers = between_pictures(model, chosen, (pictures[0], pictures[1]), frames, seed, class_)
    else:
        chosen = plan(model.preset, steps=steps, sigmas=levels)._replace(precision=kept)
        answers = between_seeds(model, chosen, (ends[0], ends[1]), frames, class_)
    about = {"cmtool:edit": "interpolate", "cmtool:model": model.sha256,
             "cmtool:ends": ",".join(images or map(str, ends)),
             "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)),
             **precision_info(chosen)}  # fmt: skip
    if target is not None and target.suffix.lower() in ANIMATIONS:
        write_atomic(target, animation_bytes(answers, target.suffix.lower()))
        emit(str(target))
        return
    names = [f"frame{index:04d}.png" for index in range(frames)]
    write_answers(out, target, names, list(answers), {} if no_metadata else about, overwrite)
