"""From a loaded model to a file: ours, or a diffusers pipeline; checked before it is in place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import safetensors
import torch

from cmtool import __version__
from cmtool.core.networks.adm import Adm
from cmtool.core.noise import karras_sigmas
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.errors import InputError, ResourceError, UserError, is_full
from cmtool.formats import diffusers_dir, native
from cmtool.formats.foreign import Malformed
from cmtool.models import Model, load_model
from cmtool.sampling import grid_size

PROBE_SIDE = 64


def convert(model: Model, out: Path, *, overwrite: bool = False, guide: Model | None = None) -> str:
    """Write the model to `out` and return the format: a .safetensors file of ours, else diffusers.

    It is written beside `out`, loaded again, and run beside the original on the same input; only
    when both give equal numbers does it take its name. What was there before stays until then.
    `guide` is what guides the model, for the record. Raises UserError, as check_out does, and
    InputError for a model the format cannot hold.
    """
    check_out(out, overwrite=overwrite)
    to_native = out.suffix == ".safetensors"
    temporary, old = (out.parent / f".{out.name}.{os.getpid()}.{end}" for end in ("tmp", "old"))
    try:
        if to_native:
            _write_native(model, temporary, guide)
        else:
            temporary.mkdir()
            _write_diffusers(model, temporary)
        check_equal(model, load_model(temporary, kind=model.kind))
        if not to_native and out.exists():
            out.rename(old)  # a folder cannot take the place of another
        temporary.rename(out)
    except (OSError, safetensors.SafetensorError) as error:
        if is_full(error):
            raise ResourceError(f"no room on the disk for {out}", "free disk space") from None
        if isinstance(error, safetensors.SafetensorError):
            raise InputError(f"cannot write {out}: {error}", "give another place") from None
        raise
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (temporary, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)
    return "native" if to_native else "diffusers"


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Raise UserError or InputError for a name that no model can be written to."""
    to_file = out.suffix in (".safetensors", ".onnx")
    hint = "give a .safetensors file, an .onnx file or a folder"
    if out.suffix.lower() in (".pt", ".pth", ".ckpt", ".pkl", ".bin"):
        raise UserError(f"{out}: cmtool writes no pickles", hint)
    if re.fullmatch(r"\.[A-Za-z]\w{0,11}", out.suffix) and not to_file and not out.is_dir():
        raise UserError(f"{out}: cmtool writes no {out.suffix} files", hint)
    if str(out) == "-":
        raise UserError("a model is not written to stdout", hint)
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} exists", "give another name, or --overwrite it")
    if out.exists() and not to_file and not (out / diffusers_dir.INDEX).is_file():
        raise InputError(f"{out} is no diffusers pipeline", "give another name")
    if to_file and out.is_dir():
        raise InputError(f"{out} is a folder", "give another name")


def _write_native(model: Model, path: Path, guide: Model | None) -> None:
    about = {
        "kind": model.kind,
        "weights": model.weights,
        "preset": model.preset.model_dump(mode="json"),
        "cmtool": __version__,
        "made": {**_origin(model), **({"guide": _origin(guide)} if guide else {})},
        **native.named_classes(model.class_names),
    }
    native.write_weights(path, dict(model.f.network.state_dict()), about)


def _origin(model: Model) -> dict[str, str]:
    return {"from": Path(model.source).name, "format": model.format, "sha256": model.sha256}


def _write_diffusers(model: Model, folder: Path) -> None:
    card, network = model.preset, model.f.network
    (h, w), label = card.model.image_size, card.model.noise_label.name
    reasons = {
        f"it is a {model.kind}": model.kind != "consistency",
        f"its network is {card.model.network.name!r}": not isinstance(network, Adm),
        f"its noise label is {label!r}": label != "log_1000",
        f"its images are {w}x{h}": h != w,
    }
    hint = "convert it to a .safetensors file instead"
    for reason, holds in reasons.items():
        if holds:
            what = f"a ConsistencyModelPipeline cannot hold this model: {reason}"
            raise InputError(what, hint)
    assert isinstance(network, Adm)
    facts = {"num_train_timesteps": grid_size(card), "sigma_data": card.model.sigma_data}
    scheduler = {**facts, **card.noise.model_dump()}  # sigma_min, sigma_max and rho
    sizes = {"channels": card.model.channels, "num_classes": card.model.num_classes}
    tensors = dict(network.state_dict())
    try:
        diffusers_dir.write(
            folder, network.options, tensors, **sizes, image_size=h, scheduler=scheduler
        )
    except Malformed as error:
        raise InputError(str(error), hint) from None


@torch.no_grad()
def check_equal(model: Model, other: Model) -> None:
    """Assert that two models are one: every tensor, and the answers at three noise levels."""
    ours, theirs = (dict(m.f.network.state_dict()) for m in (model, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), f"{name} changed on the way"
    card = model.preset
    sides = (min(side, PROBE_SIDE) for side in card.model.image_size)
    seeds = range(3)
    x = SeededNoise(seeds)(torch.empty(3, card.model.channels, *sides))
    sigma = karras_sigmas(3, *model.noise_range)
    labels = seeded_labels(seeds, card.model.num_classes) if card.model.num_classes else None
    x = x * sigma.to(x.dtype)[:, None, None, None]
    answers = [m.f.cpu()(x, sigma, labels) for m in (model, other)]
    assert torch.equal(*answers), "the converted model gives another answer"
