"""Noise levels: the Karras grid, how training picks levels from it, and how the grid grows.

A level picker returns the two levels of a training pair, sigma_lo < sigma_hi; where a loss needs
one level only (a teacher's denoising loss, continuous time), sigma_lo is 0, the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from cmtool.errors import UserError

MAX_POINTS = 1_000_000


class NoiseRange(NamedTuple):
    """The levels a model knows: sigma_min (epsilon), sigma_max (T), and the grid's rho."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


class Levels(NamedTuple):
    """The noise levels of a batch of pairs, each (B,) float64: sigma_lo < sigma_hi, or equal."""

    sigma_hi: Tensor
    sigma_lo: Tensor


class Stage(NamedTuple):
    """Where a run stands, as its curriculum and level picker see it.

    `images` were seen before this step (training fills them in), `progress` in [0, 1] is what the
    learning rate follows, `n` are the points of the grid (0 without one), `mu` is the decay of the
    target network, `stage` counts the stages of a curriculum that has some. At a `fresh` step the
    optimizer and the weights EMAs start anew. `grid` (n,) are the levels, ascending, of a method
    that makes its own.
    """

    images: int = 0
    progress: float = 0.0
    n: int = 0
    mu: float = 0.0
    stage: int = 0
    fresh: bool = False
    grid: Tensor | None = None


LevelPicker = Callable[[int, Stage, NoiseRange, Generator], Levels]
"""`(batch, stage, noise_range, generator) -> Levels`."""

Curriculum = Callable[[int, int], Stage]
"""`(step, total_steps) -> Stage`."""


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return the n-point grid of Karras et al. (2022), eq. 5: (n,) float64, ascending.

    Both ends are exact, so that sqrt(sigma^2 - sigma_min^2) is never the root of a negative.
    Raises UserError for n < 2, an absurd n, or an empty range.
    """
    if n < 2:
        raise UserError(f"a noise grid of {n} points", "it needs 2 or more: both ends")
    if n > MAX_POINTS:
        raise UserError(f"a noise grid of {n:,} points", f"it may have {MAX_POINTS:,}")
    if not 0 < sigma_min < sigma_max:
        what = f"noise levels from {sigma_min} to {sigma_max} do not ascend from above 0"
        raise UserError(what, "give a smaller and a larger one, for example 0.002 and 80")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (low + ramp * (high - low)) ** rho
    sigmas[0], sigmas[-1] = sigma_min, sigma_max
    return sigmas


def lognormal(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    mean: float = -1.2,
    std: float = 1.2,
) -> Levels:
    """Return ln sigma ~ N(mean, std^2), paired with the clean image (EDM, Table 1)."""
    z = torch.randn(batch, dtype=torch.float64, generator=generator)
    sigma = torch.exp(mean + std * z)
    return Levels(sigma, torch.zeros_like(sigma))


def uniform(batch: int, stage: Stage, noise_range: NoiseRange, generator: Generator) -> Levels:
    """Return neighbours on the n-point Karras grid, index uniform (Song et al. 2023, Alg. 2, 3)."""
    sigmas = karras_sigmas(stage.n, *noise_range)
    index = torch.randint(stage.n - 1, (batch,), generator=generator)
    return Levels(sigmas[index + 1], sigmas[index])


def lognormal_mass(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    mean: float = -1.1,
    std: float = 2.0,
) -> Levels:
    """Return neighbours on the n-point Karras grid, by the log-normal mass between the two.

    Song & Dhariwal (2023), sec. 3.5: low levels are picked more often than by `uniform`.
    """
    sigmas = karras_sigmas(stage.n, *noise_range)
    law = mass_between(sigmas, mean, std)
    index = torch.multinomial(law, batch, replacement=True, generator=generator)
    return Levels(sigmas[index + 1], sigmas[index])


def mass_between(sigmas: Tensor, mean: float, std: float) -> Tensor:
    """Return the share of ln sigma ~ N(mean, std^2) between neighbours of a grid (n,), (n - 1,)."""
    mass = torch.erf((sigmas.log() - mean) / (math.sqrt(2) * std)).diff()
    return mass / mass.sum()


def tightening(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    mean: float = -1.1,
    std: float = 2.0,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    stage_images: int = 3_200_000,
    truncated: bool = False,
    closest: float = 0.0,
) -> Levels:
    """Return ln sigma ~ N(mean, std^2) with a level below that nears it stage by stage.

    Easy consistency tuning (Geng et al. 2024): a stage begins every `stage_images` images. With
    `truncated` the law is cut at sigma_min and sigma_max, and with `closest` the gap never falls
    below that share of it (both in the first stage of TCM, Lee et al. 2025).
    """
    if truncated:
        law = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), std)
        ends = law.cdf(torch.tensor(noise_range[:2], dtype=torch.float64).log())
        u = torch.rand(batch, dtype=torch.float64, generator=generator)
        hi = law.icdf(ends[0] + (ends[1] - ends[0]) * u).exp().clamp(*noise_range[:2])
    else:
        hi, _ = lognormal(batch, stage, noise_range, generator, mean=mean, std=std)
    number = stage_number(stage.images, stage_images)
    return Levels(hi, tightened(hi, number, q=q, k=k, b=b, closest=closest))


def stage_number(images: int, each: int) -> int:
    """Return how many stages of so many images are over. Raises UserError for stages of none."""
    if each < 1:
        raise UserError(f"stages of {each} images", "a stage has 1 image or more")
    return images // each


def tightened(
    sigma: Tensor, stage: int, *, q: float, k: float, b: float, closest: float = 0.0
) -> Tensor:
    """Return sigma max(0, 1 - n(sigma) / q^(stage + 1)), n(sigma) = 1 + k sigmoid(-b sigma), (B,).

    With k = 0 the ratio is the same at all levels (ECT's mapping `const`). 1 / q^(stage + 1) is
    `closest` at least.
    """
    n = 1 + k * torch.sigmoid(-b * sigma)
    gap = max(q ** -float(stage + 1), closest)
    return sigma * (1 - n * gap).clamp_min(0)


def above_transition(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    transition: float | None,
    boundary: float = 0.25,
    df: float = 0.01,
    scale: float = 0.2,
    q: float = 2.0,
    closest: float = 0.001,
    stage_images: int = 12_800_000,
) -> Levels:
    """Return levels from the transition up, each with one below that nears it (TCM, stage 2).

    ln sigma follows Student's t with `df` degrees of freedom, cut at the transition and at
    sigma_max (Lee et al. 2025); the first int(batch `boundary`) images lie at the transition. The
    other level is that of `tightening` with k = 8, b = 1, and 1e-6 or more.
    """
    high = noise_range.sigma_max
    if transition is None or not 0 < transition < high:
        what = f"levels above a transition of {transition}, and sigma_max = {high:g}"
        raise UserError(what, "--set model.transition=1.0, with a method of two stages")
    u = torch.rand(batch, dtype=torch.float64, generator=generator)
    hi = student_t_quantile(u, df=df, scale=scale, low=transition, high=high)
    hi[: int(batch * boundary)] = transition
    number = stage_number(stage.images, stage_images)
    lo = tightened(hi, number, q=q, k=8.0, b=1.0, closest=closest)
    return Levels(hi, lo.clamp_min(1e-6))


def student_t_quantile(u: Tensor, *, df: float, scale: float, low: float, high: float) -> Tensor:
    """Return the levels (B,) at which ln sigma / scale, Student's t cut to [low, high], reaches u.

    With ln sigma = scale sqrt(df) sinh(v) the density in v is cosh(v)^-df, which is nearly flat.
    """
    unit = scale * math.sqrt(df)
    ends = [math.asinh(math.log(sigma) / unit) for sigma in (low, high)]
    v = torch.linspace(ends[0], ends[1], 20_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(v.cosh() ** -df, v)
    below = torch.cat([below.new_zeros(1), below]) / below[-1]
    right = torch.searchsorted(below, u).clamp(1, len(v) - 1)
    share = (u - below[right - 1]) / (below[right] - below[right - 1])
    found = v[right - 1] + share * (v[right] - v[right - 1])
    return (unit * found.sinh()).exp().clamp(low, high)


def two_lognormals(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    mean: float = -0.6,
    std: float = 1.6,
    mean_lo: float = -4.0,
    std_lo: float = 1.6,
    equal: float = 0.25,
) -> Levels:
    """Return two log-normal levels, the lower one cut at the other; some rows have both equal.

    MeanFlow (Geng et al. 2025) draws logit-normal times t = sigma / (1 + sigma): the same. A share
    `equal` of the rows, and all whose second level comes out higher, have sigma_lo = sigma_hi.
    """
    hi, _ = lognormal(batch, stage, noise_range, generator, mean=mean, std=std)
    lo, _ = lognormal(batch, stage, noise_range, generator, mean=mean_lo, std=std_lo)
    is_one = torch.rand(batch, dtype=torch.float64, generator=generator) < equal
    return Levels(hi, torch.where(is_one, hi, torch.minimum(hi, lo)))


def on_grid(
    batch: int,
    stage: Stage,
    noise_range: NoiseRange,
    generator: Generator,
    *,
    mean: float = -1.1,
    std: float = 2.0,
    law: Literal["lognormal", "uniform"] = "lognormal",
) -> Levels:
    """Return neighbours on the grid that the method made (ADCM, Bai et al. 2025).

    Picked by the log-normal mass between the two, or uniformly.
    """
    sigmas = stage.grid
    if sigmas is None:
        what = "loss.levels = on_grid with a method that makes no grid"
        raise UserError(what, "--set loss.levels=lognormal, or loss.method=adaptive_training")
    p = torch.ones(len(sigmas) - 1) if law == "uniform" else mass_between(sigmas, mean, std)
    index = torch.multinomial(p, batch, replacement=True, generator=generator)
    return Levels(sigmas[index + 1], sigmas[index])


def ramp(batch: int, stage: Stage, noise_range: NoiseRange, generator: Generator) -> Levels:
    """Return u^rho, u uniform between the roots of both ends: the grid of n -> infinity points.

    For continuous time (Song et al. 2023, App. B; the released code's law). The other level of a
    pair is infinitely near, and not needed.
    """
    sigma_min, sigma_max, rho = noise_range
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    u = low + (high - low) * torch.rand(batch, dtype=torch.float64, generator=generator)
    return Levels(u**rho, torch.zeros_like(u))


def fixed(step: int, total_steps: int, *, n: int = 18, mu: float = 0.0) -> Stage:
    """Return the same grid and target decay at every step (Song et al. 2023, Table 3, CD)."""
    if n < 2 or not 0 <= mu < 1:
        what = f"a fixed curriculum cannot have n = {n} and mu = {mu}"
        raise UserError(what, "n must be 2 or more, and 0 <= mu < 1")
    return Stage(progress=min(step / total_steps, 1.0), n=n, mu=mu)


def consistency_training(
    step: int,
    total_steps: int,
    *,
    s0: int = 2,
    s1: int = 150,
    mu0: float = 0.9,
    as_released: bool = False,
) -> Stage:
    """Return N(k) and mu(k) of consistency training (Song et al. 2023, App. C).

    N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 grows from s0 to s1 + 1, and
    mu(k) = exp(s0 ln(mu0) / N(k)). The released code divides by N(k) - 1 instead
    (`as_released`), so it starts at mu0^s0 where the paper starts at mu0.
    """
    if not 0 < mu0 < 1 or not 1 < s0 <= s1:
        raise UserError(f"mu0 = {mu0}, s0 = {s0}, s1 = {s1}", "0 < mu0 < 1 and 2 <= s0 <= s1")
    progress = min(step / total_steps, 1.0)
    intervals = math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    n = max(intervals, 1) + 1
    mu = math.exp(s0 * math.log(mu0) / (n - 1 if as_released else n))
    return Stage(progress=progress, n=n, mu=mu)


def doubling(step: int, total_steps: int, *, s0: int = 10, s1: int = 1280) -> Stage:
    """Return N(k) of improved consistency training (Song & Dhariwal 2023, sec. 3.4).

    N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)): stages of
    equal length, from s0 + 1 points to s1 + 1. There is no other target than the student: mu is 0.
    """
    if not 1 <= s0 <= s1:
        raise UserError(f"s0 = {s0}, s1 = {s1}", "1 <= s0 <= s1")
    length = max(int(total_steps / (math.log2(s1 // s0) + 1)), 1)
    stage = step // length
    n = min(s0 * 2 ** min(stage, 64), s1) + 1
    return Stage(progress=min(step / total_steps, 1.0), n=n, stage=stage)


def halving(step: int, total_steps: int, *, start: int = 4096, stage_steps: int = 50_000) -> Stage:
    """Return the stages of progressive distillation (Salimans & Ho 2022, Alg. 2).

    `start` intervals, a power of 2, halve every `stage_steps`; the stages of two and of one
    interval last twice as long. The target is the student as it was when the stage began: mu is 1,
    and 0 at a stage's last step. Optimizer and EMAs start anew with each stage.
    """
    if start < 2 or start & (start - 1) or stage_steps < 1:
        raise UserError(f"start = {start}", "a power of 2, 2 or more, and stage_steps 1 or more")
    long = stage_steps * (start.bit_length() - 2)  # steps before the stage of two intervals
    if step < long:
        stage, into = divmod(step, stage_steps)
        length, intervals = stage_steps, start >> stage
    else:
        later, into = divmod(step - long, 2 * stage_steps)
        stage = long // stage_steps + min(later, 1)
        length, intervals = 2 * stage_steps, 2 >> min(later, 1)
    last = into == length - 1 and intervals > 1
    fresh = into == 0 and step > 0 and (intervals > 1 or step == long + 2 * stage_steps)
    return Stage(0, into / length, intervals + 1, 0.0 if last else 1.0, stage, fresh)


LEVELS: dict[str, Callable[..., Levels]] = {
    "lognormal": lognormal,
    "lognormal_mass": lognormal_mass,
    "on_grid": on_grid,
    "ramp": ramp,
    "tightening": tightening,
    "above_transition": above_transition,
    "two_lognormals": two_lognormals,
    "uniform": uniform,
}

CURRICULA: dict[str, Callable[..., Stage]] = {
    "fixed": fixed,
    "consistency_training": consistency_training,
    "doubling": doubling,
    "halving": halving,
}
