import copy
import itertools
import json
import math
import time
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from cmtool.core.distances import l2
from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.losses import (
    karras,
    uniform_weight,
)
from cmtool.core.methods import METHODS
from cmtool.core.networks.edm2 import MPConv
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import NoiseRange, Stage, consistency_training, karras_sigmas, uniform
from cmtool.core.objective import LossBatch, make_objective
from cmtool.core.optimizers import OPTIMIZERS
from cmtool.core.precond import Preconditioned, consistency_scalings, edm_scalings, log_label
from cmtool.core.rng import step_generator
from cmtool.errors import DivergedError
from cmtool.training.fit import Diverged, Walked, fit, learning_rate
from cmtool.training.state import FitSettings, TrainState, counters, set_counters
from tests.objectives import objective_of

BATCH = 8


def model():
    torch.manual_seed(0)
    network = Mlp(MlpOptions(width=16, depth=2), channels=2)
    return Preconditioned(network, consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002)


def data(step, shard, size=BATCH):
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 2, 1, 1, generator=g)[shard * size : (shard + 1) * size], None


def objective(weight=uniform_weight):
    return objective_of("consistency_training", weight=weight)


def train_state(student, lr=1e-2):
    return TrainState(
        student,
        frozen_copy(student),
        {"ema": Ema(student, rate=0.9)},
        torch.optim.RAdam(student.parameters(), lr=lr),
    )


def settings(**changes):
    return FitSettings(**{"steps": 20, "batch": BATCH, "seed": 7, "lr": 1e-2, **changes})


def test_twenty_steps_equal_algorithm_3_written_out():
    def curriculum(k, total):
        return consistency_training(k, total, s0=2, s1=10, mu0=0.9)

    state = train_state(model())
    infos = list(fit(state, objective(), data, curriculum, settings()))

    student = model()
    target, ema = copy.deepcopy(student), copy.deepcopy(student)
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-2)
    losses = []
    for k in range(20):
        intervals = math.ceil(math.sqrt(k / 20 * (11**2 - 2**2) + 2**2) - 1)
        n, mu = intervals + 1, math.exp(2 * math.log(0.9) / (intervals + 1))
        g = step_generator(7, k, 0)
        torch.randint(2**31, (), generator=g)  # the dropout seed
        index = torch.randint(n - 1, (BATCH,), generator=g)
        t = karras_sigmas(n)
        x, z = data(k, 0)[0], torch.randn(BATCH, 2, 1, 1, generator=g)
        hi, lo = t[index + 1], t[index]
        a = student(x + hi.float().reshape(-1, 1, 1, 1) * z, hi)
        with torch.no_grad():
            b = target(x + lo.float().reshape(-1, 1, 1, 1) * z, lo)
        loss = ((a - b) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average, decay in ((target, mu), (ema, 0.9)):
            for p, q in zip(average.parameters(), student.parameters(), strict=True):
                p.data = decay * p.data + (1 - decay) * q.data
        losses.append(loss.item())

    assert_same_run(state, infos, student, target, ema, losses)


def test_twenty_steps_equal_algorithm_2_written_out():
    """With Heun's solver, an EMA target, and RAdam (Liu et al. 2019, Alg. 2) written out too."""
    torch.manual_seed(1)
    teacher = Preconditioned(
        Mlp(MlpOptions(width=16, depth=2), channels=2), edm_scalings, log_label,
        sigma_data=0.5, sigma_min=0.002,
    )  # fmt: skip
    state = train_state(model())
    state.optimizer = OPTIMIZERS["radam"](state.student.parameters(), 1e-2)
    distilling = objective_of("consistency_distillation", teacher=teacher, weight=karras)
    infos = list(fit(state, distilling, data, lambda k, n: Stage(n=18, mu=0.95), settings()))

    student = model()
    target, ema = copy.deepcopy(student), copy.deepcopy(student)
    weights = list(student.parameters())
    m, v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    losses = []
    for k in range(1, 21):
        g = step_generator(7, k - 1, 0)
        torch.randint(2**31, (), generator=g)  # the dropout seed
        index, t = torch.randint(17, (BATCH,), generator=g), karras_sigmas(18)
        x = data(k - 1, 0)[0]
        hi, lo = (s.float().reshape(-1, 1, 1, 1) for s in (t[index + 1], t[index]))
        x_hi = x + hi * torch.randn(BATCH, 2, 1, 1, generator=g)
        with torch.no_grad():
            d = (x_hi - teacher(x_hi, t[index + 1])) / hi
            y = x_hi + (lo - hi) * d
            x_lo = x_hi + (lo - hi) * (d + (y - teacher(y, t[index])) / lo) / 2
            b = target(x_lo, t[index])
        a = student(x_hi, t[index + 1])
        loss = ((hi**-2 + 0.5**-2) * (a - b) ** 2).mean()
        losses.append(loss.item())
        rho = (rho_inf := 2 / 0.001 - 1) - 2 * k * 0.999**k / (1 - 0.999**k)
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        for i, grad in enumerate(torch.autograd.grad(loss, weights)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad**2
            step = m[i] / (1 - 0.9**k)
            if rho > 5:
                step = step * math.sqrt(r * (1 - 0.999**k)) / (v[i].sqrt() + 1e-8)
            weights[i].data -= 1e-2 * step
        for average, decay in ((target, 0.95), (ema, 0.9)):
            for p, q in zip(average.parameters(), weights, strict=True):
                p.data = decay * p.data + (1 - decay) * q.data

    assert_same_run(state, infos, student, target, ema, losses)


def assert_same_run(state, infos, student, target, ema, losses):
    ours = [float(info.loss.mean()) for info in infos]
    assert ours == pytest.approx(losses, rel=1e-4)
    for mine, theirs in (
        (state.student, student), (state.target, target), (state.emas["ema"].model, ema)
    ):  # fmt: skip
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_each_average_has_a_rate_of_its_own():
    state = train_state(model())
    state.emas["slow"] = Ema(state.student, rate=0.99)
    next(fit(state, objective(), data, lambda k, n: Stage(n=18, mu=0.95), settings(lr=1.0)))
    for average, rate in (
        (state.target, 0.95), (state.emas["ema"].model, 0.9), (state.emas["slow"].model, 0.99)
    ):  # fmt: skip
        triples = (average.parameters(), model().parameters(), state.student.parameters())
        for p, before, after in zip(*triples, strict=True):
            torch.testing.assert_close(p, rate * before + (1 - rate) * after)


def test_two_rounds_see_the_whole_batch():
    two = train_state(model())
    seen = []

    def halves(step, shard):
        seen.append((step, shard))
        return data(step, shard, BATCH // 2)

    list(
        fit(two, objective(), halves, lambda k, n: Stage(n=5, mu=0.9), settings(steps=1, rounds=2))
    )
    assert seen == [(0, 0), (0, 1)]


def test_the_gradient_is_that_of_the_mean_over_rounds():
    def run(rounds):
        state = train_state(model())
        loud = partial(METHODS["consistency_training"].loss, distance=l2, weight=uniform_weight)
        quiet = make_objective(  # one level, no noise: nothing depends on the split
            lambda models, given: loud(models, given._replace(noise=given.noise * 0)),
            lambda b, stage, r, g: uniform(b, stage._replace(n=2), r, g),
            NoiseRange(),
        )
        state.target = frozen_copy(model())
        batches = lambda step, shard: data(step, shard, BATCH // rounds)  # noqa: E731
        list(
            fit(
                state,
                quiet,
                batches,
                lambda k, n: Stage(n=2, mu=0.9),
                settings(steps=3, rounds=rounds),
            )
        )
        return torch.nn.utils.parameters_to_vector(state.student.parameters())

    torch.testing.assert_close(run(1), run(4))


def test_gradients_are_gone_when_the_next_step_begins():
    state, alive = train_state(model()), []

    def watched(step, shard):  # the first thing a step asks for
        alive.append([gradient() is not None for gradient in seen])
        return data(step, shard)

    seen = []
    for _ in fit(state, objective(), watched, lambda k, n: Stage(n=5, mu=0.9), settings(steps=3)):
        seen = [weakref.ref(p.grad) for p in state.student.parameters()]
    assert all(seen)
    assert not any(itertools.chain(*alive))


def test_a_run_stopped_and_gone_on_is_the_same_run():
    straight = train_state(model())
    list(fit(straight, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings()))
    state = train_state(model())
    steps = fit(state, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings())
    for _ in range(7):
        next(steps)
    list(fit(state, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings()))
    for p, q in zip(straight.student.parameters(), state.student.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_not_finite_changes_nothing():
    state = train_state(model())
    before = copy.deepcopy(state.student.state_dict())

    def broken(step, shard):
        x, labels = data(step, shard)
        return x * float("nan"), labels

    with pytest.raises(DivergedError, match="3 steps in a row, to step 3"):
        list(
            fit(
                state,
                objective(),
                broken,
                lambda k, n: Stage(n=5, mu=0.9),
                settings(max_bad_steps=3),
            )
        )
    for name, tensor in state.student.state_dict().items():
        assert torch.equal(tensor, before[name])
    for ema in [state.target, state.emas["ema"].model]:
        assert all(torch.isfinite(p).all() for p in ema.parameters())


def everything(state):
    """Every tensor that a step may change."""
    modules = [state.student, state.target, *(ema.model for ema in state.emas.values())]
    moments = [t for buffers in state.optimizer.state.values() for t in buffers.values()]
    return [t.clone() for m in modules for t in m.state_dict().values()] + moments


def broken_at(*steps):
    def broken(step, shard):
        x, labels = data(step, shard)
        if step in steps:
            x[5] = torch.nan
        return x, labels

    return broken


def fixed(k, total):
    return Stage(n=5, mu=0.9)


def test_a_skipped_step_leaves_every_bit():
    state = train_state(model())
    steps = fit(state, objective(), broken_at(4), fixed, settings())
    for _ in range(4):
        assert not next(steps).skipped
    before = copy.deepcopy(everything(state))
    assert next(steps).skipped
    for mine, theirs in zip(everything(state), before, strict=True):
        assert torch.equal(mine, theirs)
    assert not next(steps).skipped
    assert state.bad_steps == 0


def test_a_fault_names_step_image_and_level():
    state = train_state(model())
    infos = list(fit(state, objective(), broken_at(4), fixed, settings(steps=5)))
    sigma = float(infos[4].sigma[5])
    assert infos[4].fault == f"the loss of image 5 of shard 0 at sigma {sigma:.6g} is nan"
    assert [info.fault for info in infos[:4]] == [""] * 4


def test_a_fault_names_the_first_parameter_whose_gradient_is_not_finite():
    def steep(models, x0, labels, stage, generator):
        """A finite loss whose slope is infinite, as that of a root at 0."""
        student = models.student
        weight = student.network.layers[2].weight
        loss = (weight - weight.detach()).square().sum().sqrt() + student(x0, torch.ones(BATCH))
        return LossBatch(loss.square().flatten(1).mean(1), torch.arange(BATCH) + 1.0)

    state = train_state(model())
    info = next(fit(state, steep, data, fixed, settings()))
    assert info.skipped
    assert torch.isfinite(info.loss).all()
    worst = int(info.loss.argmax())
    assert info.fault.startswith("the gradient of layers.2.weight is not finite;")
    assert f"has image {worst} of shard 0 at sigma {worst + 1}" in info.fault


def test_a_loss_that_is_not_finite_is_never_passed_by():
    """The slope of |x - y| at infinity is 1: the gradient alone would not tell."""

    def far(models, x0, labels, stage, generator):
        student = models.student
        out = student(x0, torch.ones(BATCH)).flatten(1).sum(1)
        return LossBatch((out + torch.inf).abs(), torch.ones(BATCH))

    state = train_state(model())
    before = everything(state)
    assert next(fit(state, far, data, fixed, settings())).skipped
    assert all(torch.equal(a, b) for a, b in zip(everything(state), before, strict=True))


def test_a_run_that_diverges_hands_over_what_its_last_step_saw():
    state = train_state(model())
    blind = objective()

    def halves(step, shard):
        x, _ = data(step, shard, BATCH // 2)
        x[2] *= torch.nan if step > 2 and shard else 1
        return x, torch.arange(4)

    def unlabelled(models, x0, labels, stage, generator):
        return blind(models, x0, None, stage, generator)

    with pytest.raises(Diverged) as raised:
        list(fit(state, unlabelled, halves, fixed, settings(max_bad_steps=2, rounds=2)))
    batch, info = raised.value.batch, raised.value.info
    assert (info.step, batch.shards, batch.x0.shape) == (5, (0, 1), (BATCH, 2, 1, 1))
    assert torch.isnan(batch.x0).flatten(1).all(1).nonzero().tolist() == [[6]]
    assert torch.isnan(batch.loss).nonzero().tolist() == [[6]]
    assert torch.equal(batch.labels, torch.arange(4).repeat(2))
    assert torch.isfinite(batch.sigma).all()
    assert "to step 5: the loss of image 2 of shard 1" in raised.value.what
    assert state.step == 4


def test_a_skipped_last_step_of_a_stage_hands_its_student_on():
    state = train_state(model())
    stages = lambda k, total: Stage(n=5, mu=0.0 if k == 2 else 1.0)  # noqa: E731
    steps = fit(state, objective(), broken_at(2), stages, settings())
    for _ in range(3):
        next(steps)
    for p, q in zip(state.target.parameters(), state.student.parameters(), strict=True):
        assert torch.equal(p, q)


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from tensors, but for whole numbers: random seeds."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].dtype != torch.int64
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_reads_one_value_a_step(scaled):
    state = train_state(model())
    state.optimizer = torch.optim.SGD(state.student.parameters(), lr=1e-2)  # it counts no steps
    state.scaler = GradScaler("cpu") if scaled else None
    with Reads() as reads:
        list(fit(state, objective(), data, fixed, settings(steps=5, max_grad_norm=1.0)))
    assert reads.count == 5


def test_an_overflow_lowers_the_scale_and_is_no_bad_step():
    state = train_state(model())
    state.scaler = GradScaler("cpu", init_scale=2.0**127)
    heavy = objective(lambda hi, lo: torch.full_like(hi, 1e6))
    infos = list(fit(state, heavy, data, fixed, settings(max_bad_steps=1)))
    count = sum(info.skipped for info in infos)
    assert infos[0].skipped
    assert 1 < count < 20
    assert state.scaler.get_scale() == 2.0 ** (127 - count)
    assert f"the loss is scaled by {2.0**126:g} now" in infos[0].fault


def test_the_scale_drops_out_of_the_step():
    plain, scaled = train_state(model()), train_state(model())
    scaled.scaler = GradScaler("cpu", init_scale=2.0**20)
    for state in (plain, scaled):
        list(fit(state, objective(), data, fixed, settings(max_grad_norm=0.1)))
    for p, q in zip(plain.student.parameters(), scaled.student.parameters(), strict=True):
        assert torch.equal(p, q)  # a power of two costs no bit


def test_a_loss_that_is_not_finite_is_a_bad_step_at_any_scale():
    state = train_state(model())
    state.scaler = GradScaler("cpu")
    with pytest.raises(Diverged, match="2 steps in a row, to step 6"):
        list(fit(state, objective(), broken_at(4, 5), fixed, settings(max_bad_steps=2)))


def test_an_overflow_counts_when_the_scale_has_collapsed():
    def steep(models, x0, labels, stage, generator):
        student = models.student
        weight = student.network.layers[0].weight
        loss = (weight - weight.detach()).square().sum().sqrt() + torch.ones(BATCH)
        return LossBatch(loss, torch.ones(BATCH))

    state = train_state(model())
    state.scaler = GradScaler("cpu", init_scale=8.0)
    with pytest.raises(Diverged, match="3 steps in a row, to step 6"):  # 4, 2, 1; then 0.5, ...
        list(fit(state, steep, data, fixed, settings(max_bad_steps=3)))


def test_counters_come_back():
    state, other = train_state(model()), train_state(model())
    state.scaler, other.scaler = GradScaler("cpu", growth_interval=3), GradScaler("cpu")
    list(fit(state, objective(), broken_at(6, 7), fixed, settings(steps=8)))
    set_counters(other, json.loads(json.dumps(counters(state))))
    assert counters(other) == counters(state)
    assert (other.step, other.bad_steps, other.scaler.get_scale()) == (8, 2, 2.0**16)
    set_counters(other, {"step": 3})  # as version 0.1 wrote it
    assert other.step == 3


def test_the_first_update_of_a_ramp_copies():
    state = train_state(model())
    state.emas = {"ema": Ema(state.student, halflife_images=1e6, rampup=1.0)}
    next(fit(state, objective(), data, fixed, settings()))
    average = state.emas["ema"].model.parameters()
    for p, q in zip(average, state.student.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_bad_step_is_skipped_and_forgiven():
    state = train_state(model())

    def broken_once(step, shard):
        x, labels = data(step, shard)
        return (x * float("nan") if step in (3, 9) else x), labels

    infos = list(
        fit(
            state,
            objective(),
            broken_once,
            lambda k, n: Stage(n=5, mu=0.9),
            settings(max_bad_steps=2),
        )
    )
    assert [info.step - 1 for info in infos if info.skipped] == [3, 9]
    assert all(torch.isfinite(info.grad_norm) != info.skipped for info in infos)
    assert all(torch.isfinite(p).all() for p in state.student.parameters())


def test_learning_rate_warms_up_and_decays():
    s = settings(steps=100, lr=1.0, warmup_steps=10, decay_to=0.1)
    assert learning_rate(s, 0, 0.0) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(s, 100, 1.0) == pytest.approx(0.1)
    assert learning_rate(s, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(settings(), 13, 0.5) == 1e-2


def test_learning_rate_falls_with_the_root_of_the_step_as_edm2s():
    s = settings(steps=100, lr=1.0, steady_steps=9)
    assert [learning_rate(s, step, 0.5) for step in (0, 8, 35)] == [1.0, 1.0, 0.5]


def test_dropout_is_keyed_by_the_step_and_leaves_the_global_state():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = Mlp(MlpOptions(width=8, depth=1), channels=2), nn.Dropout(0.5)

        def forward(self, x, label, labels):
            return self.drop(self.inner(x, label, labels))

    def run():
        torch.manual_seed(0)
        f = Preconditioned(
            Dropping(), consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002
        )
        state = train_state(f)
        torch.manual_seed(int(torch.randint(1000, ())))
        infos = list(
            fit(state, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings(steps=3))
        )
        return [float(i.loss.mean()) for i in infos]

    assert run() == run()


def test_a_step_says_how_long_it_waited_for_images():
    def slow(step, shard):
        time.sleep(0.05 if step == 1 else 0)
        return data(step, shard)

    infos = list(
        fit(
            train_state(model()),
            objective(),
            slow,
            lambda *_: Stage(n=4, mu=0.9),
            settings(steps=3),
        )
    )
    assert infos[1].waited >= 0.05
    assert max(infos[0].waited, infos[2].waited) < 0.05


class Forced(nn.Module):
    """A network with one of EDM2's layers, whose weight is normalised in training."""

    def __init__(self):
        super().__init__()
        self.layer = MPConv(2, 2, 1)

    def forward(self, x, noise_label, labels=None):
        return self.layer(x)


def forced():
    torch.manual_seed(0)
    return Preconditioned(
        Forced(), consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002
    )


def test_a_run_stopped_while_it_waits_for_images_goes_on_bit_equal_with_layers_of_edm2():
    """Normalised weights that are normalised again are others in the last bits."""
    where = (lambda k, n: Stage(n=5, mu=0.9), settings(steps=6, lr=3.0))  # it moves them far
    straight = train_state(forced())
    list(fit(straight, objective(), data, *where))
    size = straight.student.network.layer.weight.flatten(1).square().mean(1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=0)

    def late(step, shard):
        if step == 3:
            raise KeyboardInterrupt
        return data(step, shard)

    state = train_state(forced())
    with pytest.raises(KeyboardInterrupt):
        list(fit(state, objective(), late, *where))
    assert state.step == 3
    list(fit(state, objective(), data, *where))
    for one, other in zip(everything(straight), everything(state), strict=True):
        assert torch.equal(one, other)


def test_a_layer_of_edm2_that_does_not_learn_stays_as_it_is():
    state = train_state(forced())
    state.student.requires_grad_(False)
    assert not Walked(state).forced
