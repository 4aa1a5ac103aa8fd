"""Training steps on the pretended card: every method in every precision, and what a step may have.

A step that mixes tensors of the CPU and of the card, or a kernel that the card lacks, ends in an
error. A step that asks the card for anything but whether its gradient is finite waits twice.
"""

import pytest
import torch

from cmtool.core.methods import METHODS
from cmtool.core.optimizers import OPTIMIZERS
from tests.gpu.pretend.card import counting
from tests.gpu.pretend.training import training

pytestmark = pytest.mark.pretend_gpu

EDM2 = (
    "model.network={name='edm2', model_channels=16, channel_mult=[1,2], num_blocks=1,"
    " attention_levels=[1], head_channels=16, dropout=0.1}"
)
SONG = (
    "model.network={name='song', model_channels=16, channel_mult=[1,2], num_blocks=1,"
    " attention_levels=[1], embedding='fourier', encoder='residual', resample_filter=[1,3,3,1],"
    " dropout=0.1}"
)
ADM = [
    "model.network.model_channels=16", "model.network.head_channels=16",
    "model.network.norm_groups=4",
]  # fmt: skip
BATCH = "train.batch=8"
PRESETS = {
    "adaptive_training": ["digits-adcm", "loss.method.lam=100.0", *ADM],
    "consistency_distillation": ["digits-cd", *ADM],
    "consistency_training": ["digits-ct", *ADM],
    "continuous_distillation": [
        "digits-cd", "loss.method=continuous_distillation", "loss.levels=ramp", *ADM
    ],
    "continuous_training": ["digits-ct-continuous", *ADM],
    "denoising": ["digits-edm", *ADM],
    "live_distillation": ["digits-cd", "loss.method=live_distillation", "loss.levels=ramp", *ADM],
    "mean_flow": ["digits-meanflow", *ADM],
    "mid_training": ["digits-cmt", *ADM],
    "progressive_distillation": ["digits-pd", *ADM],
    "scm_distillation": ["digits-scd", *ADM],
    "scm_training": ["digits-sct", *ADM],
    "truncated_training": ["digits-tcm", *ADM],
    "uncertain_denoising": [
        "digits-edm", "loss.method=uncertain_denoising", EDM2,
        "train.ema=[{name='ema', sigma_rel=0.1}]",
    ],
}  # fmt: skip
"""A small preset of each method."""
VARIANTS = {
    "activations computed again": ["digits-ct", *ADM, "train.checkpoint_activations=true"],
    "clipped": ["digits-cd", *ADM, "train.max_grad_norm=1.0"],
    "classes dropped, images mirrored": [
        "digits-edm", *ADM, "data.label_dropout=0.2", "data.flip=true"
    ],
    "of NCSN++": ["digits-ict", SONG],
    "of EDM2": ["digits-ict", EDM2],
    "several averages": [
        "digits-ct", *ADM, "train.ema=[{name='a', rate=0.9}, {name='b', halflife_images=500}]"
    ],
    "target an average": [
        "digits-cd", *ADM, "loss.target=ema", "loss.curriculum.mu=0.9", "model.network.dropout=0.1"
    ],
    "two parts": ["digits-cd", *ADM, "train.accumulate=2"],
    "warped images": ["digits-edm", *ADM, "data.augment=0.5", "model.network.augment_dim=9"],
}  # fmt: skip
OF_OPTIMIZERS = {name: ["digits-ct", *ADM, f"train.optimizer={name}"] for name in OPTIMIZERS}
FIRST = 2
"""Steps in which the optimizer makes its moments, and the allocator its blocks."""


def third_step(*preset):
    """Return a training, what its third step said, and what was counted in it."""
    made = training(*preset, BATCH)
    for _ in range(FIRST):
        next(made.steps)
    with counting() as counted:
        info = next(made.steps)
    return made, info, counted


def assert_one_wait(counted):
    assert len(counted.waits) == 1, str(counted)
    assert counted.counts["copy card to pinned"] == 1
    assert not counted.total("copy pageable")


def test_every_method_has_a_preset_here():
    assert PRESETS.keys() == METHODS.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", sorted(PRESETS))
def test_the_host_waits_once_a_step(method, precision):
    made, info, counted = third_step(*PRESETS[method], f"train.precision={precision}")
    assert info.step == FIRST + 1
    assert not info.skipped
    assert all(p.is_cuda for p in made.state.student.parameters())
    assert all(t.is_cuda for t in (info.loss, info.sigma, info.grad_norm))
    assert_one_wait(counted)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_no_option_of_training_adds_a_wait(variant):
    _, _, counted = third_step(*VARIANTS[variant], "train.precision=bf16")
    assert_one_wait(counted)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_no_optimizer_adds_a_wait_or_a_loop_over_parameters(optimizer):
    made, _, counted = third_step(*OF_OPTIMIZERS[optimizer])
    assert_one_wait(counted)
    with counting() as counted:
        made.state.optimizer.step()
    assert counted.launches < len(list(made.state.student.parameters()))


def test_networks_compute_in_the_precision_asked_for():
    """Convolutions and products of a bf16 step are not in float32, but for the embeddings'."""
    made, *_ = third_step(*PRESETS["denoising"], "train.precision=bf16")
    seen = []
    for module in made.state.student.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    next(made.steps)
    assert set(seen) == {torch.bfloat16}
