"""Are the numbers right: precision of a step, dropout's masks, the norm kernel."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.gpu.check.trial import NotRun, Trial

TOLERANCES = {"fp32": 1e-4, "bf16": 8e-2, "fp16": 2e-2}
"""Of the gradient against float64, as a share of its norm."""
SCALE = 1024.0
"""Of the loss, so that small gradients in fp16 are no zeros."""
SHAPES = [(8, 64, 32, 32), (3, 96, 8, 8), (2, 192, 64, 64), (5, 32, 7, 9)]


def environment(trial: Trial) -> None:
    """What the device is and what it reaches: product, copy, launch, noise of the host."""
    from cmtool.training.utilisation import peak_flops

    size = 1 << (10 if trial.tiny else 28)
    a, one = torch.empty(size, device=trial.device), torch.zeros(1, device=trial.device)
    generator = torch.Generator().manual_seed(0)
    copied = trial.milliseconds(lambda: a.clone(), 5)
    trial.say("environment", None, {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if trial.on_gpu else trial.device,
        "cudnn": torch.backends.cudnn.version(),
        "peak of random bf16, TFLOP/s": trial.peak / 1e12,
        "peak of ones, TFLOP/s": peak_flops(trial.device, "bf16") / 1e12,
        "copy, TB/s": 2 * a.nbytes / copied / 1e9,
        "us a launch": 1e3 * trial.milliseconds(lambda: one.add_(1), 5000),
        "ms of noise 512x3x32x32": trial.milliseconds(
            lambda: torch.randn(512, 3, 32, 32, generator=generator), 5
        ),
    })  # fmt: skip


def precision(trial: Trial) -> None:
    """Loss and gradient of a CD step in each precision, against the same step in float64."""
    from cmtool.system.devices import full_float32

    step = Step(trial)
    reference_loss, reference = step.run("cpu", "float64")
    for name, most in TOLERANCES.items():
        try:
            with full_float32():
                loss, gradient = step.run(trial.device, name)
        except RuntimeError as error:  # no such kernel on this device
            trial.not_run(f"step in {name}", error)
            continue
        figures = {
            "loss": float((loss - reference_loss).abs().max() / reference_loss.abs().max()),
            "gradient": float((gradient - reference).norm() / reference.norm()),
        }
        good = figures["gradient"] < most and figures["loss"] < most
        trial.say(f"step in {name} against float64", good, figures)


class Step:
    """One CD step of the digits from stirred weights, with the same images, levels and noise."""

    def __init__(self, trial: Trial) -> None:
        from cmtool.models import load_model
        from cmtool.presets.toml import load_preset

        self.teacher = load_model("digits-edm", otherwise="teacher")
        self.preset = load_preset("digits-cd", {"train.batch": 4 if trial.tiny else 64})
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.rand(self.preset.train.batch, 3, 8, 8, generator=generator) * 2 - 1
        self.labels = torch.arange(len(self.x0)) % 10
        self.student = copy.deepcopy(self.teacher.f)
        with torch.no_grad():
            for p in self.student.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))

    def run(self, device: str, precision: str) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) and the gradient, float64 on the CPU."""
        from cmtool.core.methods import Models
        from cmtool.core.rng import seeded, step_generator
        from cmtool.presets.build import build_curriculum, build_denoiser, build_objective
        from cmtool.system.devices import autocast, on_device

        exact = precision == "float64"
        dtype = torch.float64 if exact else torch.float32

        def placed(f: Any) -> Any:
            return on_device(copy.deepcopy(f).to(dtype), device)

        objective = build_objective(self.preset, placed(self.teacher.f), device)
        made = build_denoiser(self.preset, copy.deepcopy(self.student.network))
        student = placed(made).requires_grad_(True).train()
        stage = build_curriculum(self.preset)(0, self.preset.train.steps)
        x0, labels = self.x0.to(device, dtype), self.labels.to(device)
        generator = step_generator(0, 0, 0)
        with seeded(generator), autocast(torch.device(device).type, precision):
            loss, _ = objective(Models(student, student), x0, labels, stage, generator)
        (loss.mean() * SCALE).backward()
        grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        return loss.detach().double().cpu(), torch.cat(grads).double().cpu() / SCALE


def masks(trial: Trial) -> None:
    """Student and target drop out the same; blocks computed again give the same gradient."""
    from cmtool.core import losses

    preset = trial.preset("digits-ct", train__precision="fp32", model__network__dropout=0.3)
    f = trial.steps(preset)[0].student.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    x = torch.randn(16, 3, 8, 8, device=trial.device)
    sigma = torch.full((16,), 2.0, device=trial.device, dtype=torch.float64)
    labels = torch.zeros(16, dtype=torch.int64, device=trial.device)
    pair = losses.Pair(x, sigma, x, sigma)
    loss = losses.consistency_loss(
        f, f, pair, labels, lambda a, b: (a - b).abs().flatten(1).amax(1), losses.uniform_weight
    )
    trial.say("student and target drop out the same", float(loss.max()) < 2e-2, float(loss.max()))
    norms = []
    for again in (False, True):
        key = {"train__checkpoint_activations": again, "train__precision": "fp32"}
        steps = trial.steps(trial.preset("digits-ct", model__network__dropout=0.3, **key))[1]
        norms.append(float(next(steps).grad_norm))
    good = abs(norms[0] - norms[1]) < 1e-3 * norms[0]
    trial.say("blocks computed again give the same gradient", good, norms)


def norm_kernel(trial: Trial) -> None:
    """The channels-last norm of a GPU against PyTorch's own operations, forwards and backwards."""
    try:
        from cmtool.core.networks.cuda import normalise
    except ImportError:
        raise NotRun("this version has no norm kernel") from None
    if not trial.on_gpu:
        raise NotRun("the norm kernel is for a GPU")
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for shape in SHAPES:
            trial.say(f"norm kernel {dtype} {shape}", *_norm_error(normalise, shape, dtype, most))
    x = _channels_last((32, 192, 64, 64), torch.bfloat16)
    weight, bias = torch.ones(192, device="cuda"), torch.zeros(192, device="cuda")
    given = (x, weight, bias, None, None, None, 32, 1e-5, True)
    with torch.no_grad():
        trial.say("norm and SiLU of 32x192x64x64 bf16, ms", None, {
            "kernel": trial.milliseconds(lambda: normalise.group_norm(*given)),
            "eager": trial.milliseconds(lambda: normalise.by_steps(*given)),
            "floor at 3 TB/s": 4 * x.numel() / 3e9,
        })  # fmt: skip


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _norm_error(
    normalise: Any, shape: tuple[int, ...], dtype: torch.dtype, most: float
) -> tuple[bool, dict[str, float]]:
    """Return whether the kernel's answer and gradients are near, and how near."""
    b, c = shape[:2]
    x, grad = _channels_last(shape, dtype), _channels_last(shape, dtype)
    weight, bias = torch.randn(c, device="cuda"), torch.randn(c, device="cuda")
    rows = [torch.randn(b, c, device="cuda", dtype=dtype) * 0.3 for _ in range(3)]
    found = []
    for compute in (normalise.group_norm, normalise.by_steps):
        given = [t.detach().clone().requires_grad_() for t in (x, weight, bias, *rows)]
        given[0] = given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = compute(*given, 8, 1e-5, True)
        found.append([y, *torch.autograd.grad(y, given, grad)])
    names = ("y", "x", "weight", "bias", "scale", "shift", "added")
    errors = {
        name: float((a.float() - e.float()).norm() / e.float().norm())
        for name, a, e in zip(names, *found, strict=True)
    }
    return max(errors.values()) < most, errors
