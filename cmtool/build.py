"""From presets to the objects of a training run; with models.py, what knows both vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from cmtool import presets
from cmtool.components import build_denoiser, build_network, noise_range, pick
from cmtool.core.augment import LABELS, Augment, augmented
from cmtool.core.devices import placed
from cmtool.core.dist import ALONE, Group
from cmtool.core.distances import DISTANCES, NORMS
from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.losses import (
    WEIGHTINGS,
    Objective,
    Pair,
    consistency_objective,
    continuous_loss,
    continuous_objective,
    denoising_objective,
    live_loss,
    noise_pair,
    noise_point,
    progressive_objective,
    teacher_pair,
    teacher_point,
)
from cmtool.core.networks import NETWORKS
from cmtool.core.noise import CURRICULA, LEVELS, Curriculum, LevelPicker
from cmtool.core.optimizers import OPTIMIZERS
from cmtool.core.parallel import shard
from cmtool.core.precond import Preconditioned
from cmtool.core.rng import keyed_generator, seeded
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.core.tangents import Point
from cmtool.core.trainer import FitSettings, TrainState
from cmtool.core.types import Denoiser, Distance, Weighting
from cmtool.errors import InputError, UserError
from cmtool.models import Model, find_weights, load_digits_features, load_model
from cmtool.presets import Choice, Preset, Resolved

__all__ = [
    "Model",
    "build_curriculum",
    "build_denoiser",
    "build_network",
    "build_objective",
    "build_sampler",
    "build_state",
    "find_weights",
    "fit_settings",
    "load_digits_features",
    "load_model",
    "noise_range",
    "with_precision",
    "with_teacher",
]


def build_objective(preset: Preset, teacher: Denoiser | None, device: str = "cpu") -> Objective:
    """Return the preset's training objective. Raises UserError if it lacks the teacher it needs."""
    loss = preset.loss
    levels = pick(LEVELS, loss.levels, "loss.levels")
    weight = partial(
        pick(WEIGHTINGS, loss.weight, "loss.weight", given=["sigma_data"]),
        sigma_data=preset.model.sigma_data,
    )
    augment = build_augment(preset)
    if loss.continuous and loss.pair not in ("noise", "teacher"):
        raise UserError(f"loss.pair = {loss.pair!r} in continuous time", "use noise or teacher")
    if loss.pair == "none":
        return denoising_objective(levels, weight, noise_range(preset), augment)
    distance = pick(DISTANCES, loss.distance, "loss.distance")
    if (loss.pair == "progressive") != (loss.target == "previous"):
        raise UserError(
            f"loss.pair = {loss.pair!r} with loss.target = {loss.target!r}",
            "progressive goes with previous, and with nothing else",
        )
    if loss.pair == "progressive":
        return progressive_objective(levels, distance, weight, noise_range(preset))
    blank = torch.zeros(1, preset.model.channels, *preset.model.image_size, device=device)
    distance(blank, blank)  # what it lacks, such as a weight file, it says now
    if loss.pair == "teacher" and teacher is None:
        raise UserError("this preset distills a teacher", "run it with cmtool distill")
    if loss.continuous:
        return _continuous_objective(preset, levels, distance, weight, teacher)
    if loss.target == "live":
        raise UserError("loss.target = 'live' with two levels", "set loss.continuous = true")
    if teacher is None or loss.pair == "noise":

        def make_pair(x0: Tensor, hi: Tensor, lo: Tensor, noise: Tensor, _: Tensor | None) -> Pair:
            return noise_pair(x0, hi, lo, noise)

    else:
        make_pair = partial(
            teacher_pair, teacher=teacher, solver=pick(SOLVERS, loss.solver, "loss.solver")
        )
    return consistency_objective(levels, make_pair, distance, weight, noise_range(preset))


def _continuous_objective(
    preset: Preset,
    levels: LevelPicker,
    distance: Distance,
    weight: Weighting,
    teacher: Denoiser | None,
) -> Objective:
    """Return the objective of continuous time, where pairs and targets of two levels differ."""
    loss, norm = preset.loss, preset.loss.distance.name in NORMS
    if loss.target not in ("student", "live"):
        raise UserError(
            f"loss.target = {loss.target!r} in continuous time",
            "use student (its output held fixed) or live (differentiated too)",
        )
    if loss.target == "live" and loss.pair == "noise":
        raise UserError(
            "loss.target = 'live' without a teacher: the noise's own variance would be minimised",
            "set loss.target = 'student'",
        )
    if loss.target == "live" and preset.train.checkpoint_activations:
        raise UserError(
            "loss.target = 'live' with train.checkpoint_activations: what is computed again cannot"
            " be differentiated forwards",
            "leave train.checkpoint_activations out, and split the batch with --accumulate",
        )
    if loss.target == "student" and norm:
        raise UserError(
            f"loss.distance = {loss.distance.name!r} has no curvature, which a target held fixed"
            " needs in continuous time",
            "use another, such as l2, or distill with loss.target = 'live'",
        )
    if teacher is None or loss.pair == "noise":

        def make_point(x0: Tensor, sigma: Tensor, noise: Tensor, _: Tensor | None) -> Point:
            return noise_point(x0, sigma, noise)

    else:
        make_point = partial(teacher_point, teacher=teacher)
    which = partial(live_loss, norm=norm) if loss.target == "live" else continuous_loss
    near = partial(which, distance=distance, weight=weight)
    return continuous_objective(levels, make_point, near, noise_range(preset))


def build_augment(preset: Preset) -> Augment | None:
    """Return how training images are warped, None for not at all.

    Raises UserError unless a teacher is trained whose network takes the labels of EDM's warps.
    """
    if not preset.data.augment:
        return None
    what = f"data.augment = {preset.data.augment}"
    if preset.loss.pair != "none":
        raise UserError(f"{what} for a model that is not an EDM teacher", "--set data.augment=0")
    known = preset.model.network.options.get("augment_dim", 0)
    if known != LABELS:
        raise UserError(
            f"{what} with model.network.augment_dim = {known}",
            f"the network must be told: --set model.network.augment_dim={LABELS}",
        )
    if preset.data.flip:
        raise UserError(f"{what} with data.flip", "it mirrors by itself: --set data.flip=false")
    return partial(augmented, p=preset.data.augment)


def build_curriculum(preset: Preset) -> Curriculum:
    """Return the preset's N(k) and mu(k)."""
    return pick(CURRICULA, preset.loss.curriculum, "loss.curriculum")


def build_sampler(choice: Choice) -> Callable[..., Tensor]:
    """Return a sampler by its choice."""
    given = ["sigma_min", "labels", "project", "solver"]
    return pick(SAMPLERS, choice, "sample.sampler", given)


def build_state(
    preset: Preset, teacher: Model | None, device: str, group: Group = ALONE
) -> TrainState:
    """Return the start of a run: the student has the teacher's weights, or random ones without.

    The networks, the teacher's too, are put where and how the device, `preset.train` and the group
    want them: sharded ones go to the device block by block, and in main memory is one whole copy
    beside the student. Raises UserError for a network without blocks that can be computed again,
    and for models that are to be sharded and compiled.
    """
    if preset.train.compile and group.mesh is not None:
        raise UserError(
            "train.compile with run.sharding = 'fsdp': models are whole in parts only",
            "leave one of them out",
        )

    def spread(model: Preconditioned) -> None:
        kinds = NETWORKS[preset.model.network.name].blocks
        shard(model, group, blocks_of(model, kinds))

    with seeded(keyed_generator("init", preset.train.seed)):
        network = build_network(preset.model)
    student = build_denoiser(preset, preset.kind, network)
    if teacher is not None:
        student.network.load_state_dict(teacher.f.network.state_dict())
        spread(teacher.f)
    student = placed(student, device if group.mesh is None else "cpu").requires_grad_(True)
    if preset.train.checkpoint_activations:
        compute_again(network, preset.model.network.name)
    target = None
    if preset.loss.target in ("ema", "previous"):  # an earlier student drops out no more
        target = frozen_copy(student).train(preset.loss.target == "ema")
        spread(target)
    emas = {}
    for ema in preset.train.ema:
        emas[ema.name] = Ema(
            student, rate=ema.rate, halflife_images=ema.halflife_images, rampup=ema.rampup
        )
        spread(emas[ema.name].model)
    spread(student)
    optimizer = pick(OPTIMIZERS, preset.train.optimizer, "train.optimizer")
    scaler = GradScaler(torch.device(device).type) if preset.train.precision == "fp16" else None
    state = TrainState(
        student, target, emas, optimizer(student.parameters(), lr=preset.train.lr), scaler
    )
    if preset.train.compile:
        for model in (student, target, teacher.f if teacher else None):
            if model is not None:
                model.network.compile()  # in place: the names of its tensors stay
    return state


def blocks_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Return the modules of these kinds within a module."""
    return [part for part in module.modules() if isinstance(part, kinds)]


def compute_again(network: nn.Module, name: str) -> None:
    """Make the residual blocks of a network keep only their inputs for the backward pass."""
    blocks = blocks_of(network, NETWORKS[name].blocks)
    if not blocks:
        raise UserError(
            f"network {name!r} has no residual blocks", "leave train.checkpoint_activations out"
        )
    for block in blocks:
        block.again = True  # type: ignore[assignment]  # of a module, torch says: Tensor or Module


def fit_settings(preset: Preset, group: Group = ALONE) -> FitSettings:
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
        group=group,
    )


def with_precision(
    preset: Preset, origins: Mapping[str, str], best: str
) -> tuple[Preset, dict[str, str]]:
    """Return the preset with `best` where it leaves the precision to the device, and the origins.

    A run records what it got, so that it goes on in it on any device.
    """
    if preset.train.precision != "auto":
        return preset, dict(origins)
    train = preset.train.model_copy(update={"precision": best})
    changed = preset.model_copy(update={"train": train})
    return changed, {**origins, "train.precision": "auto"}


def with_teacher(resolved: Resolved, teacher: Model) -> Resolved:
    """Return the preset with the teacher's model and noise sections, dropout excepted.

    A student copies its teacher's weights, so it must be the same network on the same levels.
    """
    ours = resolved.preset.model
    theirs = teacher.preset.model
    if theirs.scalings.name != "edm":
        raise InputError(
            f"{teacher.source} has the scalings of {theirs.scalings.name}: a student that starts"
            " from its weights would be another function",
            "distill a teacher with EDM's scalings",
        )
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
