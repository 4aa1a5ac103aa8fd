"""From presets and files to the objects of core: the only module that knows both vocabularies."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from cmtool import presets
from cmtool.core.checkpoint import newest_checkpoint, verify
from cmtool.core.distances import DISTANCES
from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.formats.native import read_about, read_weights
from cmtool.core.losses import (
    WEIGHTINGS,
    Objective,
    Pair,
    consistency_objective,
    denoising_objective,
    noise_pair,
    teacher_pair,
)
from cmtool.core.metrics import DigitsFeatures
from cmtool.core.networks import NETWORKS
from cmtool.core.noise import CURRICULA, LEVELS, Curriculum, NoiseRange
from cmtool.core.precond import NOISE_LABELS, SCALINGS, Preconditioned
from cmtool.core.rng import keyed_generator, seeded
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.core.trainer import FitSettings, TrainState
from cmtool.core.types import Denoiser
from cmtool.errors import InputError, UserError, nearest
from cmtool.presets import Choice, ModelSection, Preset, Resolved

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("digits-edm", "digits-cd")
Kind = Literal["teacher", "consistency"]


def radam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return RAdam, the optimizer of the paper."""
    return torch.optim.RAdam(parameters, lr, betas, eps, weight_decay)


def adam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return Adam, the optimizer of EDM."""
    return torch.optim.Adam(parameters, lr, betas, eps, weight_decay)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"radam": radam, "adam": adam}


@dataclass(frozen=True)
class Model:
    """A loaded model: `f` is a Denoiser, in eval mode, without gradients."""

    f: Preconditioned
    preset: Preset
    kind: Kind
    source: str
    sha256: str
    weights: str

    @property
    def noise_range(self) -> NoiseRange:
        """The noise levels the model was trained on."""
        return noise_range(self.preset)


def pick(
    registry: Mapping[str, Callable[..., Any]],
    choice: Choice,
    key: str,
    given: Collection[str] = (),
) -> Callable[..., Any]:
    """Return the component a preset names, with its options bound.

    Options are its keyword-only parameters but those `given` by the caller. Raises UserError for
    an unknown name or option, naming the good ones, and for an option of the wrong type.
    """
    if choice.name not in registry:
        raise UserError(f"{key} = {choice.name!r}", nearest(choice.name, registry))
    component = registry[choice.name]
    known = inspect.signature(component, eval_str=True).parameters.values()
    types = {p.name: p.annotation for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY}
    options = {}
    for option, value in choice.options.items():
        good = sorted(types.keys() - set(given))
        if option not in good:
            hint = nearest(option, good) if good else "leave it out"
            raise UserError(f"{key} = {choice.name!r} has no option {option!r}", hint)
        try:
            options[option] = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise UserError(f"{key}.{option} = {value!r}: {reason}", "mend its type") from None
    return partial(component, **options) if options else component


def noise_range(preset: Preset) -> NoiseRange:
    """Return the range of noise levels of a preset."""
    return NoiseRange(preset.noise.sigma_min, preset.noise.sigma_max, preset.noise.rho)


def build_network(model: ModelSection) -> nn.Module:
    """Return the raw network of a model section, with PyTorch's global generators for its start.

    Raises UserError for an unknown network or option, or an option of the wrong type.
    """
    choice = model.network
    if choice.name not in NETWORKS:
        raise UserError(f"model.network = {choice.name!r}", nearest(choice.name, NETWORKS))
    kind = NETWORKS[choice.name]
    known = [field.name for field in fields(kind.options)]
    for option in choice.options:
        if option not in known:
            raise UserError(
                f"network {choice.name!r} has no option {option!r}", nearest(option, known)
            )
    try:
        options = TypeAdapter(kind.options).validate_python(choice.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"model.network.{key} = {first['input']!r}: {first['msg'].lower()}", "mend its type"
        ) from None
    try:
        return kind.build(options, model.channels, model.num_classes)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"network {choice.name!r} cannot be built: {error}", "mend model.network"
        ) from None


def build_denoiser(preset: Preset, kind: Kind, network: nn.Module | None = None) -> Preconditioned:
    """Return a Denoiser of the preset: plain scalings for a teacher, else shifted ones.

    A new network starts from `train.seed`.
    """
    if network is None:
        with seeded(keyed_generator("init", preset.train.seed)):
            network = build_network(preset.model)
    label = preset.model.noise_label
    if label not in NOISE_LABELS:
        raise UserError(f"model.noise_label = {label!r}", nearest(label, NOISE_LABELS))
    return Preconditioned(
        network,
        SCALINGS[kind],
        NOISE_LABELS[label],
        sigma_data=preset.model.sigma_data,
        sigma_min=preset.noise.sigma_min,
    )


def build_objective(preset: Preset, teacher: Denoiser | None) -> Objective:
    """Return the preset's training objective. Raises UserError if it lacks the teacher it needs."""
    loss = preset.loss
    levels = pick(LEVELS, loss.levels, "loss.levels")
    weight = partial(
        pick(WEIGHTINGS, loss.weight, "loss.weight", given=["sigma_data"]),
        sigma_data=preset.model.sigma_data,
    )
    if loss.pair == "none":
        return denoising_objective(levels, weight, noise_range(preset))
    distance = pick(DISTANCES, loss.distance, "loss.distance")
    if loss.pair == "noise":

        def make_pair(x0: Tensor, hi: Tensor, lo: Tensor, noise: Tensor, _: Tensor | None) -> Pair:
            return noise_pair(x0, hi, lo, noise)

    else:
        if teacher is None:
            raise UserError("this preset distills a teacher", "run it with cmtool distill")
        make_pair = partial(
            teacher_pair, teacher=teacher, solver=pick(SOLVERS, loss.solver, "loss.solver")
        )
    return consistency_objective(levels, make_pair, distance, weight, noise_range(preset))


def build_curriculum(preset: Preset) -> Curriculum:
    """Return the preset's N(k) and mu(k)."""
    return pick(CURRICULA, preset.loss.curriculum, "loss.curriculum")


def build_sampler(choice: Choice) -> Callable[..., Tensor]:
    """Return a sampler by its choice."""
    given = ["sigma_min", "labels", "project", "solver"]
    return pick(SAMPLERS, choice, "sample.sampler", given)


def build_state(preset: Preset, teacher: Model | None, device: str) -> TrainState:
    """Return the start of a run: the student has the teacher's weights, or random ones without."""
    student = build_denoiser(preset, preset.kind)
    if teacher is not None:
        student.network.load_state_dict(teacher.f.network.state_dict())
    student = student.to(device).requires_grad_(True)
    target = frozen_copy(student) if preset.loss.target == "ema" else None
    emas = {
        ema.name: Ema(
            student, rate=ema.rate, halflife_images=ema.halflife_images, rampup=ema.rampup
        )
        for ema in preset.train.ema
    }
    optimizer = pick(OPTIMIZERS, preset.train.optimizer, "train.optimizer")
    return TrainState(student, target, emas, optimizer(student.parameters(), lr=preset.train.lr))


def fit_settings(preset: Preset) -> FitSettings:
    """Return the numbers of a run."""
    t = preset.train
    return FitSettings(
        steps=t.steps,
        batch=t.batch,
        seed=t.seed,
        lr=t.lr,
        warmup_steps=t.warmup_steps,
        decay_to=t.decay_to,
        rounds=t.accumulate,
        max_grad_norm=t.max_grad_norm,
        max_bad_steps=t.max_bad_steps,
        precision=t.precision,
    )


def load_model(
    path: str | Path, *, device: str = "cpu", weights: str = "ema", kind: Kind | None = None
) -> Model:
    """Return a model from a bundled name, a run folder, a checkpoint folder or a weight file.

    `weights` chooses among a checkpoint's files: an EMA by name, or "model" for the raw weights;
    "ema" also stands for the only EMA of another name, and for "model" where there is none.
    `kind` overrides what the file says of itself. Raises InputError for a path that is not a model.
    """
    file = find_weights(path, weights)
    about = read_about(file)
    try:
        preset = Preset.model_validate(about["preset"])
        chosen: Kind = kind or about["kind"]
        held = about["weights"]
    except (KeyError, ValidationError):
        raise InputError(
            f"{file} does not hold a denoiser", "give a model made by cmtool train or distill"
        ) from None
    with torch.device("meta"):
        network = build_network(preset.model)
    tensors = {name: t.float() for name, t in read_weights(file).items()}
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise InputError(f"{file} is not the network it names: {first}", "make it again") from None
    f = build_denoiser(preset, chosen, network).to(device).eval().requires_grad_(False)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Model(f, preset, chosen, str(path), digest, held)


def find_weights(path: str | Path, weights: str = "ema") -> Path:
    """Return the weight file that a bundled name, run, checkpoint or file stands for."""
    if str(path) in BUNDLED and not Path(path).exists():
        return ASSETS / f"{path}.safetensors"
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"no model {str(path)!r}",
            f"give a run folder, a .safetensors file, or one of {', '.join(BUNDLED)}",
        )
    if path.is_file():
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


def load_digits_features() -> tuple[DigitsFeatures, str]:
    """Return the bundled feature network of fd-digits, and the hash of its file."""
    file = ASSETS / "digits-features.safetensors"
    network = DigitsFeatures().eval().requires_grad_(False)
    network.load_state_dict({name: t.float() for name, t in read_weights(file).items()})
    return network, hashlib.sha256(file.read_bytes()).hexdigest()


def with_teacher(resolved: Resolved, teacher: Model) -> Resolved:
    """Return the preset with the teacher's model and noise sections, dropout excepted.

    A student copies its teacher's weights, so it must be the same network on the same levels.
    """
    ours = resolved.preset.model
    theirs = teacher.preset.model
    options = dict(theirs.network.options)
    options.pop("dropout", None)
    if "dropout" in ours.network.options:
        options["dropout"] = ours.network.options["dropout"]
    model = theirs.model_copy(update={"network": Choice(name=theirs.network.name, **options)})
    preset = resolved.preset.model_copy(update={"model": model, "noise": teacher.preset.noise})
    origins = dict(resolved.origins)
    before = dict(presets.flat(resolved.preset.model_dump()))
    for key, value in presets.flat(preset.model_dump()):
        if before.get(key, ...) != value:
            origins[key] = f"teacher {teacher.source}"
    return Resolved(preset, origins)
