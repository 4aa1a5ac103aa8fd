import pytest
import torch
from torch import nn

from cmtool.core.optimizers import OPTIMIZERS

THEIRS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


def walk(make, steps, scale=1.0, **options):
    """Where `make`'s optimizer is after each of some steps with random gradients."""
    start = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=start)), nn.Parameter(torch.ones(2))]
    optimizer = make(parameters, lr=0.01, **options)
    draw = torch.Generator().manual_seed(1)
    places = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        for p in parameters:
            p.grad = scale * torch.randn(p.shape, generator=draw)
        optimizer.step()
        places.append(torch.cat([p.detach().flatten() for p in parameters]))
    return torch.stack(places), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e4])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.99), "eps": 1e-3}, {"weight_decay": 0.3}], ids=str
)
def test_a_step_is_that_of_pytorchs_loop(name, scale, options):
    ours, _ = walk(OPTIMIZERS[name], 40, scale, **options)
    decay = {"weight_decay": 0.0, **options}
    theirs, _ = walk(THEIRS[name], 40, scale, **decay)
    assert not torch.equal(ours[5], ours[-1])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_have_pytorchs_names(name):
    _, ours = walk(OPTIMIZERS[name], 3)
    _, theirs = walk(THEIRS[name], 3)
    mine, other = (next(iter(o.state.values())) for o in (ours, theirs))
    assert mine.keys() == other.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], other[key])
    assert (ours.param_groups[0]["eps"], ours.param_groups[0]["lr"]) == (
        1e-8,
        pytest.approx(0.01 / 3),
    )
