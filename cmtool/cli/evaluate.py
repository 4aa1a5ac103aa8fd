"""cmtool eval: numbers for images or for a model, with what they depend on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool import __version__
from cmtool.cli._options import (
    AsJson,
    Batch,
    Checkpoint,
    Device,
    KindOption,
    ModelPreset,
    Sampler,
    Sigmas,
    Steps,
    Weights,
    emit_json,
    pick_device,
    pick_model,
    pick_plan,
    say,
)
from cmtool.errors import InputError, ThresholdError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="Measure images, or what a model makes.")


@app.callback()
def _group() -> None:
    pass


@app.command("fid")
def fid(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="A folder, image files, a data set's name, or - for paths on stdin."),
    ] = None,
    checkpoint: Checkpoint = None,
    reference: Annotated[
        str, typer.Option(help="What to compare with: a data set or folder.")
    ] = "digits",
    num: Annotated[
        int | None, typer.Option(min=2, help="Images to use: all that are given; 2048 of a model.")
    ] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of a model's first image.")] = 0,
    steps: Steps = None,
    sigmas: Sigmas = None,
    sampler: Sampler = None,
    batch: Batch = 256,
    weights: Weights = "ema",
    preset: ModelPreset = None,
    kind: KindOption = None,
    device: Device = "auto",
    as_json: AsJson = False,
    fail_above: Annotated[float | None, typer.Option(help="Exit 8 if the value is larger.")] = None,
) -> None:
    """Print the Frechet distance between images and a reference, as one JSON object.

    `cmtool eval fid -c digits-cd`

    `cmtool eval fid -c digits-edm --num 2048`

    `cmtool sample --seeds 0-2047 | cmtool eval fid -`

    The features are those of the bundled digits classifier: the number is `fd-digits`, not the
    FID of papers. It falls with the number of images: compare equal numbers only.
    """
    if images and checkpoint is not None:
        raise UserError("both images and --checkpoint", "give one of them")
    if images == ["-"] or (images is None and checkpoint is None and not sys.stdin.isatty()):
        listed = [line for line in sys.stdin.read().splitlines() if line]
        if listed or images:
            images = listed
            if not images:
                raise InputError("no paths on stdin", "pipe them in, one a line")

    from cmtool.build import load_digits_features
    from cmtool.core.data import load_dataset
    from cmtool.core.images import from_uint8, to_uint8
    from cmtool.core.metrics import frechet_distance, statistics
    from cmtool.sampling import generate

    where = pick_device(device)
    features, features_hash = load_digits_features()
    features = features.to(where)
    target = load_dataset(reference)

    def floats(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        return (from_uint8(part).to(where) for part in parts)

    expected = statistics(features, floats(target.chunks(batch)))
    facts: dict[str, Any] = {}
    if images:
        pictures, facts["images"] = _given(images, num)
        measured = statistics(features, floats(pictures.split(batch)))
    else:
        model = pick_model(checkpoint, weights, where, said=kind, preset=preset)
        count = num or 2048
        chosen = pick_plan(model, sampler, None, steps, sigmas)
        drawn = generate(
            model.f, model.preset, chosen, range(first_seed, first_seed + count),
            batch=batch, device=where,
        )  # fmt: skip
        measured = statistics(features, (from_uint8(to_uint8(part)) for part in drawn))
        facts["model"] = {
            "source": model.source,
            "sha256": model.sha256,
            "weights": model.weights,
            "kind": model.kind,
        }
        facts["sampler"] = chosen.sampler.name
        facts["sigmas"] = chosen.sigmas
        facts["evaluations"] = chosen.evaluations
        facts["seeds"] = f"{first_seed}-{first_seed + count - 1}"
    value = frechet_distance(measured, expected)
    say(f"fd-digits {value:.4f} ({measured.num} images)")
    emit_json(
        {
            "metric": "fd-digits",
            "value": value,
            "num_images": measured.num,
            **facts,
            "reference": {
                "name": target.name,
                "images": len(target),
                "fingerprint": target.fingerprint(),
            },
            "features": {"name": "digits-features", "sha256": features_hash},
            "precision": "fp32",
            "cmtool": __version__,
        },
        compact=as_json,
    )
    if fail_above is not None and value > fail_above:
        raise ThresholdError(
            f"fd-digits {value:.4f} is above {fail_above:g}", "train longer, or use more --steps"
        )


def _given(images: list[str], num: int | None) -> tuple[Tensor, str]:
    """Return the images named on the command line (N, C, H, W) uint8, and how to call them."""
    import torch

    from cmtool.core.data import load_dataset
    from cmtool.core.images import read_image

    if len(images) == 1 and not Path(images[0]).is_file():
        data = load_dataset(images[0])
        return data.images[_some(len(data), num)], data.name
    pictures = [read_image(Path(path)) for path in images]
    for path, picture in zip(images, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"{path} is {picture.shape[2]}x{picture.shape[1]}, {images[0]} is"
                f" {pictures[0].shape[2]}x{pictures[0].shape[1]}",
                "give images of one size",
            )
    return torch.stack(pictures)[_some(len(pictures), num)], f"{len(pictures)} files"


def _some(count: int, num: int | None) -> Tensor:
    """Return the index of `num` of `count` images, the same random ones each time; or of all."""
    import torch

    from cmtool.core.rng import keyed_generator

    if num is None or num >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=keyed_generator("subset"))[:num]
