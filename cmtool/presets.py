"""Presets: TOML files validated into frozen models, with the origin of every value.

Layers, weakest first: defaults, the `extends` chain, the file, and overrides in the order given.
This module knows no torch; the components a preset names are looked up in build.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cmtool.errors import InputError, UserError, nearest

_PACKAGED = Path(__file__).parent / "_presets"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "presets"


def _count(value: object) -> object:
    """Accept 400k, 2M, 1e5 where a whole number is meant."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([kM])", value)):
        value = float(match[1]) * {"k": 1e3, "M": 1e6}[match[2]]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _sequence(value: object) -> object:
    """Accept a TOML list where a tuple is meant; leave anything else to fail as what it is."""
    return tuple(value) if isinstance(value, list) else value


Kind = Literal["teacher", "consistency"]
Count = Annotated[int, BeforeValidator(_count), Field(ge=0)]
Side = Annotated[int, Field(gt=0, le=1 << 14)]
Positive = Annotated[int, BeforeValidator(_count), Field(gt=0)]


class Section(BaseModel):
    """A table of a preset: frozen, no key but its own, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Choice(BaseModel):
    """A named component and its options: `"l2"`, or `{ name = "pseudo_huber", c = 0.03 }`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """The network and the images it knows."""

    network: Choice
    image_size: Annotated[tuple[Side, Side], BeforeValidator(_sequence)] = Field(description="H, W")
    channels: Positive = 3
    num_classes: Count = 0
    sigma_data: float = Field(0.5, gt=0, allow_inf_nan=False)
    noise_label: Choice = Choice(name="log_1000")
    scalings: Choice = Field(Choice(name="edm"), description="of a teacher")


class NoiseSection(Section):
    """The range of noise levels."""

    sigma_min: float = Field(0.002, gt=0, allow_inf_nan=False)
    sigma_max: float = Field(80.0, gt=0, allow_inf_nan=False)
    rho: float = Field(7.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ascending(self) -> NoiseSection:
        if not self.sigma_min < self.sigma_max:
            raise ValueError("sigma_min must be less than sigma_max")
        return self


class DataSection(Section):
    """The training images: a data set's name or a path, and how they are brought to size."""

    path: str
    fit: str = Field("exact", description="exact, edm, adm or box")
    flip: bool = Field(False, description="mirror half of the images at random")
    augment: float = Field(0.0, ge=0, le=1, description="probability of each of EDM's warps")
    workers: Count = Field(2, description="processes that decode what is too large for memory")
    timeout: float = Field(
        300.0, gt=0, description="seconds after which workers that give nothing are given up"
    )


class LossSection(Section):
    """A method: which levels, which pair, which target, which distance, which weight."""

    pair: Literal["none", "noise", "teacher", "progressive"]
    levels: Choice
    solver: Choice = Choice(name="heun")
    continuous: bool = Field(False, description="the two points of a pair are infinitely near")
    target: Literal["none", "student", "live", "ema", "previous"] = Field(
        "none", description="live: the student, differentiated on both sides (continuous time)"
    )
    distance: Choice = Choice(name="l2")
    weight: Choice = Choice(name="uniform")
    curriculum: Choice = Choice(name="fixed")


class EmaSection(Section):
    """One weights EMA: a fixed rate or a half-life in images, with an optional ramp-up."""

    name: str = Field(pattern=r"^[\w-]+$")
    rate: float | None = Field(None, gt=0, lt=1)
    halflife_images: float | None = Field(None, gt=0)
    rampup: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> EmaSection:
        if (self.rate is None) == (self.halflife_images is None):
            raise ValueError("give either rate or halflife_images")
        return self


class TrainSection(Section):
    """Optimisation."""

    steps: Positive
    batch: Positive
    lr: float = Field(gt=0)
    warmup_steps: Count = 0
    decay_to: float = Field(1.0, ge=0, le=1)
    optimizer: Choice = Choice(name="radam")
    accumulate: Positive = 1
    from_teacher: bool = Field(False, description="start from a teacher where no loss needs one")
    max_grad_norm: float | None = Field(None, gt=0)
    max_bad_steps: Positive = 5
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the networks; auto is bf16 where the device computes in it"
    )
    compile: bool = Field(False, description="torch.compile; a minute or more, for GPUs")
    checkpoint_activations: bool = Field(
        False, description="compute residual blocks again in the backward pass: less memory"
    )
    seed: Count = 0
    ema: Annotated[tuple[EmaSection, ...], BeforeValidator(_sequence)] = ()

    @model_validator(mode="after")
    def _distinct(self) -> TrainSection:
        names = [ema.name for ema in self.ema]
        if len(set(names)) < len(names):
            raise ValueError(f"two of the EMAs {', '.join(names)} have one name")
        return self


class RunSection(Section):
    """How a run is run: nothing here changes its result, and a resumed run may change it."""

    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    keep: Annotated[int, Field(ge=2)] = 2
    sample_every: Positive = 500
    tensorboard: bool = Field(False, description="write event files too (extra tensorboard)")
    eval_every: Count = Field(0, description="0: no evaluation")
    eval_num: Annotated[int, BeforeValidator(_count), Field(ge=2)] = 1024
    eval_metric: Choice = Choice(name="fd-digits")
    keep_best: Count = Field(1, description="checkpoints kept beside the newest, by their value")
    sharding: Literal["none", "fsdp"] = Field("none", description="of models over processes")
    timeout: float = Field(120, gt=0, le=86_400, description="of silent other processes")


class SampleSection(Section):
    """How the model is sampled when nobody says otherwise."""

    sampler: Choice
    steps: Positive = 1
    levels: dict[str, list[float]] = Field({}, description="tuned levels by number of steps")
    grid: int | None = Field(None, ge=2, description="points of the grid trained on, if known")


class Card(Section):
    """What a model is: its network, its noise levels, and how to sample it."""

    description: str = ""
    model: ModelSection
    noise: NoiseSection = NoiseSection()
    sample: SampleSection

    @property
    def kind(self) -> Kind:
        """Teacher or consistency model: only the second is sampled by multistep."""
        return "consistency" if self.sample.sampler.name == "multistep" else "teacher"


class Preset(Card):
    """A whole recipe: a card, and how to train such a model."""

    data: DataSection
    loss: LossSection
    train: TrainSection
    run: RunSection = RunSection()

    @property
    def kind(self) -> Kind:
        """What training with this preset makes."""
        return "teacher" if self.loss.pair in ("none", "progressive") else "consistency"

    @property
    def distills(self) -> bool:
        """Whether training needs a teacher."""
        return self.loss.pair in ("teacher", "progressive") or self.train.from_teacher


class Resolved(NamedTuple):
    """A preset, and for each dotted key where its value came from."""

    preset: Preset
    origins: dict[str, str]


def preset_names() -> list[str]:
    """Return the names of the presets that come with cmtool, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load_preset(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Return the preset `name_or_path` with dotted `overrides` such as {"loss.distance": "l1"}.

    Raises UserError for an unknown name, key or type, naming the nearest good one.
    """
    return resolve(name_or_path, {"override": overrides or {}}).preset


def resolve(name_or_path: str, layers: Mapping[str, Mapping[str, Any]]) -> Resolved:
    """Return the preset with layers of dotted overrides {origin: {key: value}}, and all origins."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, table in _chain(name_or_path, ()):
        _merge(tree, table, path.name, origins, "")
    for origin, overrides in layers.items():
        for key, value in overrides.items():
            _merge(tree, _nested(key, value), origin, origins, "")
    preset = _validated(tree, name_or_path)
    found = {key: origin_of(key, origins) for key, _ in flat(preset.model_dump())}
    return Resolved(preset, found)


def packaged_value(name_or_path: str, key: str) -> Any:
    """Return a dotted key's value in the nearest of cmtool's own presets this one is or extends.

    None where there is no such preset, or none that has the key.
    """
    value = None
    for path, table in _chain(name_or_path, ()):
        if path.parent == FOLDER:
            value = dict(flat(table)).get(key, value)
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """Return ("a.b", value) for "a.b=value"; the value is read as TOML, else taken as a string."""
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\-]+", key.strip()):
        raise UserError(f"--set {text!r} is not KEY=VALUE", "for example --set train.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return key.strip(), value


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chain(name_or_path: str, seen: tuple[str, ...]) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Yield (file, table) from the furthest ancestor down to the preset itself."""
    path = _find(name_or_path)
    if str(path) in seen:
        raise UserError(f"preset {path.name} extends itself", "break the circle of `extends`")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "mend the file") from None
    parent = table.pop("extends", None)
    if parent is not None:
        beside = path.parent / f"{parent}.toml"
        yield from _chain(str(beside) if beside.is_file() else str(parent), (*seen, str(path)))
    yield path, table


def _find(name_or_path: str) -> Path:
    """Return the file of a preset's name or path."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if not path.is_file():
            raise InputError(f"no preset file {name_or_path}", "check the path")
        return path
    if name_or_path not in preset_names():
        raise UserError(f"no preset {name_or_path!r}", nearest(name_or_path, preset_names()))
    return FOLDER / f"{name_or_path}.toml"


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for "a.b"."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _merge(
    tree: dict[str, Any], table: Mapping[str, Any], origin: str, origins: dict[str, str], at: str
) -> None:
    """Put `table` over `tree`. A component of another name brings its own options only."""
    for key, value in table.items():
        dotted = f"{at}{key}"
        old = tree.get(key)
        if isinstance(value, Mapping):
            if isinstance(old, str):
                old = {"name": old}
            keep = isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name")
            tree[key] = dict(old) if keep and isinstance(old, dict) else {}
            _merge(tree[key], value, origin, origins, f"{dotted}.")
        else:
            tree[key] = value
        for stale in [k for k in origins if k.startswith(f"{dotted}.")]:
            if not isinstance(value, Mapping):
                del origins[stale]
        if not isinstance(value, Mapping):
            origins[dotted] = origin


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where a key, or the nearest table above or value below it, was set."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (above := ".".join(parts[:end])) in origins:
            return origins[above]
    below = [origin for k, origin in origins.items() if k.startswith(f"{key}.")]
    return below[-1] if below else "default"


def _validated(tree: dict[str, Any], shown: str) -> Preset:
    try:
        return Preset.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in ("function-before", "tuple")]
        key = ".".join(path)
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"unknown key {key!r} in preset {shown}", nearest(path[-1], _fields(path[:-1]))
            ) from None
        if first["type"] == "missing":
            raise UserError(f"preset {shown} lacks {key!r}", "set it, or extend a preset") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"{key} = {first['input']!r}: {message}",
            f"set it with --set {key}=VALUE, or in the file",
        ) from None


def _fields(path: list[str]) -> list[str]:
    """Return the names of the keys a preset may have under `path`."""
    model: type[BaseModel] = Preset
    for part in path:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
