"""Zero-shot edits (Song et al. 2023, App. D): where sampling starts, and what each x0 must keep.

An edit is sampling with `init = edit.init` and `project = edit.project`; see samplers.multistep.
The linear maps of the paper, orthogonal matrices that put what is kept into one coordinate, are
written here as what they amount to: put back the mean of a block, or the luma of a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cmtool.core.tensors import clip, doubled, identity
from cmtool.core.types import Projection, RandnLike
from cmtool.errors import InputError, UserError

LUMA = (0.2989, 0.5870, 0.1140)
"""Weights of red, green and blue (ITU-R BT.601), as the paper rounds them."""
LEAST_SHARE = 0.1
"""What a blur must leave of a frequency that is put back: the steps of 8 bits grow tenfold then."""


@dataclass(frozen=True)
class Edit:
    """`init` (B, C, H, W) is noised to start from; `project` puts back what the user gave.

    `project` is an idempotent affine map and does not clamp. `finish` brings the last x0 into
    [-1, 1] and keeps what the user gave there too. `is_noisy` says that `init` holds the noise of
    the first level already. `noise` is the deviation of the noise in what the user gave, which is
    put back at levels above it; below, the model is free.
    """

    init: Tensor
    project: Projection
    finish: Projection = clip
    is_noisy: bool = False
    noise: float = 0.0


def inpaint(reference: Tensor, known: Tensor) -> Edit:
    """Return the edit that keeps the known pixels of `reference` and generates the others.

    reference (B, C, H, W); known (B or 1, 1, H, W) bool, True is kept. Unknown pixels start from
    0 (mid-grey). Raises InputError when the sizes differ.
    """
    if known.shape[-2:] != reference.shape[-2:]:
        (mask_h, mask_w), (h, w) = known.shape[-2:], reference.shape[-2:]
        raise InputError(
            f"mask is {mask_w}x{mask_h} but the image is {w}x{h}", "resize one of them"
        )
    kept = torch.where(known, reference, 0.0)

    def project(x0: Tensor) -> Tensor:
        return torch.where(known, kept, x0)

    return Edit(kept, project)


def superres(low: Tensor, factor: int, noise: float = 0.0) -> Edit:
    """Return the edit that enlarges `low` (B, C, h, w) `factor` times and keeps its block means.

    The answer is (B, C, factor h, factor w). With `noise`, the deviation of white noise in `low`,
    the answer's means are near to it. Raises UserError for a factor below 1.
    """
    if factor < 1:
        raise UserError(f"a factor of {factor}", "give 2 or more")

    def project(x0: Tensor) -> Tensor:
        return x0 + enlarged(low - block_means(x0, factor), factor)

    def finish(x0: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(x0, factor)  # (B, C factor^2, h, w)
        b, _, h, w = blocks.shape
        blocks = blocks.reshape(b, -1, factor**2, h, w)
        kept = within(blocks, blocks.new_ones(factor**2, 1, 1) / factor**2, low, dim=2)
        return F.pixel_shuffle(kept.reshape(b, -1, h, w), factor)

    return Edit(enlarged(low, factor), project, clip if noise else finish, noise=noise)


def colorize(gray: Tensor) -> Edit:
    """Return the edit that colours `gray` (B, 1, H, W) and keeps it as the luma of the answer.

    The answer is (B, 3, H, W), its luma 0.2989 R + 0.5870 G + 0.1140 B. The component along the
    luma's weights is put back; the two that are orthogonal to it are generated.
    """
    weights = luma_weights(gray)
    along = weights / weights.square().sum()

    def project(x0: Tensor) -> Tensor:
        return x0 + along * (gray - luma(x0))

    def finish(x0: Tensor) -> Tensor:
        return within(x0, weights, gray[:, 0], dim=1)

    return Edit(along * gray, project, finish)


def deblur(blurred: Tensor, kernel: Tensor, noise: float = 0.0) -> Edit:
    """Return the edit that sharpens `blurred` (B, C, H, W), a picture blurred by a known kernel.

    kernel (h, w) with odd sides, of sum 1; the picture goes on at its other side. What the blur
    left of a frequency is put back, divided by its share, where that is a tenth or more, and more
    where there is `noise`, which that division multiplies; the other frequencies are generated. So
    this is the pseudo-inverse of the blur (Kawar et al. 2022, DDRM). Raises UserError for a kernel
    that is larger than the picture.
    """
    share = spectrum(kernel, blurred)
    least = min(max(LEAST_SHARE, 1.5 * noise), 0.9)
    known = share.abs() >= least
    there = torch.where(known, torch.fft.rfft2(doubled(blurred)) / torch.where(known, share, 1), 0)

    def back(frequencies: Tensor) -> Tensor:
        return torch.fft.irfft2(frequencies, s=blurred.shape[-2:]).to(blurred.dtype)

    def project(x0: Tensor) -> Tensor:
        return x0 + back(there - known * torch.fft.rfft2(doubled(x0)))

    return Edit(back(there), project, noise=noise)


def spectrum(kernel: Tensor, image: Tensor) -> Tensor:
    """Return what a blur leaves of each frequency of `image` (..., H, W): (H, W // 2 + 1) complex.

    Raises UserError for a kernel that is larger than the picture.
    """
    (h, w), size = kernel.shape, image.shape[-2:]
    if h > size[0] or w > size[1]:
        what = f"a blur of {w}x{h} pixels is larger than the picture of {size[1]}x{size[0]}"
        raise UserError(what, "give a smaller blur")
    padded = F.pad(doubled(kernel.to(image.device)), (0, size[1] - w, 0, size[0] - h))
    return torch.fft.rfft2(padded.roll((-(h // 2), -(w // 2)), (0, 1)))


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Return (B, C, H, W) blurred by a kernel (h, w); the picture goes on at its other side."""
    frequencies = torch.fft.rfft2(doubled(image)) * spectrum(kernel, image)
    return torch.fft.irfft2(frequencies, s=image.shape[-2:]).to(image.dtype)


def gaussian_kernel(sigma: float) -> Tensor:
    """Return the kernel of a Gaussian blur of `sigma` pixels, out to 3 sigma."""
    reach = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return torch.outer(weights, weights) / weights.sum() ** 2


def motion_kernel(length: float, angle: float) -> Tensor:
    """Return the kernel of a straight motion of `length` pixels, `angle` degrees up from the right.

    The way is walked in small steps, each shared by the four pixels around it.
    """
    reach = max(1, math.ceil(length / 2))
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    steps = max(2, math.ceil(16 * length))
    for step in range(steps):
        way = length * ((step + 0.5) / steps - 0.5)
        x = reach + way * math.cos(math.radians(angle))
        y = reach - way * math.sin(math.radians(angle))
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                if share > 0:
                    kernel[row, column] += share
    return kernel / kernel.sum()


def stroke(painting: Tensor) -> Edit:
    """Return the edit that starts from a rough painting (B, C, H, W) and pins nothing.

    The levels decide how much of it stays: they start low (SDEdit, Meng et al. 2022).
    """
    return Edit(painting, identity)


def denoise(noisy: Tensor) -> Edit:
    """Return the edit of an image (B, C, H, W) with noise of the first level's sigma in it."""
    return Edit(noisy, identity, is_noisy=True)


def none_at_first(randn_like: RandnLike) -> RandnLike:
    """Return `randn_like` but for its first draw, which is zero, for an image that is noisy."""
    draws = itertools.count()

    def draw(like: Tensor) -> Tensor:
        return torch.zeros_like(like) if next(draws) == 0 else randn_like(like)

    return draw


def while_above(project: Projection, sigmas: Sequence[float], noise: float) -> Projection:
    """Return `project` for the answers at levels above `noise`, and the identity from there on.

    It is called once a level, as samplers.multistep does.
    """
    if noise and noise >= max(sigmas):
        what = f"noise of {noise:g} in what was given, and levels up to {max(sigmas):g}"
        raise UserError(
            what, "nothing of it would be kept: give less noise, or a higher first level"
        )
    levels = iter(sigmas)

    def projected(x0: Tensor) -> Tensor:
        return project(x0) if next(levels) > noise else x0

    return projected


def estimate_sigma(image: Tensor) -> Tensor:
    """Return the noise level of each image (B, C, H, W), (B,): the median of its finest details.

    Donoho & Johnstone (1994): the diagonal Haar coefficients of a clean picture are mostly near
    zero, so the median of their size, over 0.6745, is the deviation of white noise.
    """
    b, _, h, w = image.shape
    even = image[..., : h // 2 * 2, : w // 2 * 2]
    tl, tr = even[..., ::2, ::2], even[..., ::2, 1::2]
    bl, br = even[..., 1::2, ::2], even[..., 1::2, 1::2]
    return ((tl - tr - bl + br) / 2).abs().reshape(b, -1).median(1).values / 0.6745


def interpolate(noise_a: Tensor, noise_b: Tensor, weights: Tensor) -> Tensor:
    """Return the great-circle path from noise_a to noise_b, (n, C, H, W), at `weights` (n,).

    Both are unit noise (1, C, H, W); the angle is that between the flattened tensors (Song et al.
    2023, App. D). Nearly parallel ones are mixed along the straight line.
    """
    cosine = F.cosine_similarity(doubled(noise_a.flatten()), doubled(noise_b.flatten()), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = doubled(weights.to(noise_a.device)).reshape(-1, 1, 1, 1)
    a, b = 1 - w, w
    if math.sin(angle) > 1e-6:
        a, b = torch.sin(a * angle) / torch.sin(angle), torch.sin(b * angle) / torch.sin(angle)
    return a.to(noise_a) * noise_a + b.to(noise_a) * noise_b


def luma(image: Tensor) -> Tensor:
    """Return 0.2989 R + 0.5870 G + 0.1140 B of (B, 3, H, W) as (B, 1, H, W)."""
    return (image * luma_weights(image)).sum(1, keepdim=True)


def luma_weights(image: Tensor) -> Tensor:
    """Return LUMA as (3, 1, 1) beside an image, made on its device: nothing is sent there."""
    return torch.stack([image.new_full((1, 1), weight) for weight in LUMA])


def block_means(image: Tensor, factor: int) -> Tensor:
    """Return the means of the factor x factor blocks of (B, C, H, W). Raises UserError.

    The factor must divide both sides.
    """
    h, w = image.shape[-2:]
    if h % factor or w % factor:
        good = [str(f) for f in range(2, math.gcd(h, w) + 1) if math.gcd(h, w) % f == 0]
        raise UserError(
            f"a factor of {factor} does not divide the size {w}x{h}",
            f"use one of {', '.join(good)}" if good else "crop the picture",
        )
    return F.avg_pool2d(image, factor)


def enlarged(image: Tensor, factor: int) -> Tensor:
    """Return (B, C, H, W) with every pixel repeated factor x factor times."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def within(x: Tensor, weights: Tensor, total: Tensor, dim: int) -> Tensor:
    """Return the point of [-1, 1]^n nearest to x whose weighted sum along `dim` is `total`.

    `weights` are positive, sum to about 1 and broadcast against x; `total` in [-1, 1] lacks
    `dim`. The nearest point is clip(x + lambda weights); lambda is found by bisection, since the
    sum rises with it.
    """
    x, goal = doubled(x), doubled(total).unsqueeze(dim)
    w = doubled(weights)
    reach = (1 + x.abs().amax(dim, keepdim=True)) / w.min()
    low, high = -reach, reach
    for _ in range(60):
        middle = (low + high) / 2
        below = ((x + middle * w).clamp(-1, 1) * w).sum(dim, keepdim=True) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (x + (low + high) / 2 * w).clamp(-1, 1).to(total.dtype)
