"""The tables of a preset, as frozen models. This module knows no torch and no component names."""

from __future__ import annotations

import math
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
MOST = 10**9
"""The largest whole number that a preset may say, but for its seed."""
MAX_IMAGES = 1 << 20
"""Images of a batch, each in one tensor."""
MAX_LEVELS = 1_000_000
"""Noise levels of a grid, each a float."""
Count = Annotated[int, BeforeValidator(_count), Field(ge=0, le=MOST)]
Side = Annotated[int, Field(gt=0, le=1 << 14)]
Positive = Annotated[int, BeforeValidator(_count), Field(gt=0, le=MOST)]


class Section(BaseModel):
    """A table of a preset: frozen, no key but its own, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A named component and its options: `"l2"`, or `{ name = "pseudo_huber", c = 0.03 }`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sane(self) -> Choice:
        values: list[Any] = list(self.options.items())
        for key, value in values:  # it grows: a list has the key of its own
            if isinstance(value, list | dict):
                inner = value.values() if isinstance(value, dict) else value
                values += [(key, entry) for entry in inner]
            if type(value) is int and abs(value) > MOST:
                raise ValueError(f"{key} must be a whole number of at most {MOST:,}")
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{key} is not a number")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """The network and the images it knows."""

    network: Choice = Field(description="architecture, and its options")
    image_size: Annotated[tuple[Side, Side], BeforeValidator(_sequence)] = Field(
        description="height and width of the images, in pixels"
    )
    channels: Positive = Field(3, le=1024, description="3 for colour, 1 for grey")
    num_classes: Count = Field(
        0, le=1_000_000, description="classes of the images; 0 for a model without"
    )
    sigma_data: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of the images in [-1, 1]; cmtool data info measures it",
    )
    noise_label: Choice = Field(
        Choice(name="log_1000"), description="how the network is told the noise level"
    )
    scalings: Choice = Field(
        Choice(name="edm"),
        description="edm, vp, ve or iddpm for teachers; students: consistency (f(x) = x at"
        " sigma_min) or edm (at 0)",
    )
    transition: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="noise level below which a frozen network answers, that of TCM's first stage",
    )
    guidance: float | None = Field(
        None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="weight with which a weaker network guides the other; cmtool checkpoint guide"
        " makes such a model",
    )
    guide_hears_class: bool = Field(
        True, description="whether that weaker network is told the class of an image"
    )


class NoiseSection(Section):
    """The range of noise levels."""

    sigma_min: float = Field(
        0.002, gt=0, allow_inf_nan=False, description="lowest noise level: almost a clean image"
    )
    sigma_max: float = Field(
        80.0, gt=0, allow_inf_nan=False, description="highest noise level, where sampling starts"
    )
    rho: float = Field(
        7.0, gt=0, allow_inf_nan=False, description="spacing of the grid of levels (EDM, eq. 5)"
    )

    @model_validator(mode="after")
    def _ascending(self) -> NoiseSection:
        if not self.sigma_min < self.sigma_max:
            raise ValueError("sigma_min must be less than sigma_max")
        return self


class DataSection(Section):
    """The training images: a data set's name or a path, and how they are brought to size."""

    path: str = Field("", description="a data set's name or a path; a method's preset has none")
    labels: str = Field(
        "auto",
        description="how classes are found: by a rule, or by the column of a table, or the key of"
        " the .json files in a tar, of this name",
    )
    column: str = Field("", description="column of images, for a table that has several")
    fit: str = Field(
        "exact", description="how images are brought to size: exact (not at all), edm, adm or box"
    )
    background: str = Field(
        "white", description="colour under transparent parts: a name, or #rrggbb"
    )
    flip: bool = Field(False, description="mirror half of the images at random")
    label_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of images whose class the network is not told, so that it learns images"
        " of no class too",
    )
    balanced: bool = Field(
        False, description="show each class equally often, however many images it has"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] | str | None = Field(
        None,
        description="images that training does not see, for run.eval_metric = loss: a share of the"
        " data, or a data set's name or path",
    )
    augment: float = Field(0.0, ge=0, le=1, description="probability of each of EDM's warps")
    workers: Count = Field(
        2, le=1024, description="processes that decode what is too large for memory"
    )
    timeout: float = Field(
        300.0, gt=0, description="seconds after which workers that give nothing are given up"
    )


class LossSection(Section):
    """A method, and its choices: which levels, which target, which distance, which weight."""

    method: Choice = Field(description="what a training step compares")
    levels: Choice = Field(description="how the noise levels of a step are picked")
    source: Choice = Field(
        Choice(name="images"),
        description="what a step starts from: images, or paths (points of the teacher's paths)",
    )
    solver: Choice = Field(Choice(name="heun"), description="step of the teacher's ODE")
    guidance: float = Field(
        1.0,
        ge=0,
        le=100,
        description="weight of classifier-free guidance of the teacher; 1: none",
    )
    target: str = Field(
        "none",
        description="what the student is compared with: student (itself), ema, previous, or none",
    )
    distance: Choice = Field(Choice(name="l2"), description="distance d(x, y) of two images")
    weight: Choice = Field(Choice(name="uniform"), description="weight of the loss by noise level")
    curriculum: Choice = Field(
        Choice(name="fixed"), description="points n of the grid, and rate mu of the target, by step"
    )


class EmaSection(Section):
    """One weights EMA: a rate, a half-life in images, or the width of a power's profile."""

    name: str = Field(pattern=r"^[\w-]+$")
    rate: float | None = Field(None, gt=0, lt=1)
    halflife_images: float | None = Field(None, gt=0)
    rampup: float | None = Field(None, gt=0)
    sigma_rel: float | None = Field(None, ge=0.001, le=0.28)

    @model_validator(mode="after")
    def _one_of_three(self) -> EmaSection:
        if [self.rate, self.halflife_images, self.sigma_rel].count(None) != 2:
            raise ValueError("give one of rate, halflife_images and sigma_rel")
        if self.sigma_rel is not None and self.rampup is not None:
            raise ValueError("sigma_rel grows with the run by itself: leave rampup out")
        return self


class TrainSection(Section):
    """Optimisation."""

    steps: Positive = Field(description="optimizer steps of the whole run")
    batch: Positive = Field(
        le=MAX_IMAGES, description="images a step, over all processes and parts"
    )
    lr: float = Field(gt=0, description="learning rate after the warm-up")
    warmup_steps: Count = Field(0, description="steps in which the learning rate grows from 0")
    decay_to: float = Field(
        1.0, ge=0, le=1, description="learning rate at the last step, as a share of lr (a cosine)"
    )
    steady_steps: Count = Field(
        0, description="steps after which the rate falls as 1 / sqrt(step), as EDM2's; 0: never"
    )
    optimizer: Choice = Field(Choice(name="radam"), description="optimizer, and its options")
    accumulate: Positive = Field(
        1,
        le=MAX_IMAGES,
        description="parts that a process splits its batch into: less memory",
    )
    from_teacher: bool = Field(False, description="start from a teacher where no loss needs one")
    max_grad_norm: float | None = Field(None, gt=0, description="gradients are clipped to it")
    max_bad_steps: Positive = Field(
        5, description="steps in a row that are not finite and end the run"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="precision of the networks; auto is bf16 where the device computes in it",
    )
    compile: bool = Field(
        False,
        description="torch.compile, for GPUs; unless this is set a long run there chooses it",
    )
    deterministic: bool = Field(
        False,
        description="the same bits on a GPU each time, also after a resume; slower",
    )
    checkpoint_activations: bool = Field(
        False, description="compute residual blocks again in the backward pass: less memory"
    )
    seed: Annotated[int, BeforeValidator(_count)] = Field(
        0, ge=0, lt=1 << 63, description="seed of the weights, the order of images and the noise"
    )
    ema: Annotated[tuple[EmaSection, ...], BeforeValidator(_sequence)] = Field(
        (),
        description="averages of the weights: rate a step, halflife_images with rampup, or"
        " sigma_rel (EDM2's power, its width as a share of the run)",
    )

    @model_validator(mode="after")
    def _distinct(self) -> TrainSection:
        names = [ema.name for ema in self.ema]
        if len(set(names)) < len(names):
            raise ValueError(f"two of the EMAs {', '.join(names)} have one name")
        return self


class RunSection(Section):
    """How a run is run: nothing here changes its result, and a resumed run may change it."""

    log_every: Positive = Field(50, description="steps between two lines of the log")
    checkpoint_every: Positive = Field(1000, description="steps between two checkpoints")
    keep: Annotated[int, Field(ge=2, le=MOST)] = Field(
        2, description="checkpoints kept, the newest"
    )
    sample_every: Positive = Field(500, description="steps between two grids of samples")
    sample_grid: Annotated[int, Field(gt=0, le=10_000)] = Field(
        40, description="images in a grid of samples"
    )
    ema_every: Count = Field(
        0, description="steps between stored sigma_rel averages, for others later; 0: none"
    )
    tensorboard: bool = Field(False, description="write event files too (extra tensorboard)")
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_sequence)
    ] = Field((), description="where the run is shown too; each needs the extra of its name")
    eval_every: Count = Field(0, description="steps between two evaluations; 0: none")
    eval_num: Annotated[int, BeforeValidator(_count), Field(ge=2, le=MOST)] = Field(
        1024, description="images of an evaluation"
    )
    eval_metric: Choice = Field(
        Choice(name="fd-digits"),
        description="what is measured: a protocol, such as fd-digits; fid or kid with options"
        " features (a TorchScript file), its sha256 and input; or loss, of data.held_out",
    )
    keep_best: Count = Field(1, description="checkpoints kept beside the newest, by their value")
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp splits the models over processes, where memory is short"
    )
    timeout: float = Field(
        120, gt=0, le=86_400, description="seconds after which a silent other process is given up"
    )


class SampleSection(Section):
    """How the model is sampled when nobody says otherwise."""

    sampler: Choice = Field(description="how images are drawn")
    steps: Positive = Field(1, le=MAX_LEVELS, description="steps of the sampler")
    levels: dict[str, list[float]] = Field({}, description="tuned levels by number of steps")
    grid: int | None = Field(
        None, ge=2, le=MAX_LEVELS, description="points of the grid trained on, if known"
    )


class Card(Section):
    """What a model is: its kind, its network, its noise levels, and how to sample it."""

    description: str = Field("", description="what the preset is, in a line")
    kind: Kind = Field(description="teacher, consistency or flow map")
    model: ModelSection
    noise: NoiseSection = NoiseSection()
    sample: SampleSection


class Published(Section):
    """What the authors of a method report for a preset: FID of 50,000 images, and GPU hours.

    A preset does not inherit it from the one that it extends.
    """

    fid_1: float | None = Field(None, gt=0, description="FID of samples in one step")
    fid_2: float | None = Field(None, gt=0, description="FID of samples in two steps")
    gpu_hours: float | None = Field(None, gt=0, description="hours of training on one GPU")


class Preset(Card):
    """A whole recipe: a card, and how to train such a model."""

    data: DataSection
    loss: LossSection
    train: TrainSection
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _stores_what_there_is(self) -> Preset:
        if self.run.ema_every and all(ema.sigma_rel is None for ema in self.train.ema):
            what = "run.ema_every stores the averages of train.ema that have sigma_rel"
            raise ValueError(f"{what}, and there is none")
        return self
