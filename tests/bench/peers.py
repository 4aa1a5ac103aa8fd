"""Our training step and samplers beside those of the released code, turn by turn.

`python -m tests.bench.peers --openai CHECKOUT --edm CHECKOUT --only cd-b ct-b`

CHECKOUT is a folder with openai/consistency_models or NVlabs/edm in it. Neither runs here as it
stands: packages that the step does not need are replaced by empty ones, attention is the plain
one of the same file instead of flash-attn, and openai's target EMA, whose float32 path fails, is
taken parameter by parameter. Peers run in float32, all that they support on a CPU.

Each comparison first shows that the work is equal: the same weights, images, noise and levels
give the same loss and gradient. Then both sides step in turn, and the medians of the ratios of
their times are printed, by the clock and by CPU time. Each side steps in a process of its own, with
its own settings of memory. Run it on one thread (OMP_NUM_THREADS=1) of one core (taskset).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtool.core.distances import l2
from cmtool.core.losses import (
    consistency_loss,
    denoising_loss,
    karras,
    noise_pair,
    teacher_pair,
    uniform_weight,
)
from cmtool.core.noise import karras_sigmas
from cmtool.core.precond import Preconditioned
from cmtool.core.samplers import SAMPLERS, clipped, multistep
from cmtool.core.solvers import heun
from cmtool.formats.edm_pkl import song_rules
from cmtool.formats.foreign import translate
from tests.bench.measure import alternate, apart, peak_resident, ratio, timed
from tests.bench.runs import CONFIGS, GRID, LEARNING_RATE, MU, RATES, Config, model, start

PRECISIONS = ("fp32", "bf16")
STEPS = 18


@dataclass(frozen=True)
class Comparison:
    """Our call by precision; `agreement` is how equal the work was measured to be."""

    ours: dict[str, Callable[[], object]]
    agreement: dict[str, dict[str, float]]


def stub(name: str, **attributes: object) -> None:
    """Put an empty module of that name where an import will find it."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


def autocast(precision: str) -> torch.autocast:
    """Return the block in which a forward pass runs."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def agreement(ours: Tensor, gradient: list[Tensor], theirs: Tensor, expected: list[Tensor]):
    """Return the largest error of the losses (B,), as a share of them, and the gradients'."""
    a, b = (torch.cat([g.flatten() for g in grads]).double() for grads in (gradient, expected))
    return {
        "loss error": float((ours - theirs).abs().max() / theirs.abs().max()),
        "gradient error": float((a - b).norm() / b.norm()),
        "gradient cosine": float(a @ b / (a.norm() * b.norm())),
    }


def gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    """Return the gradient of a loss by parameter, in order; zeros where it does not depend."""
    found = torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)
    return list(found)


# openai/consistency_models ------------------------------------------------------------------


def import_openai(folder: Path) -> types.SimpleNamespace:
    """Return the modules of openai/consistency_models that a training step uses."""
    for name, attributes in {
        "blobfile": {},
        "mpi4py": {"MPI": None},
        "piq": {"LPIPS": None},
    }.items():
        stub(name, **attributes)
    sys.path.insert(0, str(folder))
    names = ("unet", "karras_diffusion", "train_util", "logger", "nn")
    cm = types.SimpleNamespace(**{name: import_module(f"cm.{name}") for name in names})
    cm.unet.QKVFlashAttention = lambda channels, heads: cm.unet.QKVAttention(heads)
    cm.logger.configure(dir=tempfile.mkdtemp(), format_strs=[])
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return cm


def openai_network(cm: types.SimpleNamespace, config: Config) -> nn.Module:
    """Return the peer's network of a configuration, with the weights of ours."""
    o = config.options
    network = cm.unet.UNetModel(
        image_size=config.side,
        in_channels=3,
        model_channels=o.model_channels,
        out_channels=3,
        num_res_blocks=o.num_res_blocks,
        attention_resolutions=tuple(2**level for level in o.attention_levels),
        channel_mult=o.channel_mult,
        num_classes=config.classes or None,
        num_head_channels=o.head_channels,
        use_scale_shift_norm=o.scale_shift,
        resblock_updown=o.resblock_updown,
    )
    network.load_state_dict(config.network().state_dict())
    return network


def mended_loop(cm: types.SimpleNamespace) -> type[Any]:
    """Return the peer's loop of consistency training, whose target EMA fails in float32."""

    class Mended(cm.train_util.CMTrainLoop):
        def _update_target_ema(self) -> None:
            mu, _ = self.ema_scale_fn(self.global_step)
            cm.nn.update_ema(self.target_model.parameters(), self.mp_trainer.master_params, rate=mu)

    return Mended


def openai_step(cm: types.SimpleNamespace, config: Config, method: str) -> Callable[[], None]:
    """Return one training step of the peer's own loop, on one batch."""

    denoiser = partial(cm.karras_diffusion.KarrasDenoiser, loss_norm="l2")
    network = openai_network(cm, config)
    copies = [openai_network(cm, config) for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(network.state_dict())
    loop = mended_loop(cm)(
        model=network,
        target_model=copies[0],
        teacher_model=copies[1] if method == "cd" else None,
        teacher_diffusion=denoiser(distillation=False),
        training_mode="consistency_distillation" if method == "cd" else "consistency_training",
        ema_scale_fn=lambda step: (MU, GRID),
        total_training_steps=1_000_000,
        diffusion=denoiser(distillation=True, weight_schedule="uniform"),
        data=None,
        batch_size=config.batch,
        microbatch=-1,
        lr=LEARNING_RATE,
        ema_rate=",".join(map(str, RATES)),
        log_interval=10,
        save_interval=10,
        resume_checkpoint="",
    )
    x0, labels = config.images()
    return partial(loop.run_step, x0, {} if labels is None else {"y": labels})


def compare_consistency(cm: types.SimpleNamespace, config: Config, method: str) -> Comparison:
    """Return CD ("cd") or CT ("ct") on both sides."""
    networks = [openai_network(cm, config) for _ in range(3)]  # student, target, teacher
    for network in networks[1:]:
        network.requires_grad_(False)
    if method == "ct":
        networks[2] = None
    x0, labels = config.images()
    noise = torch.randn_like(x0)
    denoiser = partial(cm.karras_diffusion.KarrasDenoiser, loss_norm="l2")
    torch.manual_seed(1)
    theirs = denoiser(distillation=True, weight_schedule="uniform").consistency_losses(
        networks[0],
        x0,
        GRID,
        model_kwargs={} if labels is None else {"y": labels},
        target_model=networks[1],
        teacher_model=networks[2],
        teacher_diffusion=denoiser(distillation=False),
        noise=noise,
    )["loss"]
    expected = gradients(theirs.mean(), networks[0])

    torch.manual_seed(1)
    index = torch.randint(0, GRID - 1, (config.batch,))
    grid = karras_sigmas(GRID).flip(0)
    hi, lo = grid[index], grid[index + 1]
    student, target, teacher = (
        ours_of(config, network, kind)
        for network, kind in zip(networks, ("consistency", "consistency", "teacher"), strict=True)
    )
    found = {}
    for precision in PRECISIONS:
        with autocast(precision):
            pair = (
                teacher_pair(x0, hi, lo, noise, labels, teacher, heun)
                if teacher
                else noise_pair(x0, hi, lo, noise)
            )
            loss = consistency_loss(student, target, pair, labels, l2, uniform_weight)
        found[precision] = agreement(loss, gradients(loss.mean(), student), theirs, expected)

    runs = {p: start(config, method, p, config.network()) for p in PRECISIONS}
    return Comparison({p: partial(next, run.steps) for p, run in runs.items()}, found)


def ours_of(config: Config, network: nn.Module | None, kind: str) -> Preconditioned | None:
    """Return the peer's network as a model of ours: the parameters have the same names."""
    if network is None:
        return None
    twin = config.network()
    twin.load_state_dict(network.state_dict())
    return model(twin, kind).requires_grad_(next(network.parameters()).requires_grad)


def openai_sampling(cm: types.SimpleNamespace, config: Config, method: str) -> partial[Tensor]:
    """Return the peer's one-step sampling ("onestep") or Heun's sampler of 18 levels ("heun")."""
    return partial(
        cm.karras_diffusion.karras_sample,
        cm.karras_diffusion.KarrasDenoiser(distillation=method == "onestep", loss_norm="l2"),
        openai_network(cm, config).eval().requires_grad_(False),
        (config.batch, 3, config.side, config.side),
        STEPS,
        sampler=method,
        model_kwargs={},
        device="cpu",
    )


def compare_sampling(cm: types.SimpleNamespace, config: Config, method: str) -> Comparison:
    """Return the sampler that `openai_sampling` does on our side."""
    theirs = openai_sampling(cm, config, method)
    f = ours_of(config, theirs.args[1], "consistency" if method == "onestep" else "teacher").eval()
    shape = theirs.args[2]
    sigmas = [80.0] if method == "onestep" else karras_sigmas(STEPS).flip(0).tolist()
    draw = multistep if method == "onestep" else SAMPLERS["heun"]

    @torch.no_grad()
    def ours(precision: str) -> Tensor:
        with autocast(precision):
            return draw(clipped(f), torch.zeros(shape), sigmas, torch.randn_like, sigma_min=0.002)

    images = {}
    for name, call in {"peer": theirs, **{p: partial(ours, p) for p in PRECISIONS}}.items():
        torch.manual_seed(1)
        images[name] = call()
    found = {
        p: {"largest error": float((images[p] - images["peer"]).abs().max())} for p in PRECISIONS
    }
    return Comparison({p: partial(ours, p) for p in PRECISIONS}, found)


# NVlabs/edm ---------------------------------------------------------------------------------


def import_edm(folder: Path) -> types.SimpleNamespace:
    """Return the modules of NVlabs/edm that a training step uses."""
    sys.path.insert(0, str(folder))
    names = {"networks": "training.networks", "loss": "training.loss",
             "stats": "torch_utils.training_stats"}  # fmt: skip
    return types.SimpleNamespace(**{name: import_module(path) for name, path in names.items()})


def edm_network(edm: types.SimpleNamespace, config: Config) -> nn.Module:
    """Return the peer's preconditioned SongUNet of a configuration."""
    o = config.options
    network = edm.networks.EDMPrecond(
        config.side,
        3,
        model_type="SongUNet",
        model_channels=o.model_channels,
        channel_mult=list(o.channel_mult),
        num_blocks=o.num_blocks,
        attn_resolutions=[config.side >> level for level in o.attention_levels],
        dropout=o.dropout,
    )
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return network


def edm_step(edm: types.SimpleNamespace, config: Config) -> Callable[[], None]:
    """Return one step as the peer's loop takes it, without DDP, augmentation and data loading."""
    network = edm_network(edm, config).train()
    average = edm_network(edm, config).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999))
    loss_of = edm.loss.EDMLoss()
    x0, _ = config.images()
    seen = 0

    def step() -> None:
        nonlocal seen
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net=network, images=x0, labels=None, augment_pipe=None)
        edm.stats.report("Loss/loss", loss)
        (loss.sum() / config.batch).backward()
        for p in network.parameters():  # of EDM's own loop: without it we'd time less than it does
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        beta = 0.5 ** (config.batch / max(min(500_000, 0.05 * seen), 1e-8))
        for kept, p in zip(average.parameters(), network.parameters(), strict=True):
            kept.copy_(p.detach().lerp(kept, beta))
        seen += config.batch

    return step


def compare_denoising(edm: types.SimpleNamespace, config: Config) -> Comparison:
    """Return EDM's training step on both sides; its loss is a sum over pixels, ours a mean."""
    network = edm_network(edm, config).train()
    twin = config.network()
    stored = network.model.state_dict()
    twin.load_state_dict(
        translate(
            song_rules(config.options, list(twin.state_dict()), config.side),
            {
                name: tensor
                for name, tensor in stored.items()
                if not name.endswith("resample_filter")
            },
        )
    )
    ours = model(twin, "teacher")
    x0, _ = config.images()
    pixels = x0[0].numel()
    torch.manual_seed(1)
    theirs = edm.loss.EDMLoss()(network, x0).flatten(1).mean(1)
    gradient = dict(
        zip(dict(network.model.named_parameters()), gradients(theirs.mean(), network), strict=True)
    )
    named = translate(song_rules(config.options, list(twin.state_dict()), config.side), gradient)
    expected = [named[name] for name, _ in twin.named_parameters()]
    torch.manual_seed(1)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(config.batch, 1, 1, 1)).flatten()
    noise = torch.randn_like(x0)
    found = {}
    for precision in PRECISIONS:
        with autocast(precision):
            loss = denoising_loss(ours, x0, sigma, noise, None, partial(karras, sigma_data=0.5))
        found[precision] = agreement(loss, gradients(loss.mean(), ours), theirs, expected)
    assert pixels == 3 * config.side**2
    runs = {p: start(config, "edm", p, config.network()) for p in PRECISIONS}
    return Comparison({p: partial(next, run.steps) for p, run in runs.items()}, found)


COMPARISONS: dict[str, tuple[str, Callable[..., Comparison], Callable[..., Any], str, Any]] = {
    "cd-a": ("openai", compare_consistency, openai_step, "a", ("cd",)),
    "cd-a-again": ("openai", compare_consistency, openai_step, "a-again", ("cd",)),
    "cd-b": ("openai", compare_consistency, openai_step, "b", ("cd",)),
    "ct-b": ("openai", compare_consistency, openai_step, "b", ("ct",)),
    "cd-c16": ("openai", compare_consistency, openai_step, "c16", ("cd",)),
    "cd-c8": ("openai", compare_consistency, openai_step, "c8", ("cd",)),
    "edm-s": ("edm", compare_denoising, edm_step, "s", ()),
    "onestep-b": ("openai", compare_sampling, openai_sampling, "b", ("onestep",)),
    "heun-c16": ("openai", compare_sampling, openai_sampling, "c16", ("heun",)),
}
"""Whose code, the comparison, the peer's side of it, and what both are called with."""

IMPORTS = {"openai": import_openai, "edm": import_edm}


def peer_of(name: str, folder: Path) -> Callable[[], object]:
    """Return the peer's call of a comparison."""
    torch.manual_seed(0)
    whose, _, make, config, what = COMPARISONS[name]
    call: Callable[[], object] = make(IMPORTS[whose](folder), CONFIGS[config], *what)
    return call


def rows(
    name: str, peer: Callable[..., Any], comparison: Comparison, repeats: int
) -> list[dict[str, object]]:
    """Return the figures of one comparison, one row for each of our precisions."""
    calls = {p: partial(timed, call) for p, call in comparison.ours.items()}
    seconds = alternate({"peer": partial(peer, timed), **calls}, repeats, lambda call: call())
    out = []
    for precision in comparison.ours:
        times = ratio(seconds["peer"], seconds[precision])
        out.append({
            "name": name, "precision": precision, "wall": round(times.wall, 2),
            "cpu": round(times.cpu, 2), **comparison.agreement[precision],
        })  # fmt: skip
    return out


def memory(
    name: str, peer: Callable[..., Any], comparison: Comparison, repeats: int
) -> list[dict[str, object]]:
    """Return the MiB of a step above what is there between steps, the least of the repeats."""
    calls = {p: partial(peak_resident, call) for p, call in comparison.ours.items()}
    out: list[dict[str, object]] = []
    for who, call in {"peer": partial(peer, peak_resident), **calls}.items():
        call()  # the first step makes the optimizer's moments
        least = min(call() for _ in range(repeats))
        out.append({"name": name, "of": who, "MiB above resident": round(least)})
    return out


def main() -> None:
    """Run the comparisons that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openai", type=Path, help="folder of openai/consistency_models")
    parser.add_argument("--edm", type=Path, help="folder of NVlabs/edm")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    arguments = parser.parse_args()
    folders = {"openai": arguments.openai, "edm": arguments.edm}
    chosen = [name for name in arguments.only if folders[COMPARISONS[name][0]]]
    peers = {name: apart(partial(peer_of, name, folders[COMPARISONS[name][0]])) for name in chosen}
    for name, peer in peers.items():
        torch.manual_seed(0)
        whose, compare, _, config, what = COMPARISONS[name]
        comparison = compare(IMPORTS[whose](folders[whose]), CONFIGS[config], *what)
        figures = memory if arguments.memory else rows
        found = figures(name, peer, comparison, arguments.repeats)
        for row in found:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
