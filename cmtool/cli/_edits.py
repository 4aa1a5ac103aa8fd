"""What the edit commands share: their options, pictures in, one edit of each, pictures out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli import _options as shared
from cmtool.cli._devices import pick_device, pick_precision
from cmtool.cli._output import check_free, prepare_output, read_stdin, say, write_bytes
from cmtool.cli._show import Show, show
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.models import Model
    from cmtool.prepared import PreparedEdit

Prepare = Callable[..., "PreparedEdit"]
"""`(model, images, *, fit, name) -> PreparedEdit`, of images (1, C, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of every edit: the model, how it runs, and what may be overwritten."""

    checkpoint: shared.Checkpoint = None
    steps: shared.Steps = None
    sigmas: shared.Sigmas = None
    class_: Annotated[
        str | None,
        Option(
            "--class",
            help="Class of a conditional model, a number or a name. Default: the class that fits"
            " best.",
            autocompletion=_completion.classes,
        ),
    ] = None
    overwrite: shared.Overwrite = False
    show: Show = False
    no_metadata: shared.NoMetadata = False
    weights: shared.Weights = "ema"
    preset: shared.ModelPreset = None
    device: shared.Device = "auto"
    precision: shared.Precision = "fp32"

    def load(self) -> tuple[Model, str]:
        """Return the model and the precision to run it in. Raises UserError, InputError."""
        where = pick_device(self.device)
        precision = pick_precision(self.precision, where)
        model = shared.pick_model(
            self.checkpoint, self.weights, where, kind="consistency", preset=self.preset
        )
        self.label(model)
        return model, precision

    def label(self, model: Model) -> int | None:
        """Return the number of --class. Raises UserError for one that the model does not have."""
        if self.class_ is None:
            return None
        classes = shared.parse_classes(self.class_, model)
        if len(classes) > 1:
            raise UserError(f"--class {self.class_!r} of a picture", "give one class")
        return classes[0]


@dataclass(frozen=True)
class EditOptions(ModelOptions):
    """Options of the edits of single pictures."""

    images: Annotated[
        list[str] | None, Argument(help="Pictures; - or nothing in a pipe is stdin.")
    ] = None
    seed: Annotated[
        int, Option(min=0, help="Seed of the noise. Another seed gives another answer.")
    ] = 0
    variations: Annotated[
        int, Option(min=1, help="Answers per picture, from seeds --seed, --seed + 1, ...")
    ] = 1
    fit: Annotated[
        str,
        Option(
            help="What to do with a picture of another size: exact refuses it, resize brings it to"
            " the model's, crop takes its centre, pad fills it up, tile works in overlapping tiles."
        ),
    ] = "exact"
    compare: Annotated[
        bool, Option("--compare", help="Show what was given, what the model saw, and the answer.")
    ] = False
    out: Annotated[
        str, Option("--out", "-o", help="A .png, a folder (one file per answer), or - for stdout.")
    ] = "-"


class Output(NamedTuple):
    """Where answers go: --out, whether they may replace files, and whether the terminal too."""

    out: str
    overwrite: bool
    show: bool = False

    @property
    def is_one_file(self) -> bool:
        """Whether all goes into one picture, or to stdout, and not into a folder."""
        return self.out == "-" or Path(self.out).suffix.lower() in (".png", ".gif", ".webp")

    def check(self, names: list[str]) -> None:
        """Raise UserError for a file in the folder that exists and may not be overwritten."""
        for name in names if not self.is_one_file else []:
            check_free(Path(self.out) / name, self.overwrite)

    def write(
        self, names: list[str], answers: Tensor, about: dict[str, str], before: list[Tensor]
    ) -> None:
        """Write answers (n, C, H, W) uint8 beside each other, or into a folder, a file each.

        The pictures `before` stand to the left of the answers. Prints what was written.
        """
        from cmtool.data.drawing import png_bytes, row

        if self.show:
            show([*before, *answers])
        if self.is_one_file:
            write_bytes(self.out, png_bytes(row([*before, *answers]), about), tell=True)
            return
        for name, answer in zip(names, answers, strict=True):
            path = Path(self.out) / name
            check_free(path, self.overwrite)
            write_bytes(str(path), png_bytes(row([*before, answer]), about), tell=True)

    def write_frames(self, frames: Tensor, about: dict[str, str]) -> None:
        """Write frames (n, C, H, W) uint8 as an animation, if that is asked for, or as answers."""
        from cmtool.data.drawing import ANIMATIONS, animation_bytes

        if (suffix := Path(self.out).suffix.lower()) in ANIMATIONS:
            if self.show:
                show(list(frames))
            write_bytes(self.out, animation_bytes(frames, suffix), tell=True)
        else:
            self.write([f"frame{i:04d}.png" for i in range(len(frames))], frames, about, [])


def edit_pictures(name: str, row: Callable[..., Prepare], options: EditOptions, **own: Any) -> None:
    """Run one edit on every picture; everything is checked before the first answer is made."""
    sigmas = shared.parse_sigmas(options.sigmas)
    sources = options.images or ["-"]
    contents = {source: read_input(source) for source in sources}
    prepare_output(options.out, options.overwrite, (".png",))
    output = Output(options.out, options.overwrite, options.show)
    if len(sources) > 1 and output.is_one_file:
        raise UserError(f"{len(sources)} pictures and --out {options.out}", "give a folder")
    names = _answer_names(sources, options.variations)
    prepare = row(**own)

    from cmtool.data.decoding import read_image
    from cmtool.data.images import from_uint8, to_uint8
    from cmtool.prepared import provenance, run_prepared
    from cmtool.sampling import best_class, edit_plan

    pictures = {source: read_image(contents[source], _shown(source)) for source in names}
    model, precision = options.load()
    if model.preset.model.channels == 1:
        pictures = {source: read_image(contents[source], _shown(source), "L") for source in names}
    prepared = {
        source: prepare(model, from_uint8(picture[None]), fit=options.fit, name=_shown(source))
        for source, picture in pictures.items()
    }
    output.check([name for group in names.values() for name in group])
    seeds = range(options.seed, options.seed + options.variations)
    for source, edit in prepared.items():
        chosen = edit_plan(model.preset, options.steps, sigmas, edit.levels)
        chosen = chosen._replace(precision=precision)
        label = options.label(model)
        if label is None:
            label = best_class(model, edit.edit, chosen, options.seed)
            if label is not None:
                say(f"{_shown(source)}: class {label} fits best; choose with --class")
        answers = to_uint8(run_prepared(edit, model, chosen, seeds, label)).cpu()
        about = provenance(name, model, chosen, options.seed, label)
        panels = [to_uint8(p[0]).cpu() for p in (edit.panels if options.compare else ())]
        output.write(names[source], answers, {} if options.no_metadata else about, panels)


def interpolate_between(
    options: ModelOptions, images: list[str], ends: list[int], frames: int, seed: int, out: str
) -> None:
    """Write the pictures between two images, or between two seeds."""
    sigmas = shared.parse_sigmas(options.sigmas)
    prepare_output(out, options.overwrite, (".png", ".gif", ".webp"))

    from cmtool.data.decoding import read_image
    from cmtool.data.images import from_uint8, to_uint8
    from cmtool.editing import between_images, between_seeds
    from cmtool.prepared import stroke_levels
    from cmtool.sampling import edit_plan, plan, precision_info

    contents = [read_input(image) for image in images]
    pictures = [read_image(*given) for given in zip(contents, images, strict=True)]
    model, precision = options.load()
    if model.preset.model.channels == 1:
        pictures = [read_image(*given, "L") for given in zip(contents, images, strict=True)]
    label = options.label(model)
    if pictures:
        chosen = edit_plan(model.preset, options.steps, sigmas, stroke_levels(model))
        chosen = chosen._replace(precision=precision)
        given = [from_uint8(picture) for picture in pictures]
        drawn = between_images(model, chosen, given, frames, seed, label, images)
    else:
        chosen = plan(model.preset, options.steps, sigmas)._replace(precision=precision)
        drawn = between_seeds(model, chosen, (ends[0], ends[1]), frames, label)
    about = {
        "cmtool:edit": "interpolate", **model.told(),
        "cmtool:ends": ",".join(images or map(str, ends)),
        "cmtool:sigmas": ",".join(map(repr, chosen.sigmas)), **precision_info(chosen),
    }  # fmt: skip
    output = Output(out, options.overwrite, options.show)
    output.write_frames(to_uint8(drawn).cpu(), {} if options.no_metadata else about)


def read_input(image: str) -> bytes:
    """Return the bytes of a picture. Raises InputError when there are none."""
    from cmtool.data.decoding import MAX_FILE
    from cmtool.system.files import read_regular

    if image != "-":
        if not Path(image).exists():
            raise InputError(f"no such image: {image}", "check the path")
        return read_regular(image, MAX_FILE)
    if sys.stdin.isatty():
        raise UserError("no image given", "name a file, or pipe one in")
    content = read_stdin()
    if not content:
        raise InputError("nothing on stdin", "pipe an image in, or name a file")
    return content


def _shown(source: str) -> str:
    return "the image on stdin" if source == "-" else source


def _answer_names(sources: list[str], variations: int) -> dict[str, list[str]]:
    """Return the file names of each picture's answers. Raises UserError for a name that repeats."""
    names, every = {}, []
    for source in sources:
        stem = "edited" if source == "-" else Path(source).stem
        numbers = [""] if variations == 1 else [f"-{i}" for i in range(variations)]
        names[source] = [f"{stem}{number}.png" for number in numbers]
        every += names[source]
    if len(set(every)) < len(every):
        raise UserError("two pictures of one name", "their answers would be one file: rename one")
    return names
