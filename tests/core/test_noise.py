import pytest
import torch

from cmtool.core.noise import (
    CURRICULA,
    LEVELS,
    NoiseRange,
    Stage,
    consistency_training,
    halving,
    karras_sigmas,
)
from cmtool.errors import UserError


def test_grid_of_18_is_the_published_one():
    published = (
        "80 57.586 40.786 28.375 19.352 12.910 8.4009 5.3152 3.2568 1.9233 1.0882 0.58535"
        " 0.29644 0.13952 0.059947 0.022935 0.007528 0.002"
    )
    expected = torch.tensor([float(s) for s in published.split()], dtype=torch.float64).flip(0)
    torch.testing.assert_close(karras_sigmas(18), expected, rtol=5e-5, atol=0)


@pytest.mark.parametrize("n", [2, 3, 18, 40, 201])
def test_grid_ascends_and_its_ends_are_exact(n):
    sigmas = karras_sigmas(n)
    assert sigmas.dtype == torch.float64
    assert sigmas[0] == 0.002
    assert sigmas[-1] == 80.0
    assert (sigmas.diff() > 0).all()


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0, 9.0])
@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.3, 10.0), (0.01, 50.0), (0.05, 79.7)])
def test_ends_are_exact_whatever_they_are_and_between_them_the_roots_are_even(ends, rho):
    sigmas = karras_sigmas(6, *ends, rho)
    assert (float(sigmas[0]), float(sigmas[-1])) == ends
    steps = (sigmas ** (1 / rho)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("index", "n", "sigma"), [(22, 40, 1.382368), (11, 18, 0.585348)])
def test_published_two_step_levels(index, n, sigma):
    assert float(karras_sigmas(n).flip(0)[index]) == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("bad", [(1,), (10**12,), (5, 1.0, 0.5), (5, 0.0, 1.0)])
def test_grid_refuses_nonsense(bad):
    with pytest.raises(UserError):
        karras_sigmas(*bad)


NEEDED = {"above_transition": {"transition": 1.0}}
"""Options without a default: a preset gives them."""


@pytest.mark.parametrize("name", LEVELS)
def test_every_picker_orders_its_levels_and_repeats_itself(name):
    def draw():
        stage, generator = Stage(n=18, grid=karras_sigmas(9)), torch.Generator().manual_seed(3)
        return LEVELS[name](512, stage, NoiseRange(), generator, **NEEDED.get(name, {}))

    hi, lo = draw()
    assert hi.shape == lo.shape == (512,)
    assert hi.dtype == torch.float64
    assert (lo <= hi).all() if name == "two_lognormals" else (lo < hi).all()
    assert torch.equal(hi, draw().sigma_hi)


def test_uniform_gives_neighbours_and_reaches_both_ends():
    grid = karras_sigmas(5)
    hi, lo = LEVELS["uniform"](500, Stage(n=5), NoiseRange(), torch.Generator().manual_seed(0))
    index = torch.searchsorted(grid, lo)
    assert torch.equal(grid[index + 1], hi)
    assert set(index.tolist()) == {0, 1, 2, 3}


def test_lognormal_has_the_asked_moments():
    draw = LEVELS["lognormal"](200_000, Stage(), NoiseRange(), torch.Generator().manual_seed(0))
    logs = draw.sigma_hi.log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.01)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.01)


PICKED = {
    "lognormal": {"mean": -1.2, "std": 1.2},  # EDM, Table 1
    "lognormal_mass": {"mean": -1.1, "std": 2.0},  # iCT, sec. 3.5
    "ramp": {},
    "tightening": {"mean": -1.1, "std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0,
                   "stage_images": 3_200_000},
    "uniform": {},
    "on_grid": {"mean": -1.1, "std": 2.0, "law": "lognormal"},  # ADCM, CIFAR-10
    "above_transition": {"boundary": 0.25, "df": 0.01, "scale": 0.2, "q": 2.0, "closest": 0.001,
                         "stage_images": 12_800_000},  # TCM
    "two_lognormals": {"mean": -0.6, "std": 1.6, "mean_lo": -4.0, "std_lo": 1.6, "equal": 0.25},
}  # fmt: skip
"""What the papers pick levels by."""


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_by_default_those_of_the_papers(name):
    def draw(**options):
        stage = Stage(n=18, images=6_400_000, grid=karras_sigmas(9))
        options |= NEEDED.get(name, {})
        return LEVELS[name](99, stage, NoiseRange(), torch.Generator().manual_seed(3), **options)

    assert all(map(torch.equal, draw(), draw(**PICKED[name])))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_tightening_in_closed_form(stage):
    levels = LEVELS["tightening"](
        20_000, Stage(images=10 * stage + 9), NoiseRange(), torch.Generator().manual_seed(0),
        mean=0.3, std=0.5, q=3.0, k=5.0, b=0.7, stage_images=10,
    )  # fmt: skip
    logs = levels.sigma_hi.log()
    assert float(logs.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.02)
    n = 1 + 5 / (1 + torch.exp(0.7 * levels.sigma_hi))
    wanted = levels.sigma_hi * (1 - n / 3 ** (stage + 1))
    torch.testing.assert_close(levels.sigma_lo, wanted.clamp_min(0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed", {"n": 1}), ("fixed", {"mu": 1.0}), ("fixed", {"mu": -0.1}),
        ("consistency_training", {"s0": 1}), ("consistency_training", {"s0": 9, "s1": 8}),
        ("consistency_training", {"mu0": 1.0}), ("consistency_training", {"mu0": 0.0}),
        ("doubling", {"s0": 0}), ("doubling", {"s0": 9, "s1": 8}),
        ("halving", {"stage_steps": 0}), ("halving", {"start": 6}),
    ],
)  # fmt: skip
def test_a_curriculum_without_sense_is_refused(name, options):
    with pytest.raises(UserError):
        CURRICULA[name](0, 10, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("fixed", {"n": 2}), ("consistency_training", {"s0": 2, "s1": 2}),
     ("doubling", {"s0": 1, "s1": 1}), ("halving", {"start": 2, "stage_steps": 1})],
)  # fmt: skip
def test_the_smallest_curriculum_has_sense(name, options):
    assert CURRICULA[name](0, 10, **options).n >= 2


def test_doubling_counts_its_stages():
    """Eight of them and their rest, s1 / s0 rounded down: 10, 20, ..., 1,280 intervals."""
    stages = [CURRICULA["doubling"](k, 800) for k in range(0, 800, 100)]
    assert [stage.stage for stage in stages] == list(range(8))
    assert [stage.n - 1 for stage in stages] == [10 << k for k in range(8)]
    odd = [CURRICULA["doubling"](k, 400, s0=10, s1=79) for k in (104, 105, 209, 210, 315)]
    assert [stage.n - 1 for stage in odd] == [10, 20, 20, 40, 79]


CT = {
    "cifar10": {"s1": 150, "mu0": 0.9},
    "imagenet64": {"s1": 200, "mu0": 0.95},
    "lsun256": {"s1": 150, "mu0": 0.95},
}
TOTAL = {"cifar10": 800_000, "imagenet64": 800_000, "lsun256": 1_000_000}
# N(k), the released code's mu(k), the paper's (Song et al. 2023, App. C)
TABLE = [
    ("cifar10", 0, 2, 0.810000, 0.900000), ("imagenet64", 0, 2, 0.902500, 0.950000),
    ("cifar10", 1, 3, 0.900000, 0.932170), ("imagenet64", 1, 3, 0.950000, 0.966383),
    ("cifar10", 100, 3, 0.900000, 0.932170), ("imagenet64", 100, 4, 0.966383, 0.974679),
    ("cifar10", 1_000, 6, 0.958732, 0.965489), ("imagenet64", 1_000, 8, 0.985452, 0.987259),
    ("cifar10", 5_000, 13, 0.982593, 0.983921), ("imagenet64", 5_000, 17, 0.993609, 0.993984),
    ("cifar10", 10_000, 17, 0.986916, 0.987681), ("imagenet64", 10_000, 23, 0.995348, 0.995550),
    ("cifar10", 50_000, 38, 0.994321, 0.994470), ("imagenet64", 50_000, 51, 0.997950, 0.997991),
    ("cifar10", 100_000, 54, 0.996032, 0.996105), ("imagenet64", 100_000, 72, 0.998556, 0.998576),
    ("cifar10", 200_000, 76, 0.997194, 0.997231), ("imagenet64", 200_000, 101, 0.998975, 0.998985),
    ("cifar10", 400_000, 107, 0.998014, 0.998033), ("imagenet64", 400_000, 143, 0.999278, 0.999283),
    ("cifar10", 600_000, 131, 0.998380, 0.998393), ("imagenet64", 600_000, 175, 0.999411, 0.999414),
    ("cifar10", 790_000, 151, 0.998596, 0.998605), ("imagenet64", 790_000, 200, 0.999485, 0.999487),
    ("cifar10", 800_000, 151, 0.998596, 0.998605), ("imagenet64", 800_000, 201, 0.999487, 0.999490),
]  # fmt: skip
LSUN = [(0, 2, 0.902500), (100_000, 48, 0.997820), (500_000, 107, None), (1_000_000, 151, 0.999316)]


def ct(data, k, **more):
    return consistency_training(k, TOTAL[data], **CT[data], **more)


@pytest.mark.parametrize(("data", "k", "n", "released", "paper"), TABLE)
def test_consistency_training_schedule(data, k, n, released, paper):
    assert ct(data, k).n == ct(data, k, as_released=True).n == n
    assert ct(data, k).mu == pytest.approx(paper, abs=6e-7)
    assert ct(data, k, as_released=True).mu == pytest.approx(released, abs=6e-7)


@pytest.mark.parametrize(("k", "n", "released"), LSUN)
def test_consistency_training_schedule_of_lsun(k, n, released):
    stage = ct("lsun256", k, as_released=True)
    assert stage.n == ct("lsun256", k).n == n
    assert released is None or stage.mu == pytest.approx(released, abs=6e-7)
    assert ct("lsun256", k).mu == pytest.approx(0.95 ** (2 / n))  # the paper's, of its own N


@pytest.mark.parametrize(
    ("data", "first", "n"),
    [
        ("cifar10", 1, 3), ("cifar10", 176, 4), ("cifar10", 422, 5), ("cifar10", 737, 6),
        ("cifar10", 1_123, 7), ("cifar10", 789_438, 151), ("imagenet64", 100, 4),
        ("imagenet64", 238, 5), ("imagenet64", 416, 6), ("imagenet64", 634, 7),
        ("imagenet64", 792_059, 201), ("lsun256", 220, 4), ("lsun256", 527, 5),
    ],
)  # fmt: skip
def test_schedule_grows_by_one_at_the_published_steps(data, first, n):
    assert [ct(data, k).n for k in (first - 1, first)] == [n - 1, n]


@pytest.mark.parametrize("name", CURRICULA)
def test_every_curriculum_stays_put_past_its_end_and_moves_one_way(name):
    stages = [CURRICULA[name](k, 100) for k in range(0, 300, 7)]
    sizes = [stage.n for stage in stages]
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))
    end, later = (CURRICULA[name](k, 100) for k in (100, 10_000))
    assert (end.n, end.mu) == (later.n, later.mu)
    assert all(0 <= stage.mu <= 1 and 0 <= stage.progress <= 1 for stage in stages)


def test_progressive_stages_halve_and_hand_over_at_their_last_step():
    starts = [*range(0, 550_001, 50_000), 650_000]
    assert [halving(k, 10**6).n - 1 for k in starts] == [4096 >> i for i in range(13)]
    assert [halving(k - 1, 10**6).n - 1 for k in starts[1:]] == [4096 >> i for i in range(12)]
    assert halving(749_999, 10**6).n - 1 == halving(10**6, 10**6).n - 1 == 1
    stages = [halving(k, 10**6) for k in (0, 49_999, 50_000, 549_999, 550_000, 649_999, 650_000)]
    assert [stage.mu for stage in stages] == [1, 0, 1, 0, 1, 0, 1]
    assert [stage.fresh for stage in stages] == [False, False, True, False, True, False, True]
    assert [stages[i].progress for i in (1, 3, 5)] == pytest.approx([1, 1, 1], abs=1e-4)
    assert halving(600_000, 10**6).progress == 0.5
    assert halving(749_999, 750_000).mu == 1  # the last stage has nobody to hand over to
    assert not halving(750_000, 10**6).fresh


@pytest.mark.parametrize("start", [0, 1, 12])
def test_progressive_distillation_starts_from_a_power_of_two(start):
    with pytest.raises(UserError, match=f"start = {start}"):
        halving(0, 10, start=start)


def test_some_pairs_of_two_lognormals_are_one_level():
    """A quarter, and those that are cut: 30 % in all, as in the code of MeanFlow."""
    hi, lo = LEVELS["two_lognormals"](
        100_000, Stage(), NoiseRange(), torch.Generator().manual_seed(0)
    )
    assert float((hi == lo).double().mean()) == pytest.approx(0.30, abs=0.005)
    assert float(hi.log().mean()) == pytest.approx(-0.6, abs=0.02)
    assert float(lo[hi > lo].log().mean()) < -4.0


def test_the_first_images_lie_at_the_transition_and_all_others_above():
    hi, lo = LEVELS["above_transition"](
        22, Stage(images=10**12), NoiseRange(), torch.Generator().manual_seed(0), transition=1.5
    )
    assert hi[:5].tolist() == [1.5] * 5
    assert (hi[5:] > 1.5).all()
    assert (hi <= 80).all()
    n = 1 + 8 / (1 + hi.exp())
    torch.testing.assert_close(lo, hi * (1 - 0.001 * n))  # the cap
    few, _ = LEVELS["above_transition"](
        3, Stage(), NoiseRange(), torch.Generator().manual_seed(0), transition=1.5
    )
    assert (few > 1.5).all()
