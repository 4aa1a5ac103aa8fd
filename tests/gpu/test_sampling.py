"""Sampling on the pretended card: the host prepares all levels without waiting for any."""

import pytest
import torch

from cmtool.core.rng import SeededNoise
from cmtool.core.samplers import SAMPLERS
from cmtool.core.solvers import SOLVERS
from cmtool.models import load_model
from cmtool.presets.build import build_sampler
from cmtool.presets.schema import Choice
from cmtool.sampling import Plan, generate, plan
from tests.gpu.pretend.card import counting
from tests.gpu.pretend.training import DEVICE

pytestmark = pytest.mark.pretend_gpu

SEEDS = range(4)


@pytest.fixture(scope="module")
def teacher():
    return load_model("digits-edm", device=DEVICE, otherwise="teacher")


@pytest.fixture(scope="module")
def student():
    return load_model("digits-cd", device=DEVICE)


def sampled(model, sampler, num, precision="fp32", batch=4):
    """Return images drawn with `num` levels, and what was counted."""
    sigmas = plan(model.preset, num, sampler=Choice(name=sampler)).sigmas
    chosen = Plan(Choice(name=sampler), sigmas, precision)
    with counting() as counted:
        parts = generate(model.f, model.preset, chosen, SEEDS, batch=batch, device=DEVICE)
        images = torch.cat(list(parts))
    return images, counted


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_no_level_waits_for_the_card(sampler, precision, request):
    model = request.getfixturevalue("student" if sampler == "multistep" else "teacher")
    sampled(model, sampler, 2, precision)
    images, counted = sampled(model, sampler, 6, precision)
    assert images.is_cuda
    assert len(counted.waits) == 1, counted  # at the end: are all values finite?


def test_a_batch_waits_once(student):
    _, counted = sampled(student, "multistep", 2, batch=2)
    assert len(counted.waits) == 2, counted


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_no_solver_waits(solver, teacher):
    x = torch.zeros(2, 3, 8, 8, device=DEVICE)
    high, low = (torch.full((2,), sigma, device=DEVICE, dtype=torch.float64) for sigma in (2, 1))
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with counting() as counted, torch.no_grad():
        SOLVERS[solver](teacher.f, x, high, low, labels)
    assert not counted.waits, counted


def test_the_noise_of_seeds_comes_without_a_wait():
    like = torch.zeros(4, 3, 8, 8, device=DEVICE)
    noise = SeededNoise(SEEDS)
    with counting() as counted:
        noise(like)
    assert not counted.waits, counted


def test_every_sampler_of_a_preset_can_be_built():
    for name in sorted(SAMPLERS):
        build_sampler(Choice(name=name))
