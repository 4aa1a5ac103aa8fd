"""Models as they are loaded: from a bundled name, a run, a checkpoint, or a file of any format."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from cmtool.core.networks import NETWORKS
from cmtool.core.noise import NoiseRange
from cmtool.core.precond import Preconditioned
from cmtool.data.datasets import DATASETS
from cmtool.errors import InputError, MissingError, Stopped, UserError
from cmtool.formats import read_foreign
from cmtool.formats.checkpoints import Found, find, weights_in
from cmtool.formats.foreign import Foreign
from cmtool.formats.native import class_names_in, read_about, read_table, read_weights
from cmtool.presets.build import SAMPLING, build_denoiser, build_network, noise_range
from cmtool.presets.schema import Card, Choice, Kind, ModelSection, NoiseSection, Preset
from cmtool.presets.toml import load_preset
from cmtool.presets.upgrade import of_kind, upgraded
from cmtool.system.devices import on_device, shapes_only
from cmtool.system.files import expanded, read_own
from cmtool.weights import PUBLISHED

PREFIX = "hf:"
"""How the name of a model of a hub begins."""
ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("emoji-cmt", "emoji-edm", "digits-edm", "digits-cmt", "digits-cd")
SCALINGS_OF: dict[Kind, str] = {"teacher": "edm", "consistency": "consistency", "flow map": "edm"}
"""The scalings of a model whose file does not say them."""
TRAINING_ONLY = {"dropout", "dropout_res"}
"""Options of networks that only training uses."""


@dataclass(frozen=True)
class Model:
    """A loaded model: `f` is a Denoiser, in eval mode, without gradients.

    `preset` is a whole Preset for models trained with cmtool, else a Card. `held` are the names of
    all weights where the model came from, `notes` what had to be assumed about it. `levels_file`
    is for searched noise levels; a bundled model has none. `class_names` are those that are known.
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
    levels_file: Path | None = None
    class_names: tuple[str, ...] = ()

    @property
    def bundled_data(self) -> str:
        """The bundled data set that the model was trained on; the digits, if on none."""
        path = self.preset.data.path if isinstance(self.preset, Preset) else ""
        known = path.partition(":")[0]
        return known if known in DATASETS else "digits"

    @property
    def noise_range(self) -> NoiseRange:
        """The noise levels the model was trained on."""
        return noise_range(self.preset)

    def told(self) -> dict[str, str]:
        """Return what a picture says of its model; of one of a hub also the name, with its commit.

        Other names are places on this machine, which are nobody else's business.
        """
        about = {"cmtool:model": self.sha256, "cmtool:weights": self.weights}
        return about | ({"cmtool:source": self.source} if self.source.startswith(PREFIX) else {})


class Stored(NamedTuple):
    """A model as its file tells it; `kind` is None if the file does not say it."""

    card: Card
    kind: Kind | None
    tensors: dict[str, Tensor]
    weights: str
    held: tuple[str, ...]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


def load_model(
    name_or_path: str | Path,
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
    found, passed_over, source = find_model(name_or_path, weights)
    if found.format != "native":
        stored = _read_foreign(found, weights, kind, preset)
    elif preset is not None:
        raise UserError(f"--preset {preset} for {name_or_path}", "the file has one: leave it out")
    else:
        stored = _read_native(found.path)
    card, guessed = with_kind(stored, name_or_path, kind, otherwise)
    f = _denoiser(found.path, card, stored.tensors)
    is_ours = found.path.parent != ASSETS and not source.startswith(PREFIX)
    levels_file = found.levels_file if is_ours else None
    card = _with_searched_levels(card, levels_file, found)
    return Model(
        f=on_device(f, device).eval().requires_grad_(False),
        preset=card,
        kind=card.kind,
        source=source,
        sha256=found.sha256,
        weights=stored.weights,
        format=found.format,
        held=stored.held,
        notes=(*passed_over, *stored.notes, *guessed),
        kind_is_said=not guessed,
        levels_file=levels_file,
        class_names=stored.class_names[: card.model.num_classes],
    )


class FoundModel(NamedTuple):
    """Weights that a name stands for, what to say of them, and what they are to be called."""

    weights: Found
    notes: tuple[str, ...]
    source: str


def find_model(name_or_path: str | Path, weights: str = "ema") -> FoundModel:
    """Return the weights of a bundled or published name, a model of the hub, or a path.

    The notes say why newer checkpoints are passed over. Raises InputError where there is no model,
    MissingError for a published one that is not on this machine, and what `hub.fetched` raises.
    """
    name = str(name_or_path)
    path = expanded(name)
    if path.exists():
        found, passed_over = find(path, weights)
        said = name if Path(name) == path else str(path)
        return FoundModel(found, tuple(f"passed over: {what}" for what in passed_over), said)
    if name in BUNDLED:
        return FoundModel(Found(ASSETS / f"{name}.safetensors"), (), name)
    if name in PUBLISHED:
        wanted = PUBLISHED[name]
        if not wanted.path.is_file():
            what, more = f"{name} is not on this machine: {wanted.what}", " --accept-terms"
            hint = f"cmtool weights get {name}{more * wanted.wants_consent}"
            raise MissingError(what, hint)
        return FoundModel(find(wanted.path, weights)[0], (), name)
    if name.startswith(PREFIX):
        from cmtool.hub import fetched

        there = fetched(name)
        return FoundModel(find(there.path, weights)[0], there.notes, there.source)
    if re.match(r"https?:/", name):
        hint = "download its weight file first, then name the file; a model of a hub is hf:ORG/NAME"
        raise InputError(f"{name} is on the network, and no model is downloaded", hint)
    hint = f"name a run folder, a weight file, or a bundled model: {', '.join(BUNDLED)}"
    hint += f". A model of a hub: -c {PREFIX}{name}" * bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    raise InputError(f"no model {name!r}: there is no such file or folder", hint)


def with_kind(
    stored: Stored, source: str | Path, said: Kind | None, otherwise: Kind | None
) -> tuple[Card, tuple[str, ...]]:
    """Return the card with its kind, and a note if that is a guess. Raises UserError if unsaid."""
    chosen = said or stored.kind or otherwise  # the user's word overrides the file's
    if chosen is None:
        what = f"{source} does not say if it is a teacher or a consistency model"
        raise UserError(what, "add --kind teacher or --kind consistency")
    note = f"the file does not say its kind: read as a {chosen} model (--kind overrides it)"
    return as_kind(stored.card, chosen), () if said or stored.kind else (note,)


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


def _denoiser(path: Path, card: Card, tensors: dict[str, Tensor]) -> Preconditioned:
    """Return the denoiser of a card with these tensors. Raises InputError if they do not fit."""
    try:
        with shapes_only():
            network = build_network(card.model)
        network.load_state_dict(tensors, assign=True)
        return build_denoiser(card, network)
    except Stopped:
        raise
    except UserError as error:
        raise InputError(f"{path} describes no model: {error.what}", error.hint) from None
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} is not the network it names: {first}", "make it again") from None


def _read_native(file: Path) -> Stored:
    """Return what a file of ours holds, with tensors in float32."""
    about = read_about(file)
    try:
        section = Preset if "loss" in about["preset"] else Card
        kind, weights = about["kind"], about["weights"]
        tables = upgraded(about["preset"])
        card = section.model_validate(tables if "kind" in tables else of_kind(tables, kind))
        if kind not in SAMPLING or not re.fullmatch(r"[\w-]{1,60}", weights):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError):
        hint = "give a model made by cmtool train or distill"
        raise InputError(f"{file} does not hold a denoiser", hint) from None
    tensors = read_weights(file)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{file} holds {name} as {tensor.dtype}", "make it again")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    names = class_names_in(about) or _recorded_names(file)
    return Stored(card, kind, tensors, weights, weights_in(file.parent) or (weights,), (), names)


def _recorded_names(file: Path) -> tuple[str, ...]:
    """Return the names of classes in the run.json of a checkpoint's run: cmtool 0.1 had no others.

    () if there are none.
    """
    record = file.absolute().parent.parent.parent / "run.json"
    try:
        return class_names_in(json.loads(read_own(record)))
    except (OSError, ValueError, RecursionError, AttributeError, InputError):
        return ()


def _read_foreign(found: Found, weights: str, kind: Kind | None, preset: str | None) -> Stored:
    """Return what a foreign file holds; `kind` and `preset` are the user's."""
    wanted = load_preset(preset) if preset is not None else None
    known: dict[str, Any] = {}
    if wanted is not None:
        options = wanted.model.network.options
        known = {key: options[key] for key in ("head_channels",) if key in options}
        known |= {"image_size": wanted.model.image_size, "sigma_data": wanted.model.sigma_data}
        known["kind"] = wanted.kind
    if kind is not None:
        known["kind"] = kind
    foreign = read_foreign(found.format, found.path, weights, known)
    try:
        card = _card(foreign, wanted)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "noise"
        what = f"{found.path} has a bad {key}: {first['msg'].lower()}"
        raise InputError(what, "download it again") from None
    read = weights if weights in foreign.held else foreign.held[0]
    return Stored(card, foreign.kind, foreign.tensors, read, foreign.held, foreign.notes)


def _card(foreign: Foreign, preset: Preset | None) -> Card:
    """Return the card of a foreign model. Raises InputError where file and preset disagree."""
    if foreign.image_size is None:
        raise UserError("the file does not give the image size", "give a --preset that does")
    kind = foreign.kind or (preset.kind if preset is not None else "teacher")
    name = next(n for n, row in NETWORKS.items() if row.options is type(foreign.options))
    default = type(foreign.options)()
    given = {k: v for k, v in asdict(foreign.options).items() if v != getattr(default, k)}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    same = ("image_size", "channels", "num_classes", "sigma_data")
    model = ModelSection(
        **{key: getattr(foreign, key) for key in same},
        network=Choice(name=name, **options),
        noise_label=Choice.model_validate(foreign.noise_label),
        scalings=Choice(name=foreign.scalings or SCALINGS_OF[kind]),
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
    for key in sorted({key for side in sides for key in side} - TRAINING_ONLY):
        values = (side.get(key) for side in sides)
        a, b = (tuple(v) if isinstance(v, list) else v for v in values)
        if a != b:
            what = f"the file has {key} {a}, the preset {b}"
            raise InputError(what, "give a preset of the file's network")


def _with_searched_levels(card: Card, file: Path | None, found: Found) -> Card:
    """Return the card with the levels that `cmtool search` found for this very model."""
    if file is None or not file.is_file():
        return card
    try:
        searched = read_table(file, most=16 << 20)
        levels = {str(n): [float(s) for s in sigmas] for n, sigmas in searched["levels"].items()}
        if searched["model"] != found.sha256:
            return card
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError):
        raise InputError(f"{file} holds no searched levels", "remove it") from None
    sample = card.sample.model_copy(update={"levels": card.sample.levels | levels})
    return card.model_copy(update={"sample": sample})
