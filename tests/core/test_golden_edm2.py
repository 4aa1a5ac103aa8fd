"""EDM2's network, and snapshots of EDM, EDM2, ECT and TCM, on numbers of their authors' code.

The limits are those of the golden files: what float32 code differs from float64.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.losses import karras
from cmtool.core.methods import METHODS, Given, Models
from cmtool.core.networks.edm2 import LogVariance, MPLayer
from cmtool.core.noise import Stage
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.core.samplers import multistep
from cmtool.core.solvers import euler
from cmtool.core.tensors import expand
from cmtool.formats import edm_pkl, torch_pickle
from cmtool.models import load_model
from tests.golden import GOLDEN

FOLDER = GOLDEN / "successors"
FILES = ("edm2_io", "ect_imgnet", "ect_sampler", "tcm")
IO, IMGNET, SAMPLER, TCM = (load_file(FOLDER / f"{name}.safetensors") for name in FILES)
SAMPLES = json.loads((FOLDER / "ect_sampler.json").read_text())["cases"]
VERIFIED = json.loads((FOLDER / "verified.json").read_text())
RECORDED = json.loads((FOLDER / "edm2_io.json").read_text())
LIMIT = 5.7e-7
"""Of EDM2's outputs."""
LIMIT_ECT = 9.4e-7


def far(found, recorded):
    """The distance in the 2-norm, relative to what is recorded."""
    found, recorded = found.detach().double(), recorded.double()
    return float((found - recorded).norm() / recorded.norm())


@pytest.mark.parametrize("file", ["edm2", "ect_edm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_in_snapshots_of_edm2_and_of_ect(file, dtype):
    model = load_model(FOLDER / f"{file}.pkl")
    assert model.kind == ("teacher" if file == "edm2" else "consistency")
    assert model.preset.model.scalings.name == "edm"
    f = model.f.to(dtype)
    x, sigma, labels = IO["x"].to(dtype), IO["sigma"].to(dtype), IO["labels"]
    raw = f.network(IO["raw_x"].to(dtype), IO["c_noise"].to(dtype), labels)
    assert far(raw, IO["raw_output"]) < LIMIT
    assert far(f(x, sigma, labels), IO["denoised"]) < LIMIT
    assert far(f(x, sigma, labels), IO["denoised_of_pickle"]) < LIMIT
    assert far(f(x, sigma), IO["denoised_no_label"]) < LIMIT


def head_of_edm2():
    """The log-variance head in EDM2's snapshot: a model is loaded without it."""
    path = FOLDER / "edm2.pkl"
    with path.open("rb") as opened:
        outer = torch_pickle.load(opened, path.stat().st_size)["ema"]
    stored = torch_pickle.as_tensors(edm_pkl.collect(outer), path.stat().st_size)
    head = LogVariance()
    head.load_state_dict({name: stored[f"logvar_{name}"].float() for name in head.state_dict()})
    return head


def test_the_log_variance_of_a_level():
    assert far(head_of_edm2()(log_label(IO["sigma"])), IO["logvar"]) < LIMIT
    assert any("log-variance head" in note for note in load_model(FOLDER / "edm2.pkl").notes)


def test_the_loss_of_edm2_and_its_gradient():
    """It is a sum over pixels, and its gradient is taken at the normalised weights."""
    network = load_model(FOLDER / "edm2.pkl").f.network.double().train()
    head = head_of_edm2().double()
    f = Preconditioned(network, edm_scalings, log_label, sigma_data=0.5, sigma_min=0.0)
    f.network.requires_grad_(True)
    for part in (*f.modules(), *head.modules()):
        if isinstance(part, MPLayer):
            part.normalise()
    drop_nothing(f)
    assert far(network.emb_noise.weight, IO["normalised.unet.emb_noise.weight"]) < LIMIT
    assert far(network.out_conv.weight, IO["normalised.unet.out_conv.weight"]) < LIMIT
    x0 = IO["x0"].double()
    given = Given(x0, IO["labels"], IO["noise"].double(), IO["sigma"].double(), None, Stage())
    loss = METHODS["uncertain_denoising"].loss(Models(f, f, own=head), given, weight=karras)
    pixels = x0[0].numel()
    expected = IO["edm2_loss_map"].double().flatten(1).sum(1)
    torch.testing.assert_close(pixels * loss, expected, rtol=8.2e-6, atol=0)
    total = pixels * loss.mean()
    verified = VERIFIED["edm2_io"]["edm2_loss"]
    assert total.item() == pytest.approx(verified["loss_mean_f64"], rel=1e-9)
    total.backward()
    grads = [p.grad for p in (*f.parameters(), *head.parameters())]
    norm = torch.nn.utils.get_total_norm(grads)
    assert norm.item() == pytest.approx(verified["grad_norm_f64"], rel=1e-9)


def drop_nothing(module):
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


@pytest.mark.parametrize("steps", [1, 2])
def test_ects_sampler_on_edm2(steps):
    """It never shifts the boundary, and renoises to sigma itself."""
    draws = iter([IMGNET["sampler.latents"], *IMGNET["sampler.noises"]])
    x0 = multistep(
        load_model(FOLDER / "ect_edm2.pkl").f, torch.zeros(3, 3, 8, 8),
        torch.tensor([80.0, 1.526][:steps]).double(), lambda like: next(draws),
        sigma_min=0.0, labels=IMGNET["sampler.labels"],
    )  # fmt: skip
    assert far(x0, IMGNET[f"sampler_{steps}step"]) < LIMIT_ECT


@pytest.mark.parametrize("file", ["song", "songc"])
def test_snapshots_of_ect_on_cifar_shift_the_boundary(file):
    """In training it is at 0."""
    model = load_model(FOLDER / f"{file}.pkl")
    assert model.noise_range.sigma_min == 0.003
    x, sigma, labels = (SAMPLER.get(f"{file}.{name}") for name in ("x", "sigma", "labels"))
    assert far(model.f(x, sigma, labels), SAMPLER[f"{file}.denoised_eval"]) < LIMIT_ECT
    network = model.f.network
    plain = Preconditioned(network, edm_scalings, log_label, sigma_data=0.5, sigma_min=0.0)
    assert far(plain(x, sigma, labels), SAMPLER[f"{file}.denoised_train"]) < LIMIT_ECT


@pytest.mark.parametrize("case", [case for case in SAMPLES if case.endswith("eval")])
def test_ects_sampler_on_cifar(case):
    file = case.split(".")[0]
    draws = iter([SAMPLER[f"{file}.latents"], *SAMPLER[f"{file}.noises"]])
    sigmas = torch.tensor(SAMPLES[case]["sigmas"]).double()
    x0 = multistep(
        load_model(FOLDER / f"{file}.pkl").f.double(), torch.zeros(3, 3, 8, 8).double(), sigmas,
        lambda like: next(draws).double(), sigma_min=0.0, labels=SAMPLER.get(f"{file}.labels"),
    )  # fmt: skip
    assert far(x0, SAMPLER[case]) < LIMIT_ECT


def test_snapshots_of_tcm_do_not_shift_though_they_say_the_same_numbers():
    model = load_model(FOLDER / "tcm_tiny.pkl")
    assert (model.kind, model.noise_range.sigma_min) == ("consistency", 0.002)
    found = model.f(TCM["tiny.x"], TCM["tiny.sigma"])
    assert far(found, TCM["tiny.denoised_eval"]) < LIMIT_ECT


def test_the_teacher_of_tcms_distillation():
    n = {name: TCM[name].double() for name in ("x0", "noise", "ecd_stage4.t", "ecd_stage4.r")}
    t, r = n["ecd_stage4.t"], n["ecd_stage4.r"]
    x = n["x0"] + expand(t, n["x0"]) * n["noise"]
    model = load_model(FOLDER / "song_teacher.pkl")
    assert model.kind == "teacher"
    assert far(euler(model.f.double(), x, t, r, None), TCM["ecd_stage4.x_r"]) < LIMIT_ECT
