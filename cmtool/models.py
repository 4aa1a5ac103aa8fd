"""Models as they are loaded: from a bundled name, a run, a checkpoint, or a file of any format."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cmtool.core.networks import NETWORKS
from cmtool.core.noise import NoiseRange
from cmtool.core.precond import Preconditioned
from cmtool.errors import InputError, Stopped, UserError
from cmtool.formats import diffusers_dir, identify, read_foreign
from cmtool.formats.checkpoints import MANIFEST, newest_checkpoint, verify
from cmtool.formats.foreign import Foreign
from cmtool.formats.native import read_about, read_table, read_weights
from cmtool.presets.build import build_denoiser, build_network, noise_range
from cmtool.presets.schema import (
    Card,
    Choice,
    Kind,
    ModelSection,
    NoiseSection,
    Preset,
    SampleSection,
)
from cmtool.presets.toml import load_preset
from cmtool.presets.upgrade import of_kind, upgraded
from cmtool.system.devices import on_device
from cmtool.system.files import file_sha256

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("digits-edm", "digits-cd")
SAMPLING: dict[Kind, SampleSection] = {
    "teacher": SampleSection(sampler=Choice(name="heun"), steps=18),
    "consistency": SampleSection(sampler=Choice(name="multistep"), steps=1),
    "flow map": SampleSection(sampler=Choice(name="multistep"), steps=1),
}
"""How a model is sampled that does not say."""


@dataclass(frozen=True)
class Model:
    """A loaded model: `f` is a Denoiser, in eval mode, without gradients.

    `preset` is a whole Preset for models trained with cmtool, else a Card. `held` are the choices
    of weights where the model came from, `notes` what had to be assumed about it.
    """

    f: Preconditioned
    preset: Card
    kind: Kind
    source: str
    sha256: str
    weights: str
    format: str = "native"
    held: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kind_is_said: bool = True

    @property
    def noise_range(self) -> NoiseRange:
        """The noise levels the model was trained on."""
        return noise_range(self.preset)


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    weights: str = "ema",
    kind: Kind | None = None,
    preset: str | None = None,
    otherwise: Kind | None = None,
) -> Model:
    """Return a model from a bundled name, a run, a checkpoint, or a weight file of any format.

    The format is found by content. `weights` chooses among a checkpoint's files: an EMA by name,
    or "model" for the raw weights; "ema" also stands for the only EMA of another name, and for
    "model" where there is none. `kind` overrides what the file says of itself, `otherwise` stands
    in where it says nothing, and `preset` (a name or path) says what a foreign file cannot: image
    size, noise range, head width, how to sample. Raises InputError for a path that is no model,
    UserError when the kind remains unknown.
    """
    file = find_weights(path, weights)
    name = identify(file)
    if name == "native":
        if preset is not None:
            raise UserError(f"--preset {preset} for {path}", "the file has its own: leave it out")
        card, said, tensors, held = _read_native(file)
        foreign = None
    else:
        wanted = load_preset(preset) if preset is not None else None
        known = _known(wanted) | ({} if kind is None else {"kind": kind})
        foreign = read_foreign(file, weights, known)
        try:
            card = _card(foreign, wanted)
        except ValidationError as error:
            first_error = error.errors()[0]
            key = ".".join(map(str, first_error["loc"])) or "noise"
            raise InputError(
                f"{file} has a bad {key}: {first_error['msg'].lower()}", "fetch it again"
            ) from None
        said, tensors, held = foreign.kind, foreign.tensors, foreign.weights
    chosen = kind or said or otherwise
    notes = foreign.notes if foreign else ()
    if kind is None and said is None and otherwise is not None:
        notes = (*notes, f"the file does not say its kind: taken as a {otherwise} model; or --kind")
    if chosen is None:
        raise UserError(
            f"{path} does not say if it is a teacher or a consistency model",
            "say it: --kind teacher or --kind consistency",
        )
    card = as_kind(card, chosen)
    with torch.device("meta"):
        try:
            network = build_network(card.model)
        except Stopped:
            raise
        except UserError as error:
            raise InputError(f"{file} names no network: {error.what}", error.hint) from None
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise InputError(f"{file} is not the network it names: {first}", "make it again") from None
    try:
        f = build_denoiser(card, network)
    except Stopped:
        raise
    except UserError as error:
        raise InputError(f"{file} names no model: {error.what}", error.hint) from None
    f = on_device(f, device).eval().requires_grad_(False)
    choices = foreign.held if foreign else _siblings(file, held)
    is_said = (kind or said) is not None
    sha256 = digest(file)
    levels = card.sample.levels | searched_levels(path, weights, sha256)
    card = card.model_copy(update={"sample": card.sample.model_copy(update={"levels": levels})})
    return Model(f, card, chosen, str(path), sha256, held, name, choices, notes, is_said)


def as_kind(card: Card, kind: Kind) -> Card:
    """Return the card of a model that is taken for one of another kind: its sampler, its scalings.

    A teacher has EDM's scalings, unless its file says others; a consistency model has its boundary
    at sigma_min.
    """
    if card.kind == kind:
        return card
    name = card.model.scalings.name
    if kind == "consistency":
        name = "consistency"
    elif name == "consistency":
        name = "edm"
    return Card(
        description=card.description, kind=kind, noise=card.noise,
        model=card.model.model_copy(update={"scalings": Choice(name=name)}),
        sample=SAMPLING[kind].model_copy(update={"grid": card.sample.grid}),
    )  # fmt: skip


def _siblings(file: Path, held: str) -> tuple[str, ...]:
    """Return the weights that stand beside a file in its checkpoint, itself included."""
    if not (file.parent / MANIFEST).is_file():
        return (held,)
    return tuple(sorted(f.stem for f in file.parent.glob("*.safetensors") if f.stem != "optimizer"))


def _read_native(file: Path) -> tuple[Card, Kind | None, dict[str, Tensor], str]:
    """Return card, kind, tensors (float32) and the name of the weights of a file of ours."""
    about = read_about(file)
    try:
        section = Preset if "loss" in about["preset"] else Card
        said, held = about["kind"], about["weights"]
        tables = upgraded(about["preset"])
        card = section.model_validate(tables if "kind" in tables else of_kind(tables, said))
        if said not in SAMPLING or not re.fullmatch(r"[\w-]{1,60}", held):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError):
        raise InputError(
            f"{file} does not hold a denoiser", "give a model made by cmtool train or distill"
        ) from None
    tensors = read_weights(file)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{file} holds {name} as {tensor.dtype}", "make it again")
    return card, said, {name: t.float() for name, t in tensors.items()}, held


def _known(preset: Preset | None) -> dict[str, Any]:
    """Return what a preset says of a model whose file says less."""
    if preset is None:
        return {}
    model = preset.model
    known = {
        "image_size": model.image_size, "kind": preset.kind, "sigma_data": model.sigma_data,
    }  # fmt: skip
    options = model.network.options
    return known | {k: v for k, v in options.items() if k == "head_channels"}


def _card(foreign: Foreign, preset: Preset | None) -> Card:
    """Return the card of a foreign model. Raises InputError where file and preset disagree."""
    if foreign.image_size is None:
        raise UserError("the file does not give the image size", "say it with --preset")
    kind = foreign.kind or (preset.kind if preset is not None else "teacher")
    name = next(n for n, row in NETWORKS.items() if row.options is type(foreign.options))
    default = type(foreign.options)()
    given = {k: v for k, v in asdict(foreign.options).items() if v != getattr(default, k)}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    model = ModelSection(
        network=Choice(name=name, **options),
        image_size=foreign.image_size,
        channels=foreign.channels,
        num_classes=foreign.num_classes,
        sigma_data=foreign.sigma_data,
        noise_label=Choice.model_validate(foreign.noise_label),
        scalings=Choice(name="consistency" if kind == "consistency" else foreign.scalings),
    )
    if preset is not None:
        check_same_network(model, preset.model)
        kept: dict[str, Any] = {"sigma_data": preset.model.sigma_data}
        if kind == preset.kind != "teacher":
            kept |= {"scalings": preset.model.scalings}
        return Card(
            description=preset.description, kind=kind, noise=preset.noise, sample=preset.sample,
            model=model.model_copy(update=kept),
        )  # fmt: skip
    noise = NoiseSection(sigma_min=foreign.sigma_min, sigma_max=foreign.sigma_max, rho=foreign.rho)
    sample = SAMPLING[kind].model_copy(update={"grid": foreign.grid})
    return Card(kind=kind, model=model, noise=noise, sample=sample)


def check_same_network(found: ModelSection, named: ModelSection) -> None:
    """Raise InputError unless both sections describe one network, dropout excepted."""
    sides = []
    for section in (found, named):
        kind = NETWORKS[section.network.name]
        defaults = {field.name: field.default for field in fields(kind.options)}
        sides.append({
            "network": section.network.name, "channels": section.channels,
            "num_classes": section.num_classes, **defaults, **section.network.options,
        })  # fmt: skip
    ours, theirs = sides
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = (side.get(key) for side in sides)
        a, b = (tuple(v) if isinstance(v, list) else v for v in (a, b))
        if key != "dropout" and a != b:
            raise InputError(
                f"the file has {key} {a}, the preset {b}", "give a preset of the file's network"
            )


def digest(path: Path) -> str:
    """Return the sha256 of a file; of a pipeline folder, that of its files' names and hashes."""
    if path.is_file():
        return file_sha256(path)
    whole = hashlib.sha256()
    for file in diffusers_dir.files(path):
        whole.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
    return whole.hexdigest()


def levels_file(path: str | Path, weights: str = "ema") -> Path | None:
    """Return the file beside a model's weights that holds its searched levels.

    None for the models that come with cmtool, which nobody changes.
    """
    file = find_weights(path, weights)
    if file.parent == ASSETS:
        return None
    return file / "levels.json" if file.is_dir() else file.with_name(f"{file.name}.levels.json")


def searched_levels(path: str | Path, weights: str, sha256: str) -> dict[str, list[float]]:
    """Return the levels by number of steps that `cmtool search` found for this very model."""
    file = levels_file(path, weights)
    if file is None or not file.is_file():
        return {}
    try:
        found = read_table(file, most=16 << 20)
        same = found["model"] == sha256
        levels = {str(n): [float(s) for s in sigmas] for n, sigmas in found["levels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} holds no searched levels", "remove it") from None
    return levels if same else {}


def find_weights(path: str | Path, weights: str = "ema") -> Path:
    """Return the weight file that a bundled name, run, checkpoint or file stands for."""
    if str(path) in BUNDLED and not Path(path).exists():
        return ASSETS / f"{path}.safetensors"
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"no model {str(path)!r}",
            f"give a run folder, a weight file, or one of {', '.join(BUNDLED)}",
        )
    if path.is_file() or (path / diffusers_dir.INDEX).is_file():
        return path
    folder: Path | None = path
    if (path / "checkpoints").is_dir():
        folder, _ = newest_checkpoint(path / "checkpoints")
    if folder is None or not (folder / "model.safetensors").is_file():
        raise InputError(f"no checkpoint in {path}", "give a run folder or a checkpoint folder")
    verify(folder)
    file = folder / f"{weights}.safetensors"
    if not file.is_file() and weights == "ema":  # one EMA of another name, or none at all
        emas = sorted(folder.glob("ema-*.safetensors"))
        file = emas[0] if len(emas) == 1 else folder / "model.safetensors" if not emas else file
    if not file.is_file():
        held = sorted(f.stem for f in folder.glob("*.safetensors") if f.stem != "optimizer")
        raise InputError(f"{folder} holds no weights {weights!r}", f"it holds {', '.join(held)}")
    return file
