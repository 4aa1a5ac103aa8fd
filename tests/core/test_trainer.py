import copy
import math
import time

import pytest
import torch
from torch import nn

from cmtool.core.distances import l2
from cmtool.core.ema import Ema, frozen_copy
from cmtool.core.losses import consistency_objective, noise_pair, uniform_weight
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import NoiseRange, Stage, consistency_training, karras_sigmas, uniform
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label
from cmtool.core.rng import step_generator
from cmtool.core.trainer import FitSettings, TrainState, fit, learning_rate
from cmtool.errors import DivergedError

BATCH = 8


def model():
    torch.manual_seed(0)
    network = Mlp(MlpOptions(width=16, depth=2), channels=2)
    return Preconditioned(network, consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002)


def data(step, shard, size=BATCH):
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 2, 1, 1, generator=g)[shard * size : (shard + 1) * size], None


def objective():
    return consistency_objective(
        uniform, lambda x, h, lo, z, y: noise_pair(x, h, lo, z), l2, uniform_weight, NoiseRange()
    )


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

    ours = [float(info.loss.mean()) for info in infos]
    assert ours == pytest.approx(losses, rel=1e-4)
    for mine, theirs in (
        (state.student, student), (state.target, target), (state.emas["ema"].model, ema)
    ):  # fmt: skip
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_two_rounds_see_the_whole_batch():
    two = train_state(model())
    seen = []

    def halves(step, shard):
        seen.append((step, shard))
        return data(step, shard, BATCH // 2)

    list(fit(two, objective(), halves, lambda k, n: Stage(5, 0.9), settings(steps=1, rounds=2)))
    assert seen == [(0, 0), (0, 1)]


def test_the_gradient_is_that_of_the_mean_over_rounds():
    def run(rounds):
        state = train_state(model())
        quiet = consistency_objective(  # one level, no noise: nothing depends on the split
            lambda b, n, r, g: uniform(b, 2, r, g),
            lambda x, h, lo, z, y: noise_pair(x, h, lo, z * 0),
            l2, uniform_weight, NoiseRange(),
        )  # fmt: skip
        state.target = frozen_copy(model())
        batches = lambda step, shard: data(step, shard, BATCH // rounds)  # noqa: E731
        list(
            fit(state, quiet, batches, lambda k, n: Stage(2, 0.9), settings(steps=3, rounds=rounds))
        )
        return torch.nn.utils.parameters_to_vector(state.student.parameters())

    torch.testing.assert_close(run(1), run(4))


def test_a_run_stopped_and_gone_on_is_the_same_run():
    straight = train_state(model())
    list(fit(straight, objective(), data, lambda k, n: Stage(5, 0.9), settings()))
    state = train_state(model())
    steps = fit(state, objective(), data, lambda k, n: Stage(5, 0.9), settings())
    for _ in range(7):
        next(steps)
    list(fit(state, objective(), data, lambda k, n: Stage(5, 0.9), settings()))
    for p, q in zip(straight.student.parameters(), state.student.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_not_finite_changes_nothing():
    state = train_state(model())
    before = copy.deepcopy(state.student.state_dict())

    def broken(step, shard):
        x, labels = data(step, shard)
        return x * float("nan"), labels

    with pytest.raises(DivergedError, match="3 steps in a row, to step 2"):
        list(fit(state, objective(), broken, lambda k, n: Stage(5, 0.9), settings(max_bad_steps=3)))
    for name, tensor in state.student.state_dict().items():
        assert torch.equal(tensor, before[name])
    for ema in [state.target, state.emas["ema"].model]:
        assert all(torch.isfinite(p).all() for p in ema.parameters())


def test_one_bad_step_is_skipped_and_forgiven():
    state = train_state(model())

    def broken_once(step, shard):
        x, labels = data(step, shard)
        return (x * float("nan") if step in (3, 9) else x), labels

    infos = list(
        fit(state, objective(), broken_once, lambda k, n: Stage(5, 0.9), settings(max_bad_steps=2))
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
        infos = list(fit(state, objective(), data, lambda k, n: Stage(5, 0.9), settings(steps=3)))
        return [float(i.loss.mean()) for i in infos]

    assert run() == run()


def test_a_step_says_how_long_it_waited_for_images():
    def slow(step, shard):
        time.sleep(0.05 if step == 1 else 0)
        return data(step, shard)

    infos = list(
        fit(train_state(model()), objective(), slow, lambda *_: Stage(4, 0.9), settings(steps=3))
    )
    assert infos[1].waited >= 0.05
    assert max(infos[0].waited, infos[2].waited) < 0.05
