import pytest
import torch
from torch import nn

from cmtool.core.precond import (
    SCALINGS,
    Preconditioned,
    consistency_scalings,
    edm_scalings,
    log_label,
    log_label_1000,
)

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
