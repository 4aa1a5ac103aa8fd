"""TCM, MeanFlow and ADCM on recorded numbers, in float64."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core import methods
from cmtool.core.adaptive import adaptive_grid, adaptive_step
from cmtool.core.distances import pseudo_huber
from cmtool.core.losses import (
    consistency_loss,
    inverse_gap,
    karras,
    noise_pair,
    noise_point,
    teacher_pair,
)
from cmtool.core.meanflow import mean_flow_loss, mean_flow_target, mean_velocity
from cmtool.core.methods import Given, Models
from cmtool.core.networks import layers
from cmtool.core.networks.song import Song, SongOptions
from cmtool.core.networks.truncated import Truncated
from cmtool.core.noise import NoiseRange, Stage, student_t_quantile, tightened, tightening
from cmtool.core.precond import (
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    flow_label,
    flow_scalings,
    log_label,
)
from cmtool.core.solvers import euler
from cmtool.core.tangents import tangent
from cmtool.core.tensors import expand, level
from cmtool.formats.edm_pkl import song_rules
from cmtool.formats.foreign import translate
from cmtool.models import load_model
from tests.golden import GOLDEN

FOLDER = GOLDEN / "successors"
VERIFIED = json.loads((FOLDER / "verified.json").read_text())
NUMBERS = {n: load_file(FOLDER / f"{n}.safetensors") for n in ("tcm", "meanflow", "mf", "adcm")}
ROWS = {
    n: json.loads((FOLDER / f"{n}.json").read_text()) for n in ("tcm", "meanflow", "mf", "adcm")
}


def raw(name):
    return load_model(FOLDER / f"{name}.pkl", kind="teacher").f.network.double().train()


@pytest.fixture(scope="module")
def networks():
    """The raw networks, float64: the student's and that of the first stage."""
    return {name: raw(name) for name in ("song", "song_teacher")}


def wrapped(network, scalings=edm_scalings, sigma_min=0.0):
    return Preconditioned(network, scalings, log_label, sigma_data=0.5, sigma_min=sigma_min)


def norm_of(f):
    squares = [p.grad.square().sum() for p in f.parameters() if p.grad is not None]
    return float(sum(squares).sqrt())


@pytest.fixture
def dropped(monkeypatch):
    """Have the dropouts of each pass take recorded masks, in order."""

    def record(masks, p):
        seen = {}

        def forward(self, x):
            number = seen[self] = seen.get(self, len(seen))
            return x * masks[number % len(masks)] / (1 - p)

        monkeypatch.setattr(layers.Dropout, "forward", forward)

    return record


@pytest.mark.parametrize("name", ROWS["tcm"]["cases"])
def test_tcm_loss_and_gradient(networks, dropped, name):
    row, n, verified = ROWS["tcm"]["cases"][name], NUMBERS["tcm"], VERIFIED["tcm"][name]
    x0, noise = n["x0"].double(), n["noise"].double()
    hi = n[f"{name}.t"].double()
    closest = 1 - row["ratio_limit"]
    lo = tightened(hi, row["stage"], q=row["q"], k=8.0, b=1.0, closest=closest).clamp_min(1e-6)
    torch.testing.assert_close(lo, n[f"{name}.r"].double(), rtol=2e-6, atol=1e-7)
    distance = partial(pseudo_huber, c=row["c"])
    weight = karras if row["weighting"] == "cout_sq" else inverse_gap
    student = networks["song"].requires_grad_(True)
    student.zero_grad()
    if row["dropout"]:
        masks = [n[k] for k in sorted(n) if k.startswith(f"{name}.mask.")]
        dropped(masks, row["dropout"])
    if row["transition_t"] is None:
        f, teacher = wrapped(student), wrapped(networks["song_teacher"]).eval()
        pair = noise_pair(x0, hi, lo, noise)
        if row["distil_teacher"]:
            pair = teacher_pair(x0, hi, lo, noise, None, teacher, euler)
        loss = consistency_loss(f, f, pair, None, distance, weight)
        total = loss.mean()
        teacher.train()
    else:
        transition, at = torch.tensor(row["transition_t"]).double(), n[f"{name}.boundary"]
        label = float(log_label(transition))
        hi = torch.where((hi == transition) & ~at, hi * (1 + 1e-12), hi)  # there by chance
        f = wrapped(Truncated(networks["song_teacher"], student, label))
        given = Given(x0, None, noise, hi, lo, Stage())
        assert int((hi == transition).sum()) == row["boundary_rows"]
        assert int((lo < transition).sum()) == row["target_rows_frozen"]
        loss = methods.truncated_training(
            Models(f, f), given, distance=distance, weight=weight,
            transition=float(transition), boundary_weight=row["w_boundary"],
        )  # fmt: skip
        total = loss.mean()
        at = at.double()
        scale = len(hi) / (len(hi) - at.sum()) * (1 - at) + at * len(hi) / at.sum() * 0.1
        loss = loss / scale
    total.backward()
    expected = torch.tensor(verified["loss_f64"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert float(total.detach()) == pytest.approx(verified["total_f64"], rel=1e-6)
    assert norm_of(f) == pytest.approx(verified["grad_norm_f64"], rel=1e-6)
    assert all(p.grad is None for p in networks["song_teacher"].parameters())


def test_levels_above_the_transition_follow_students_t():
    law = ROWS["tcm"]["level_quantiles"]["stage2"]
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    found = student_t_quantile(
        u, df=law["df"], scale=law["scale"], low=law["lower"], high=law["upper"]
    )
    torch.testing.assert_close(found, NUMBERS["tcm"]["quantiles.stage2"], rtol=1e-6, atol=0)


def test_levels_of_the_first_stage_are_cut_at_both_ends(monkeypatch):
    law = ROWS["tcm"]["level_quantiles"]["stage1"]
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
    found = tightening(
        19, Stage(), NoiseRange(law["lower"], law["upper"]), torch.Generator(),
        mean=law["loc"], std=law["scale"], truncated=True,
    )  # fmt: skip
    torch.testing.assert_close(
        found.sigma_hi, NUMBERS["tcm"]["quantiles.stage1"], rtol=1e-6, atol=0
    )


@pytest.fixture(scope="module")
def flow():
    """The two-time network of MeanFlow's authors, float64, in train mode."""
    options = SongOptions(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,),
        channel_mult_noise=2, resample_filter=(1, 3, 3, 1), two_time=True,
    )  # fmt: skip
    made = Song(options, channels=3)
    weights = {k: v.double() for k, v in NUMBERS["mf"].items() if "resample" not in k}
    for name, value in weights.items():
        if ".qkv." in name:  # in thirds there; interleaved in EDM's files, whose rules these are
            parts = value.reshape(3, -1, *value.shape[1:])
            weights[name] = parts.transpose(0, 1).reshape(value.shape)
    rules = song_rules(options, list(made.state_dict()), 8)
    made.load_state_dict(translate(rules, weights))
    return Preconditioned(
        made.double().train(), flow_scalings, flow_label, sigma_data=0.5, sigma_min=1e-12
    )


@pytest.mark.parametrize("name", ROWS["meanflow"]["cases"])
def test_mean_flow_loss_and_gradient(flow, dropped, name):
    row, n, verified = ROWS["meanflow"]["cases"][name], NUMBERS["meanflow"], VERIFIED["meanflow"]
    if row["dropout"]:
        dropped([n[k] for k in sorted(n) if k.startswith(f"{name}.mask.")], row["dropout"])
    x0, e, t, r = (n[key].double() for key in ("x", "e", "t", "r"))
    t = t.clamp(max=1 - 1e-8)  # at 1 the level is infinite
    z = expand(1 - t, x0) * x0 + expand(t, x0) * e
    u = mean_velocity(flow, z, t, r, None).detach()
    recorded = n[f"{name}.u"].double()
    assert float((u - recorded).norm() / recorded.norm()) < 5.7e-7
    goal = mean_flow_target(flow, z, e - x0, t, r, None).detach()
    recorded = n[f"{name}.u_target"].double()
    assert float((goal - recorded).norm() / recorded.norm()) < 1.4e-6
    flow.zero_grad()
    power, eps = row["norm_p"], row["norm_eps"]
    loss = mean_flow_loss(flow, flow, z, e - x0, t, r, None, power=power, eps=eps)
    loss.mean().backward()
    expected = torch.tensor(verified[name]["loss_f64"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert norm_of(flow) == pytest.approx(verified[name]["grad_norm_f64"], rel=1e-6)


def test_one_step_sample_of_mean_flow(flow):
    """t = 1 is a level of infinity: 1e8 is near enough."""
    n = NUMBERS["meanflow"]
    noise = n["sample.noise"].double()
    flow.eval()
    with torch.no_grad():
        found = flow(1e8 * noise, level(1e8, noise))
    flow.train()
    recorded = n["sample.out"].double()
    assert float((found - recorded).norm() / recorded.norm()) < 5.7e-7


@pytest.mark.parametrize("name", ROWS["adcm"]["gaussian"])
def test_the_grid_of_a_gaussian_denoiser_is_geometric(name):
    row = ROWS["adcm"]["gaussian"][name]
    s, recorded = row["std"], NUMBERS["adcm"][name]

    def denoiser(x, sigma, labels=None):
        return s**2 / (s**2 + expand(sigma**2, x)) * x

    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    x0, noise = s * signs[0].reshape(1, 1, 2, 2), signs[1].reshape(1, 1, 2, 2)  # exact moments
    grid = adaptive_grid(denoiser, x0, noise, None, NoiseRange(), lam=row["lam"])
    assert len(grid) == row["points"]
    torch.testing.assert_close(grid, recorded.sort().values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROWS["adcm"]["network"])
def test_adaptive_steps_of_a_network(networks, name):
    row, n = ROWS["adcm"]["network"][name], NUMBERS["adcm"]
    x0, noise = n["x0"].double(), n["noise"].double()
    f = wrapped(networks["song"].eval(), consistency_scalings, 0.002)
    f0, v = tangent(f, noise_point(x0, level(row["t"], x0).contiguous(), noise), None)
    for found, recorded in ((f0, n[f"network_{name}.f"]), (v, n[f"network_{name}.v"])):
        assert float((found - recorded).detach().norm() / recorded.norm()) < 1e-5
    for key, lam in (("dt_lam0.01", 0.01), ("dt_lam0.64", 0.64)):
        step = adaptive_step(f, x0, noise, row["t"], None, lam=lam)
        assert step == pytest.approx(row[key], rel=1e-6)


def test_adcm_loss_and_gradient(networks):
    row, n = ROWS["adcm"]["loss"], NUMBERS["adcm"]
    f = wrapped(networks["song"].eval().requires_grad_(True), consistency_scalings, 0.002)
    f.zero_grad()
    given = Given(n["x0"].double(), None, n["noise"].double(), n["loss.t"], n["loss.r"], Stage())
    distance = partial(pseudo_huber, c=row["c"])
    loss = methods.adaptive_training(Models(f, f), given, distance=distance)
    loss.mean().backward()
    torch.testing.assert_close(loss.detach(), n["loss.loss"], rtol=1e-6, atol=0)
    assert norm_of(f) == pytest.approx(row["grad_norm"], rel=1e-6)
    networks["song"].train()
