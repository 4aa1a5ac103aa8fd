"""From a model to an ONNX file that draws images in few calls: noise and classes in, images out."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmtool import __version__
from cmtool.core.networks.truncated import Truncated
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.core.samplers import clipped, multistep
from cmtool.errors import InputError, MissingError
from cmtool.models import Model
from cmtool.sampling import Plan

OPSET = 20
CLOSE = 1e-4
"""How far ONNX Runtime's pixels, in [-1, 1], may be from ours."""


class Drawing(nn.Module):
    """Multistep sampling as one network: unit noise (n, B, C, H, W) -> images (B, C, H, W)."""

    def __init__(self, model: Model, chosen: Plan) -> None:
        super().__init__()
        f = copy.deepcopy(model.f).cpu().to(memory_format=torch.contiguous_format)
        self.fs = nn.ModuleList(one_network(f, chosen.sigmas))
        self.sigmas, self.sigma_min = chosen.sigmas, model.noise_range.sigma_min

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images in [-1, 1]; noise[i] is that of the i-th level."""
        draws, fs = iter(noise.unbind(0)), iter(self.fs)

        def f(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
            return next(fs)(x, sigma, *given)

        return multistep(
            clipped(f), torch.zeros_like(noise[0]), self.sigmas, lambda _: next(draws),
            sigma_min=self.sigma_min, labels=labels,
        )  # fmt: skip


def one_network(f: Preconditioned, sigmas: Sequence[float]) -> list[Preconditioned]:
    """Return the model for each level: of one with two networks, it has the level's alone."""
    if not isinstance(f.network, Truncated):
        return [f] * len(sigmas)
    sides = {}
    for is_below in (False, True):
        sides[is_below] = copy.copy(f)
        sides[is_below]._modules = {"network": f.network.below if is_below else f.network.above}
    labels = f.noise_label(torch.tensor(sigmas, dtype=torch.float64)).float()
    return [sides[bool(label < f.network.label)] for label in labels]


def check_exportable(model: Model) -> None:
    """Raise InputError for a teacher, which takes many calls, MissingError without ONNX."""
    if model.kind == "teacher":
        hint = "distill it first: an ONNX file draws in a few calls"
        raise InputError(f"{model.source} is a {model.kind} model", hint)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        what = f"an ONNX file needs the package {error.name}"
        raise MissingError(what, "pip install 'cmtool[onnx]'") from None


def export_onnx(model: Model, chosen: Plan, path: Path) -> float:
    """Write the model's sampler to `path`, and return the largest error of ONNX Runtime.

    Inputs are `noise` (n, B, C, H, W) float32, for the n levels, and for a model with classes
    `labels` (B,) int64; the output is `images` (B, C, H, W) in [-1, 1]. B may be anything. The file
    appears when ONNX Runtime's images, of two batches, are within CLOSE of ours. Raises InputError
    otherwise, and what `check_exportable` raises.
    """
    check_exportable(model)
    drawing = Drawing(model, chosen).eval()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(drawing, model, chosen, temporary)
        error = max(_error(drawing, model, temporary, count) for count in (1, 3))
        if not error <= CLOSE:
            what = f"ONNX Runtime's images are {error:.2g} from ours; {CLOSE:g} is allowed"
            raise InputError(what, "convert it to a .safetensors file instead")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def _probe(model: Model, steps: int, count: int) -> dict[str, Tensor]:
    """Return inputs for so many images."""
    card, seeds = model.preset.model, range(count)
    shape = (count, card.channels, *card.image_size)
    draw = SeededNoise(seeds)
    inputs = {"noise": torch.stack([draw(torch.empty(shape)) for _ in range(steps)])}
    if card.num_classes:
        inputs["labels"] = seeded_labels(seeds, card.num_classes)
    return inputs


@torch.no_grad()
def _write(drawing: Drawing, model: Model, chosen: Plan, path: Path) -> None:
    import onnx

    inputs = _probe(model, len(chosen.sigmas), 3)
    batch = torch.export.Dim("batch", min=1)
    places = {"noise": 1, "labels": 0}
    shapes = {name: {places[name]: batch} for name in inputs}
    with _quiet():
        traced = torch.export.export(
            drawing, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
        )
        program: Any = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["images"],
            external_data=False,
        )
    proto = program.model_proto
    about = {
        "cmtool": __version__,
        "sigmas": json.dumps(chosen.sigmas),
        "range": "images are in [-1, 1]",
        "preset": json.dumps(model.preset.model_dump(mode="json")),
        "sha256": model.sha256,
    }
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, path)


@torch.no_grad()
def _error(drawing: Drawing, model: Model, path: Path, count: int) -> float:
    """Return how far ONNX Runtime's images of a file are from ours."""
    import onnxruntime

    inputs = _probe(model, len(drawing.sigmas), count)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return float((torch.from_numpy(images) - drawing(**inputs)).abs().max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk from the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
