"""sCM: on numbers of two public codes, and on Gaussian data, where all is known."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.losses import noise_point, teacher_point, uniform_weight
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.core.scm import (
    NORMALISERS,
    LinearLogVariance,
    angle,
    over_norm,
    over_rms,
    scm_loss,
    scm_tangent,
)
from cmtool.core.tensors import expand
from cmtool.models import load_model
from tests.golden import GOLDEN
from tests.problems import Gaussian

FOLDER = GOLDEN / "successors"
FASTGEN = load_file(FOLDER / "scm_fastgen.safetensors")
MNIST = load_file(FOLDER / "scm_mnist.safetensors")
VERIFIED = json.loads((FOLDER / "verified.json").read_text())
CASES = {
    (file, name): row
    for file in ("scm_fastgen", "scm_mnist")
    for name, row in json.loads((FOLDER / f"{file}.json").read_text())["cases"].items()
}
DATA = 0.5


def raw_output(x0, x, sigma, sigma_data):
    """TrigFlow's F of an answer x0 at x: (cos^2(t) x - x0) / (sin(t) s_d)."""
    cos, sin = angle(sigma, sigma_data)
    return (expand(cos**2, x) * x - x0) / expand(sin * sigma_data, x)


def denoiser(name):
    network = load_model(FOLDER / f"{name}.pkl", kind="teacher").f.network.double()
    return Preconditioned(network, edm_scalings, log_label, sigma_data=DATA, sigma_min=0.0)


@pytest.fixture(scope="module")
def networks():
    """float64; the students in train mode, the teacher in eval mode."""
    students = {name: denoiser(name).train().requires_grad_(True) for name in ("song", "songc")}
    return students | {"song_teacher": denoiser("song_teacher").eval()}


def given(key):
    """x0, unit noise, sigma and labels of a case, float64."""
    (file, _), row = key, CASES[key]
    n, at = (FASTGEN, f"{row['network']}.") if file == "scm_fastgen" else (MNIST, "")
    labels = n.get(f"{at}labels")
    sigma = n[f"{at}sigma"] if at else DATA * n["both.t"].double().tan()
    return n[f"{at}x0"].double(), n[f"{at}noise"].double(), sigma, labels


def point_of(key, networks):
    """The point of the path, the x0 of its slope, and the labels."""
    x0, noise, sigma, labels = given(key)
    if not CASES[key]["teacher"]:
        return noise_point(x0, sigma, noise), x0, labels
    teacher = networks["song_teacher"]
    point = teacher_point(x0, sigma, noise, labels, teacher)
    return point, point.x - expand(sigma, x0) * point.slope, labels


class FourierLogVariance(LinearLogVariance):
    """FastGen's head of a network with a Fourier embedding: linear on the features of that."""

    def __init__(self, network):
        super().__init__(2 * len(network.frequencies))
        self.frequencies = network.frequencies

    def forward(self, sigma):
        angles = sigma.log()[:, None] / 4 * (2 * math.pi * self.frequencies)
        return self.linear(torch.cat([angles.cos(), angles.sin()], 1)).squeeze(1)


def head_of(key, student):
    """The head of a case, with its recorded weights; None for a case without."""
    name = CASES[key]["network"]
    if not CASES[key].get("logvar_head", True):
        return None
    weight = FASTGEN[f"{name}.logvar.weight"].double()
    head = (
        LinearLogVariance(weight.shape[1])
        if name == "song"
        else FourierLogVariance(student.network)
    )
    bias = FASTGEN[f"{name}.logvar.bias"]
    head.double().load_state_dict({"linear.weight": weight, "linear.bias": bias})
    return head


@pytest.mark.parametrize("key", [k for k in CASES if k[1] != "sct_fd"], ids="-".join)
def test_loss_and_gradient_of_public_code(networks, key):
    (file, name), row = key, CASES[key]
    n = FASTGEN if file == "scm_fastgen" else MNIST
    student = networks[row["network"]]
    head = head_of(key, student)
    point, clean, labels = point_of(key, networks)

    def weight(hi, lo):
        prior = 1 / hi if row.get("prior_weighting_enabled") else torch.ones_like(hi)
        return prior / (clean[0].numel() if row.get("divide_x_0_spatial_dim") else 1)

    normalise = over_rms if row.get("g_norm_spatial_invariance", True) else over_norm
    g = scm_tangent(student, point, clean, labels, sigma_data=DATA, warmth=row["r"]).detach()
    torch.testing.assert_close(g, n[f"{name}.g"].double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        normalise(g), n[f"{name}.g_normalised"].double(), rtol=1e-4, atol=1e-5
    )
    student.zero_grad()
    loss = scm_loss(
        student, student, point, clean, labels, weight, normalise,
        sigma_data=DATA, warmth=row["r"], log_variance=head,
    )  # fmt: skip
    loss.mean().backward()
    modules = [student] if head is None else [student, head]
    grads = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    norm = float(sum(g.square().sum() for g in grads).sqrt())
    verified = VERIFIED[file][name]
    expected = torch.tensor(verified["loss_f64"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-7)
    assert norm == pytest.approx(verified["grad_norm_f64"], rel=1e-6)


@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_raw_output_and_its_derivative(networks, mode):
    """F, and J = cos t sin t dF/dt, which g is made of in the paper."""
    n, student = FASTGEN, networks["song"]
    point, clean, labels = point_of(("scm_fastgen", f"{mode}_plain"), networks)
    cos, sin = (expand(v, point.x) for v in angle(point.sigma, DATA))
    raw = raw_output(student(point.x, point.sigma, labels), point.x, point.sigma, DATA)
    assert relative(raw, n[f"song.{mode}.F"]) < 2.2e-6
    slope = (cos**2 * point.x - clean) / sin  # dx_t/dt
    assert relative(slope, n[f"song.{mode}.dxdt"]) < 1.5e-6
    g = scm_tangent(student, point, clean, labels, sigma_data=DATA)
    jvp = (-g - cos**2 * (DATA * raw - slope)) / DATA - cos * sin * cos * point.x / DATA
    assert relative(jvp, n[f"song.{mode}.jvp"]) < 7.1e-6


def relative(found, recorded):
    return float((found.detach() - recorded.double()).norm() / recorded.double().norm())


GAUSS = Gaussian(eps=0.0)
"""f has its boundary at 0, as sCM's students have."""


def exact_point(levels):
    """A point at each level, with the slope of the exact teacher's path; float64."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor(levels, dtype=torch.float64)
    shape = (len(levels), 3, 4, 4)
    x0 = GAUSS.m + GAUSS.s * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    point = teacher_point(x0, sigma, noise, None, GAUSS.denoiser)
    return point, GAUSS.denoiser(point.x, sigma)


class Scaled(torch.nn.Module):
    """Gaussian data's consistency function, times a power of what it should scale by."""

    def __init__(self, power):
        super().__init__()
        self.power = torch.nn.Parameter(torch.tensor(power, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        scale = GAUSS.s**2 / (GAUSS.s**2 + expand(sigma**2, x))
        return GAUSS.m + (x - GAUSS.m) * scale.sqrt() ** self.power


def gradient(power, normalise, head=None):
    student = Scaled(power)
    point, clean = exact_point([0.01, 0.3, 1.0, 7.0, 79.0])
    loss = scm_loss(
        student, student, point, clean, None, uniform_weight, normalise,
        sigma_data=0.6, log_variance=head,
    )  # fmt: skip
    loss.mean().backward()
    return float(student.power.grad)


@pytest.mark.parametrize("name", NORMALISERS)
def test_the_consistency_function_is_the_fixed_point(name):
    """Of distillation by the exact teacher: no gradient there, and a way back from elsewhere."""
    normalise = NORMALISERS[name]
    assert abs(gradient(1.0, normalise)) < 1e-6
    assert gradient(1.2, normalise) > 1e-3
    assert gradient(0.8, normalise) < -1e-3


def test_g_is_cos_t_times_the_derivative_of_f_by_t():
    """f by central differences along the path, in TrigFlow's time."""
    student, s_d = Scaled(1.3), 0.6
    point, clean = exact_point([0.15, 0.7, 2.0, 6.0])
    g = scm_tangent(student, point, clean, None, sigma_data=s_d)
    t, h = (point.sigma / s_d).atan(), 1e-5

    def f(time):
        sigma = s_d * time.tan()
        x = GAUSS.at(point.x, expand(point.sigma, point.x), expand(sigma, point.x))
        return student(x, sigma)

    by_differences = (f(t + h) - f(t - h)) / (2 * h) * expand(t.cos(), point.x)
    torch.testing.assert_close(g, by_differences, rtol=1e-7, atol=1e-8)


def test_without_warmth_the_target_is_that_of_a_diffusion_model():
    """g = -cos^2 t (s_d F - dx/dt): its fixed point is the denoiser."""
    point, clean = exact_point([0.1, 0.7, 20.0])
    g = scm_tangent(GAUSS.denoiser, point, clean, None, sigma_data=0.6, warmth=0.0)
    assert float(g.abs().max()) < 1e-12
    half = scm_tangent(Scaled(1.2), point, clean, None, sigma_data=0.6, warmth=0.5)
    whole, none = (
        scm_tangent(Scaled(1.2), point, clean, None, sigma_data=0.6, warmth=r) for r in (1.0, 0.0)
    )
    torch.testing.assert_close(half, (whole + none) / 2)


def test_the_log_variance_that_fits_is_that_of_the_loss():
    """exp(-lv) q + lv is least at lv = ln q; the head starts at 0 and gets a gradient."""
    head = LinearLogVariance(16).double()
    assert head(torch.tensor([0.1, 1.0, 10.0])).tolist() == [0.0] * 3
    gradient(1.2, over_rms, head)
    plain = gradient(1.2, over_rms)
    with torch.no_grad():
        head.linear.bias.fill_(math.log(4.0))
    assert gradient(1.2, over_rms, head) == pytest.approx(plain / 4)
    assert head.linear.weight.grad.norm() > 0


def test_the_log_variance_is_computed_in_float32_in_any_precision():
    variance, sigma = LinearLogVariance(16), torch.tensor([0.1, 3.0, 70.0])
    torch.nn.init.normal_(variance.linear.weight, generator=torch.Generator().manual_seed(0))
    wanted = variance(sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = variance(sigma)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
