import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from cmtool.core.precond import (
    NOISE_LABELS,
    SCALINGS,
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    iddpm_label,
    iddpm_sigmas,
    log_label,
    log_label_1000,
    ve_label,
    vp_label,
)
from cmtool.presets.build import build_noise_label
from cmtool.presets.toml import load_preset

CHECKED = [  # sigma, plain (c_skip, c_out), boundary (c_skip, c_out)
    (0.002, (0.999984, 0.00199998), (1.0, 0.0)),
    (0.5, (0.5, 0.353553), (0.502004, 0.352139)),
    (80.0, (3.9061e-5, 0.499990), (3.9063e-5, 0.499978)),
]


@pytest.mark.parametrize(("sigma", "plain", "boundary"), CHECKED)
def test_scalings_are_the_published_values(sigma, plain, boundary):
    s = torch.tensor([sigma], dtype=torch.float64)
    for scalings, expected in [(edm_scalings(s), plain), (consistency_scalings(s), boundary)]:
        assert float(scalings.c_skip) == pytest.approx(expected[0], rel=2e-5)
        assert float(scalings.c_out) == pytest.approx(expected[1], rel=2e-5, abs=1e-12)
        assert float(scalings.c_in) == pytest.approx((sigma**2 + 0.25) ** -0.5)


def test_boundary_condition_holds_for_any_network():
    f = Preconditioned(
        lambda x, label, labels: x * 1e3 + 7,
        consistency_scalings,
        log_label,
        sigma_data=0.5,
        sigma_min=0.3,
    )
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(f(x, torch.full((4,), 0.3)), x)


def test_noise_labels_differ_by_a_thousand():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    torch.testing.assert_close(log_label_1000(sigma), 1000 * log_label(sigma))
    assert float(log_label_1000(sigma)[1]) == pytest.approx(-173.286795, abs=1e-6)
    least = log_label_1000(torch.tensor([0.0]))  # which diffusers asks for, and EDM's never does
    assert float(least) == pytest.approx(250 * math.log(1e-44), rel=1e-3)


def test_vp_label_inverts_the_schedule():
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    sigma = (torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1).sqrt()
    torch.testing.assert_close(vp_label(sigma), 999 * t)
    other = (torch.exp(5.0 * t**2 / 2 + 0.3 * t) - 1).sqrt()
    torch.testing.assert_close(vp_label(other, beta_d=5.0, beta_min=0.3, steps=11), 10 * t)


def test_the_time_of_trigflow_is_an_angle_of_the_data():
    assert NOISE_LABELS["trigflow"](torch.tensor(80.0)) == pytest.approx(1.5645, abs=1e-4)
    model = load_preset(
        "digits-cd", {"model.noise_label": "trigflow", "model.sigma_data": 2.0}
    ).model
    assert build_noise_label(model)(torch.tensor(2.0)) == pytest.approx(math.pi / 4)


def test_ve_label_is_the_logarithm_of_half_sigma():
    sigma = torch.tensor([0.02, 2.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(ve_label(sigma).exp(), sigma / 2)


def test_iddpm_label_counts_from_the_nearest_level():
    levels = iddpm_sigmas()
    assert len(levels) == 1001
    assert levels[1000] == 0
    assert levels[999] == pytest.approx(0.006422337, rel=1e-3)  # EDM's, in float32
    assert levels[0] == pytest.approx(20291.17, rel=1e-3)
    assert all(a > b for a, b in pairwise(levels))
    some = torch.tensor([levels[0], levels[500], levels[998] * 1.0001], dtype=torch.float64)
    assert iddpm_label(some).tolist() == [999, 499, 1]
    between = [levels[501] + share * (levels[500] - levels[501]) for share in (0.49, 0.51)]
    assert iddpm_label(torch.tensor(between, dtype=torch.float64)).tolist() == [498, 499]


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_those_of_table_1(name):
    """Inputs of EDM, VP and iDDPM have unit variance; a perfect network gives x0 exactly.

    A flow's input is the mixture (1 - t) x0 + t noise, and it predicts the velocity noise - x0.
    """
    sigma = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    c_skip, c_out, c_in = SCALINGS[name](sigma, 0.5, 0.0)
    variance = {"edm": 0.25, "consistency": 0.25, "vp": 1.0, "iddpm": 1.0}
    if name in variance:
        torch.testing.assert_close(c_in**2 * (sigma**2 + variance[name]), torch.ones_like(sigma))
    elif name == "flow":
        torch.testing.assert_close(c_in, 1 - sigma / (1 + sigma))
    else:  # VE's network scales its input itself
        assert torch.equal(c_in, torch.ones_like(sigma))
    x0, noise = 0.7, 1.3
    x = x0 + sigma * noise
    # what each family's network predicts: the noise, or minus it, or EDM's mixture (its eq. 8)
    raw = {"vp": noise, "iddpm": noise, "ve": -noise, "flow": noise - x0}.get(name)
    if raw is None:
        raw = (0.25 * -noise + sigma * x0) / (0.5 * (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_skip * x + c_out * raw, torch.full_like(sigma, x0))


def test_a_network_of_two_levels_hears_both_and_the_end_is_sigma_min():
    heard = []

    class TwoTime(nn.Module):
        two_time = True

        def forward(self, x, label, labels, *, label_to):
            heard.append((label.tolist(), labels, label_to.tolist()))
            return x

    f = Preconditioned(TwoTime(), edm_scalings, log_label, sigma_data=0.5, sigma_min=0.3)
    x, sigma, labels = torch.ones(3, 1, 1, 1), torch.tensor([5.0, 2.0, 4.0]), torch.arange(3)
    f(x, sigma, labels, torch.tensor([0.0, 1.5, 0.1]))
    f(x, sigma, labels)
    at = pytest.approx([math.log(s) / 4 for s in (5, 2, 4)])
    ends = [[math.log(s) / 4 for s in to] for to in ((0.3, 1.5, 0.3), (0.3, 0.3, 0.3))]
    assert [each[0] for each in heard] == [at, at]
    assert all(each[1] is labels for each in heard)
    assert [each[2] for each in heard] == [pytest.approx(to) for to in ends]


@pytest.mark.parametrize("name", NOISE_LABELS)
def test_labels_grow_with_sigma_and_keep_its_dtype(name):
    sigma = torch.logspace(-2, 1.8, 20)
    label = NOISE_LABELS[name](sigma)
    assert label.dtype == sigma.dtype
    assert (label.diff() > 0).all()


@pytest.mark.parametrize("name", SCALINGS)
def test_the_answer_keeps_the_dtype_of_x_under_autocast(name):
    f = Preconditioned(_Conv(), SCALINGS[name], log_label, sigma_data=0.5, sigma_min=0.002)
    x = torch.zeros(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x, torch.tensor([1.0, 2.0], dtype=torch.float64)).dtype == torch.float32


class _Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, noise_label, labels):
        return self.conv(x)
