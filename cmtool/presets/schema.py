"""The tables of a preset, as frozen models. This module knows no torch and no component names."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


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


Kind = Literal["teacher", "consistency", "flow map"]
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
    scalings: Choice = Field(
        Choice(name="edm"),
        description="edm, vp, ve or iddpm for teachers; students: consistency (f(x) = x at"
        " sigma_min) or edm (at 0)",
    )


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
    """A method, and its choices: which levels, which target, which distance, which weight."""

    method: Choice
    levels: Choice
    solver: Choice = Field(Choice(name="heun"), description="step of the teacher's ODE")
    target: str = Field(
        "none",
        description="what the student is compared with: student (itself), ema, previous, or none",
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
    sample_grid: Positive = Field(40, description="images of a sample grid")
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
    """What a model is: its kind, its network, its noise levels, and how to sample it."""

    description: str = ""
    kind: Kind = Field(description="teacher, consistency or flow map")
    model: ModelSection
    noise: NoiseSection = NoiseSection()
    sample: SampleSection


class Preset(Card):
    """A whole recipe: a card, and how to train such a model."""

    data: DataSection
    loss: LossSection
    train: TrainSection
    run: RunSection = RunSection()
