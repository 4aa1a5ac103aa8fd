"""Our numbers beside those of the released code, on two small networks; see golden/README.md."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.distances import l1, l2
from cmtool.core.edits import block_means, colorize, luma, superres
from cmtool.core.losses import (
    consistency_loss,
    denoising_loss,
    karras,
    noise_pair,
    progressive_loss,
    teacher_pair,
    truncated_snr,
    uniform_weight,
)
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.noise import karras_sigmas
from cmtool.core.precond import (
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    log_label_1000,
)
from cmtool.core.samplers import SAMPLERS, clipped, multistep
from cmtool.core.solvers import heun
from cmtool.core.tensors import clip

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["openai_unet_cond", "openai_unet_uncond"]


class Case:
    def __init__(self, name):
        about = json.loads((GOLDEN / f"{name}.json").read_text())
        size = about["image_size"]
        mult = tuple(int(m) for m in about["channel_mult"].split(","))
        resolutions = [int(r) for r in about["attention_resolutions"].split(",")]
        options = AdmOptions(
            model_channels=about["num_channels"],
            channel_mult=mult,
            num_res_blocks=about["num_res_blocks"],
            attention_levels=tuple(i for i in range(len(mult)) if size >> i in resolutions),
            head_channels=about["num_head_channels"],
            scale_shift=about["use_scale_shift_norm"],
        )
        self.network = Adm(options, 3, about["num_classes"] or 0).eval()
        weights = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        self.network.load_state_dict({k: v.float() for k, v in weights.items()})
        self.n = load_file(GOLDEN / f"{name}.safetensors")
        self.labels = self.n.get("labels") if about["class_cond"] else None
        self.teacher, self.f = self.model(edm_scalings), self.model(consistency_scalings)

    def model(self, scalings, factor=1.0):
        network = self.network
        if factor != 1.0:
            network = copy.deepcopy(network)
            with torch.no_grad():
                for p in network.parameters():
                    p.mul_(factor)
        return Preconditioned(network, scalings, log_label_1000, sigma_data=0.5, sigma_min=0.002)

    def noises(self):
        draws = iter(self.n["noises"])
        return lambda like: next(draws)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def close(ours, golden, bound):
    gap = (ours.detach() - golden).abs().max() / golden.abs().max()
    assert float(gap) < bound


def test_network_and_both_scalings(case):
    n = case.n
    with torch.no_grad():
        close(case.teacher(n["x"], n["sigma"], case.labels), n["edm_denoised"], 1e-5)
        close(case.f(n["x"], n["sigma"], case.labels), n["consistency_output"], 1e-5)


@pytest.mark.parametrize("distance", [l1, l2], ids=["l1", "l2"])
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_loss_and_gradient(case, method, distance):
    n = case.n
    grid = karras_sigmas(18).flip(0)
    hi, lo = grid[n["index"]], grid[n["index"] + 1]
    pair = noise_pair(n["x0"], hi, lo, n["noise"])
    if method == "cd":
        teacher = case.model(edm_scalings, 1.02)
        pair = teacher_pair(n["x0"], hi, lo, n["noise"], case.labels, teacher, heun)
    target = case.model(consistency_scalings, 0.97)
    loss = consistency_loss(case.f, target, pair, case.labels, distance, uniform_weight)
    case.network.zero_grad()
    loss.mean().backward()
    norm = torch.stack([p.grad.norm() for p in case.network.parameters()]).norm()
    key = f"{method}_{distance.__name__}"
    close(loss, n[f"{key}_loss"], 1e-4)
    close(norm[None], n[f"{key}_grad_norm"], 1e-4)


def test_denoising_loss(case):
    n = case.n
    weight = partial(karras, sigma_data=0.5)
    with torch.no_grad():
        loss = denoising_loss(
            case.teacher, n["x0"], n["edm_sigma"], n["noise"], case.labels, weight
        )
    close(loss, n["edm_loss"], 1e-4)


def test_progressive_loss(case):
    n = case.n
    grid = karras_sigmas(2 * 8 + 1).flip(0)  # 8 intervals and their midpoints
    index = 2 * n["pd_index"]
    hi, mid, lo = grid[index], grid[index + 1], grid[index + 2]
    x = n["x0"] + hi.float().reshape(-1, 1, 1, 1) * n["noise"]
    teacher = case.model(edm_scalings, 1.02)
    with torch.no_grad():
        loss = progressive_loss(
            case.teacher, teacher, x, hi, mid, lo, case.labels, l2, truncated_snr
        )
    close(loss, n["pd_loss"], 1e-4)


@pytest.mark.parametrize(
    ("key", "indices"),
    [("onestep", [0]), ("multistep_0_22_39", [0, 22]), ("multistep_0_10_25_39", [0, 10, 25])],
)
def test_multistep(case, key, indices):
    sigmas = karras_sigmas(40).flip(0)[indices]
    with torch.no_grad():
        x0 = multistep(
            clipped(case.f), torch.zeros_like(case.n["x0"]), sigmas, case.noises(),
            sigma_min=0.002, labels=case.labels,
        )  # fmt: skip
    close(x0, case.n[f"sample_{key}"], 1e-4)


@pytest.mark.parametrize(
    ("name", "key", "n", "options"),
    [
        ("euler", "euler_8", 8, {}),
        ("heun", "heun_8", 8, {}),
        ("dpm2", "dpm_6", 6, {}),
        ("ancestral", "ancestral_6", 6, {}),
        ("stochastic_heun", "heun_churn_6", 6, {"s_churn": 5.0}),
    ],
)
def test_samplers_of_teachers(case, name, key, n, options):
    with torch.no_grad():
        x0 = SAMPLERS[name](
            clipped(case.teacher), torch.zeros_like(case.n["x0"]), karras_sigmas(n).flip(0),
            case.noises(), sigma_min=0.002, labels=case.labels, project=clip, **options,
        )  # fmt: skip
    close(x0, case.n[f"sample_{key}"], 1e-4)


@pytest.mark.parametrize("name", ["colorize", "superres8"])
def test_edits(case, name):
    x0 = case.n["x0"]
    edit = colorize(luma(x0)) if name == "colorize" else superres(block_means(x0, 8), 8)
    close(edit.init, case.n[f"{name}_input"], 1e-5)
    with torch.no_grad():  # the recorded runs start from noise alone
        result = multistep(
            clipped(case.f), torch.zeros_like(x0), karras_sigmas(40).flip(0)[[0, 6, 15, 30]],
            case.noises(), sigma_min=0.002, labels=case.labels, project=edit.project,
        )  # fmt: skip
    close(result, case.n[f"{name}_out"], 1e-4)
