"""What a training run changes, built from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.networks import NETWORKS
from cmtool.core.networks.guided import main_weights
from cmtool.core.networks.layers import rounded_copy
from cmtool.core.networks.truncated import Truncated
from cmtool.core.optimizers import OPTIMIZERS
from cmtool.core.precond import Preconditioned, is_two_time
from cmtool.core.rng import keyed_generator, seeded
from cmtool.core.types import Denoiser
from cmtool.data.batches import BatchFn, batches
from cmtool.data.datasets import Dataset
from cmtool.errors import InputError, UserError
from cmtool.models import Model
from cmtool.presets.build import build_denoiser, build_network, method_row, pick
from cmtool.presets.schema import Preset
from cmtool.system.devices import HALF, on_device, shapes_only
from cmtool.system.dist import ALONE, Group
from cmtool.system.parallel import shard

SHARDED_FORWARD_MODE = "2.14"
"""The oldest PyTorch seen to differentiate sharded parameters through forward mode."""


def check_sharded(preset: Preset) -> None:
    """Raise UserError for a method that an older PyTorch cannot do with sharded models."""
    if not method_row(preset).recomputes and torch.__version__ < SHARDED_FORWARD_MODE:
        method = preset.loss.method.name
        what = f"run.sharding = 'fsdp' with {method} fails in PyTorch {torch.__version__}"
        raise UserError(what, "install PyTorch 2.14 or newer, or --set run.sharding=none")


def build_state(
    preset: Preset,
    teacher: Model | None,
    device: str,
    group: Group = ALONE,
    init: Model | None = None,
) -> TrainState:
    """Return the start of a run: the student has the teacher's weights, or random ones without.

    If `init` is given, the student starts from those of its weights that fit the network.

    The networks, the teacher's too, are put where and how the device, `preset.train` and the group
    want them: sharded ones go to the device block by block, and in main memory is one whole copy
    beside the student. Raises UserError for a network without blocks that can be computed again,
    and for models that may not be compiled.
    """
    train = preset.train
    if group.mesh is not None:
        check_sharded(preset)
    if train.compile:
        check_compile(preset, group)

    def spread(model: Preconditioned) -> None:
        kinds = NETWORKS[preset.model.network.name].blocks
        shard(model, group, [part for part in model.modules() if isinstance(part, kinds)])

    network = build_start(preset, teacher, init)
    student = build_denoiser(preset, network)
    if teacher is not None:
        spread(teacher.f)
    student = on_device(student, device if group.mesh is None else "cpu").requires_grad_(True)
    if isinstance(network, Truncated):
        network.below.requires_grad_(False)
    if train.checkpoint_activations:
        recompute_activations(network, preset.model.network.name)
    target = None
    if preset.loss.target in ("ema", "previous"):  # an earlier student drops out no more
        target = frozen_copy(student).train(preset.loss.target == "ema")
        spread(target)
    emas = {}
    for e in train.ema:
        emas[e.name] = Ema(
            student, rate=e.rate, halflife_images=e.halflife_images, rampup=e.rampup,
            sigma_rel=e.sigma_rel,
        )  # fmt: skip
        spread(emas[e.name].model)
    spread(student)
    own = build_own(preset, device, group)
    theirs = own.parameters() if own is not None else ()
    parameters = [p for p in (*student.parameters(), *theirs) if p.requires_grad]
    optimizer = pick(OPTIMIZERS, train.optimizer, "train.optimizer")(parameters, lr=train.lr)
    scaler = GradScaler(torch.device(device).type) if train.precision == "fp16" else None
    if train.compile:
        for model in (student, target, teacher.f if teacher else None):
            if model is not None:
                model.network.compile()  # in place: the names of its tensors stay
    return TrainState(student, target, emas, optimizer, scaler, own)


def check_compile(preset: Preset, group: Group) -> None:
    """Raise UserError for models that torch.compile would make wrong, or slow.

    It draws dropout masks in another order for the student than for its target, so where the two
    share masks there may be none (pytorch/pytorch#198333). It times kernels to choose among them,
    whose sums differ in their last bits.
    """
    if group.mesh is not None:
        what = "train.compile with run.sharding = 'fsdp': models are whole in parts only"
        raise UserError(what, "leave one of them out")
    if preset.train.deterministic:
        what = "train.compile with train.deterministic: kernels are chosen by their time"
        raise UserError(what, "leave one of them out: --set train.compile=false")
    if method_row(preset).shares_masks and has_dropout(preset):
        name = preset.loss.method.name
        what = f"train.compile with dropout: student and target of {name} must share its masks"
        hint = "--set model.network.dropout=0, or leave train.compile out"
        raise UserError(what, hint)


def has_dropout(preset: Preset) -> bool:
    """Tell whether the network of a preset drops units out."""
    with shapes_only():
        parts = build_network(preset.model).modules()
        return any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts)


def build_start(preset: Preset, teacher: Model | None, init: Model | None) -> nn.Module:
    """Return the student's network with the weights it starts from, those of `init` first."""
    with seeded(keyed_generator("init", preset.train.seed)):
        network = build_network(preset.model)
    if init is not None:
        fitting = main_weights(init.f.network)
        for name in not_taken(preset, init):
            fitting.pop(name.partition(" ")[0], None)
        network.load_state_dict(fitting, strict=False)
    elif teacher is not None:
        take_weights(network, main_weights(teacher.f.network))
    return network


def take_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a network the weights of a teacher's.

    The two networks of a truncated one both get them. What a network with a second noise label
    takes beside them is 0, so that it answers as the teacher does at first.
    """
    if isinstance(network, Truncated):
        network.below.load_state_dict(weights)
        network.above.load_state_dict(weights)
        return
    fitted = {}
    for name, tensor in network.state_dict().items():
        fitted[name] = weights[name]
        if is_two_time(network) and tensor.shape != weights[name].shape:
            fitted[name] = torch.zeros_like(tensor)
            fitted[name][:, : weights[name].shape[1]] = weights[name]
    network.load_state_dict(fitted)


def not_taken(preset: Preset, init: Model) -> list[str]:
    """Return the tensors of a preset's network that a model has otherwise or not, with shapes.

    Raises InputError for a model of which no tensor fits.
    """
    with shapes_only():
        wanted = build_network(preset.model).state_dict()
    found = main_weights(init.f.network)
    left = []
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if name not in found:
            left.append(f"{name} {shape}")
        elif found[name].shape != tensor.shape:
            left.append(f"{name} {shape}, there {tuple(found[name].shape)}")
    if len(left) == len(wanted):
        what = f"no weight of {init.source} fits the network of the preset"
        raise InputError(what, "leave --preset out: its network is then the model's")
    return left


def frozen_for_steps(
    model: Preconditioned, preset: Preset, device: str, group: Group = ALONE
) -> Denoiser:
    """Return a frozen model as the steps of a run call it; it answers the same.

    On a GPU, in half precision, that is under autocast a copy whose weights are rounded already:
    otherwise each pass has a launch for each of them. A sharded model has no copy.
    """
    kind, half = torch.device(device).type, HALF.get(preset.train.precision)
    if kind != "cuda" or half is None or group.mesh is not None:
        return model
    return rounded_beforehand(model, half, kind, compiled=preset.train.compile)


def rounded_beforehand(
    model: Preconditioned, half: torch.dtype, kind: str, *, compiled: bool = False
) -> Denoiser:
    """Return what is the model, and under autocast to `half` on a kind of device a rounded copy."""
    twin = rounded_copy(model, half)
    if compiled:
        twin.network.compile()

    def frozen(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        result: Tensor = (twin if torch.is_autocast_enabled(kind) else model)(x, sigma, *given)
        return result

    return frozen


def training_images(
    preset: Preset, data: Dataset, device: str, batch: int | None = None, group: Group = ALONE
) -> BatchFn:
    """Return the microbatches of a preset's steps; with `batch`, of steps of one so large.

    Raises InputError as `batches` does.
    """
    shards = preset.train.accumulate * group.world_size if batch is None else 1
    own = preset.data
    return batches(
        data, batch=batch or preset.train.batch, shards=shards, seed=preset.train.seed,
        device=device, flip=own.flip, label_dropout=own.label_dropout, balanced=own.balanced,
        workers=own.workers, timeout=own.timeout, rank=group.rank, world_size=group.world_size,
    )  # fmt: skip


def build_own(preset: Preset, device: str, group: Group) -> nn.Module | None:
    """Return the module that the preset's method owns, where the student is; None without one."""
    owns = method_row(preset).owns
    if owns is None:
        return None
    with seeded(keyed_generator("own", preset.train.seed)):
        own = on_device(owns(), device if group.mesh is None else "cpu")
    shard(own, group, ())
    return own


def recompute_activations(network: nn.Module, name: str) -> None:
    """Make the residual blocks of a network keep only their inputs for the backward pass."""
    blocks = [part for part in network.modules() if isinstance(part, NETWORKS[name].blocks)]
    if not blocks:
        what = f"network {name!r} has no residual blocks"
        raise UserError(what, "leave train.checkpoint_activations out")
    for block in blocks:
        block.recompute = True  # type: ignore[assignment]  # of a module, torch says: Tensor or Module


def fit_settings(preset: Preset, group: Group = ALONE) -> FitSettings:
    """Return the numbers of a run."""
    same = preset.train.model_dump(include={field.name for field in fields(FitSettings)})
    return FitSettings(**same, rounds=preset.train.accumulate, group=group)


@dataclass
class TrainState:
    """Everything a run changes. `step` counts finished optimizer steps.

    Without a `target` the loss compares the student with itself (mu = 0) or needs none.
    """

    student: Preconditioned
    target: Preconditioned | None
    emas: dict[str, Ema]
    optimizer: Optimizer
    scaler: GradScaler | None = None
    """Scales the loss in fp16."""
    own: nn.Module | None = None
    """The module that belongs to the method, if it has one; the optimizer has its parameters."""
    step: int = 0
    bad_steps: int = 0
    """Steps in a row, up to this one, that were skipped for what is not finite."""
    unlogged: dict[str, Any] | None = None
    """What the next log line has summed up so far, as JSON; for whoever writes it."""


def counters(state: TrainState) -> dict[str, Any]:
    """Return what a state holds beside tensors, as JSON takes it."""
    scaler = state.scaler.state_dict() if state.scaler is not None else None
    facts = {"step": state.step, "bad_steps": state.bad_steps, "unlogged": state.unlogged}
    return {**facts, "scaler": scaler}


def set_counters(state: TrainState, facts: Mapping[str, Any]) -> None:
    """Set what `counters` returned; what an older version did not know is as at the start.

    Raises InputError for a state of the scaler that is none.
    """
    state.step = facts["step"]
    state.bad_steps = facts.get("bad_steps", 0)
    state.unlogged = facts.get("unlogged")
    if state.scaler is not None and facts.get("scaler") is not None:
        try:
            state.scaler.load_state_dict(facts["scaler"])
            home = next(state.student.parameters()).device  # the scale stays where it is first used
            state.scaler.scale(torch.zeros((), device=home))
        except (KeyError, TypeError, RuntimeError):
            what = f"the checkpoint of step {state.step} holds no state of the scaler of fp16"
            raise InputError(what, "remove it to go on from the one before it") from None


@dataclass(frozen=True)
class FitSettings:
    """The numbers of a run. Losses are means over the global batch."""

    steps: int
    batch: int
    seed: int
    lr: float
    warmup_steps: int = 0
    decay_to: float = 1.0
    """Learning rate at the last step as a share of `lr`, reached along a cosine."""
    steady_steps: int = 0
    """Steps after which the learning rate falls as 1 / sqrt(step); 0 is never."""
    rounds: int = 1
    """Microbatches a step, accumulated."""
    max_grad_norm: float | None = None
    max_bad_steps: int = 5
    """Skipped steps in a row before the run ends; overflows of fp16 are not among them."""
    precision: str = "fp32"
    compile: bool = False
    group: Group = ALONE
