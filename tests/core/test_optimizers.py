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


def radam(parameters, **options):
    return OPTIMIZERS["radam"](parameters, lr=0.01, **options)


def one_step(optimizer, parameters, draw):
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draw)
    optimizer.step()


def test_fifty_steps_of_radam_are_pytorchs():
    ours, _ = walk(OPTIMIZERS["radam"], 50)
    theirs, _ = walk(torch.optim.RAdam, 50)
    assert float(((ours - theirs).abs() / theirs.abs().clamp_min(0.01)).max()) < 1e-6


def test_radam_reads_its_count_once_and_after_somebody_has_written_it(monkeypatch):
    """On a GPU each reading is a wait."""
    p, draw, reads = nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(0), []
    optimizer = radam([p])
    convert = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: reads.append(0) or convert(t))
    for _ in range(7):
        one_step(optimizer, [p], draw)
    assert (optimizer.count(0), len(reads)) == (7, 0)
    with torch.no_grad():
        optimizer.state[p]["step"].copy_(torch.tensor(40.0))  # as a checkpoint is loaded
    assert (optimizer.count(0), len(reads)) == (40, 1)
    one_step(optimizer, [p], draw)
    assert optimizer.count(0) == int(optimizer.state[p]["step"]) == 41
    optimizer.state.clear()  # as at a stage's start
    assert optimizer.count(0) == 0
    one_step(optimizer, [p], draw)
    assert optimizer.count(0) == int(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize("back", [False, True])
def test_the_state_of_radam_goes_on_in_pytorchs_and_back(back):
    makers = [radam, lambda ps: torch.optim.RAdam(ps, lr=0.01)]
    first, second = reversed(makers) if back else makers
    places = []
    for then in (first, second):  # six steps by one, six more by itself or the other
        draw, p = torch.Generator().manual_seed(0), nn.Parameter(torch.ones(3))
        optimizer = first([p])
        for _ in range(6):
            one_step(optimizer, [p], draw)
        state = {"state": optimizer.state_dict()["state"]}
        optimizer = then([p])
        optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
        for _ in range(6):
            one_step(optimizer, [p], draw)
        places.append(p.detach())
    torch.testing.assert_close(places[0], places[1], rtol=1e-6, atol=1e-6)


def test_a_scaler_of_gradients_skips_a_step_of_radam_and_unscales_the_others():
    found = []
    for scale in (1.0, 1024.0):
        draw, p = torch.Generator().manual_seed(0), nn.Parameter(torch.ones(3))
        optimizer = radam([p])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for step in range(12):
            slope = torch.randn(3, generator=draw)
            optimizer.zero_grad()
            scaler.scale((p * (torch.inf if step == 3 and scale > 1 else slope)).sum()).backward()
            if step != 3 or scale > 1:
                scaler.step(optimizer)
                scaler.update()
        assert optimizer.count(0) == 11
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1])
