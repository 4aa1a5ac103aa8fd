"""The methods of 2024 on numbers of the code that their authors published (or, iCT, on ours).

Compared in float64 with the float64 values of `verified.json`.
"""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.distances import pseudo_huber
from cmtool.core.losses import consistency_loss, inverse_gap, karras, noise_pair
from cmtool.core.networks import layers
from cmtool.core.networks.edm2 import MPLayer
from cmtool.core.noise import (
    NoiseRange,
    Stage,
    doubling,
    karras_sigmas,
    lognormal_mass,
    mass_between,
    tightened,
    tightening,
)
from cmtool.core.precond import (
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    log_label,
)
from cmtool.models import load_model
from tests.golden import GOLDEN

FOLDER = GOLDEN / "successors"
ICT = json.loads((FOLDER / "ict.json").read_text())
VERIFIED = json.loads((FOLDER / "verified.json").read_text())
CASES = ("ict", "ect_cifar", "ect_imgnet")
NUMBERS = {
    name: load_file(FOLDER / f"{name}.safetensors") for name in ("ict", "ect_cifar", "ect_imgnet")
}


@pytest.fixture(scope="module", params=[0])
def networks():
    """The raw networks of the files, float64, in train mode."""
    return {
        name: load_model(FOLDER / f"{name}.pkl", kind="teacher").f.network.double().train()
        for name in ("song", "songc", "ect_edm2")
    }


def student(network, scalings, sigma_min=0.0):
    f = Preconditioned(network, scalings, log_label, sigma_data=0.5, sigma_min=sigma_min)
    return f.requires_grad_(True)


def normalise_weights(module):
    for part in module.modules():
        if isinstance(part, MPLayer):
            part.normalise()


def loss_and_norm(f, pair, labels, distance, weight):
    """The losses of the images, and the 2-norm of the gradient of their mean.

    Where weights are normalised by force, that comes first, as in training.
    """
    f.zero_grad()
    normalise_weights(f)
    loss = consistency_loss(f, f, pair, labels, distance, weight)
    loss.mean().backward()
    squares = sum(p.grad.square().sum() for p in f.parameters() if p.grad is not None)
    return loss.detach(), float(squares.sqrt())


@pytest.mark.parametrize("number", range(3))
def test_the_grid_doubles_as_in_ict(number):
    row, n = ICT["schedules"][number], NUMBERS["ict"]
    found = [
        doubling(k, row["total"], s0=row["s0"], s1=row["s1"]).n
        for k in n[f"schedule{number}.k"].tolist()
    ]
    assert found == n[f"schedule{number}.N"].tolist()


@pytest.mark.parametrize("law", ICT["laws"], ids=lambda law: f"N{law['N']}")
def test_levels_are_picked_by_the_mass_of_ict(law):
    recorded = NUMBERS["ict"][f"law.N{law['N']}.p"]
    sigmas = karras_sigmas(law["N"])
    p = mass_between(sigmas, law["P_mean"], law["P_std"])
    torch.testing.assert_close(p, recorded, rtol=1e-9, atol=1e-15)
    stage, generator = Stage(n=law["N"]), torch.Generator().manual_seed(0)
    hi, lo = lognormal_mass(
        100_000, stage, NoiseRange(), generator, mean=law["P_mean"], std=law["P_std"]
    )
    index = torch.searchsorted(sigmas, lo)
    assert torch.equal(sigmas[index + 1], hi)
    expected = float((p * torch.arange(len(p))).sum())
    assert float(index.double().mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ICT["cases"])
def test_ict_loss_and_gradient(networks, name):
    row, n = ICT["cases"][name], NUMBERS["ict"]
    which = row["network"]
    sigma_min = row["sigma_min_of_scalings"]
    f = student(networks[which], consistency_scalings, sigma_min)
    hi, lo = n[f"{name}.t"], n[f"{name}.r"]
    sigmas, index = karras_sigmas(row["N"]), n[f"{name}.index"]
    torch.testing.assert_close(sigmas[index + 1], hi, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigmas[index], lo, rtol=1e-12, atol=0)
    pair = noise_pair(n[f"{which}.x0"].double(), hi, lo, n[f"{which}.noise"].double())
    default = name not in ("N81_c03",)
    distance = pseudo_huber if default else partial(pseudo_huber, c=row["c"])
    loss, norm = loss_and_norm(f, pair, n.get(f"{which}.labels"), distance, inverse_gap)
    torch.testing.assert_close(loss, n[f"{name}.loss"], rtol=1e-6, atol=0)
    assert norm == pytest.approx(row["grad_norm"], rel=1e-6)


ECT = {
    (case, name): row
    for case in ("ect_cifar", "ect_imgnet")
    for name, row in json.loads((FOLDER / f"{case}.json").read_text())["cases"].items()
    if "q" in row
}
"""What ECT's two branches computed, by file and name."""


@pytest.mark.parametrize("key", ECT, ids="-".join)
def test_ect_levels(key):
    """r of the recorded t: in float32 by ECT, in float64 by us."""
    row, n = ECT[key], NUMBERS[key[0]]
    t, r = n[f"{key[1]}.t"].double(), n[f"{key[1]}.r"].double()
    k = row["k"] if row["mapping"] == "sigmoid" else 0.0
    found = tightened(t, row["stage"], q=row["q"], k=k, b=row["b"])
    assert torch.equal(found == 0, r == 0)
    torch.testing.assert_close(found, r, rtol=2e-6, atol=1e-7)


def test_ect_stages_are_counted_in_images():
    def lower(images, **options):
        generator = torch.Generator().manual_seed(0)
        stage = Stage(images=images)
        return tightening(64, stage, NoiseRange(), generator, stage_images=100, **options)

    assert (lower(0).sigma_lo == 0).any()
    assert torch.equal(lower(99).sigma_lo, lower(0).sigma_lo)
    assert (lower(100).sigma_lo >= lower(99).sigma_lo).all()
    fine = lower(700)  # stage 7 of q = 2 is stage 0 of q = 256
    torch.testing.assert_close(fine, lower(0, q=256.0))
    assert (fine.sigma_lo < fine.sigma_hi).all()


@pytest.fixture
def dropped(monkeypatch):
    """Have every dropout of a network take recorded masks, in order, the same in every pass."""

    def record(masks, p):
        turn = iter([])

        def forward(self, x):
            nonlocal turn
            mask = next(turn, None)
            if mask is None:
                turn = iter(masks)
                mask = next(turn)
            return x * mask / (1 - p)

        monkeypatch.setattr(layers.Dropout, "forward", forward)

    return record


@pytest.mark.parametrize("key", ECT, ids="-".join)
def test_ect_loss_and_gradient(networks, dropped, key):
    (case, name), row = key, ECT[key]
    n, verified = NUMBERS[case], VERIFIED[case][name]
    which = row["network"]
    stored = copy.deepcopy(networks[which].state_dict())
    f = student(networks[which], edm_scalings)
    masks = [n[k] for k in sorted(n) if k.startswith(f"{name}.mask.")]
    dropped(masks or [torch.ones(())], row["dropout"])
    t = n[f"{name}.t"].double()
    k = row["k"] if row["mapping"] == "sigmoid" else 0.0
    r = tightened(t, row["stage"], q=row["q"], k=k, b=row["b"])
    given = which.removeprefix("ect_")
    pair = noise_pair(n[f"{given}.x0"].double(), t, r, n[f"{given}.noise"].double())
    weight = inverse_gap if case == "ect_cifar" else karras
    distance = partial(pseudo_huber, c=row["c"])
    loss, norm = loss_and_norm(f, pair, n.get(f"{given}.labels"), distance, weight)
    expected = torch.tensor(verified["loss_f64"], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert norm == pytest.approx(verified["grad_norm_f64"], rel=1e-6)
    networks[which].load_state_dict(stored)
