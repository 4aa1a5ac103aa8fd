"""Group normalisation in Triton, of images that lie in memory pixel by pixel.

The one file that imports Triton; `launches.py` calls its kernels.

One program has one image, a few whole groups of channels, and a chunk of the pixels. Its lanes are
the channels: each group has PLACES of them, a power of two, of which `size` are in use. Where an
image has one chunk, a program finds the moments and then uses them, and reads the image a second
time from the cache. Where it has more, a first kernel finds those of each chunk.

Means and variances are float32, by Welford's steps (Chan et al. 1983), not by sums of squares: a
mean that is large beside the spread costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr, tensor


@triton.jit
def lanes(
    size: tensor, groups: tensor, block: tensor,
    GROUPS: constexpr, PLACES: constexpr, FULL: constexpr,
) -> tensor:  # fmt: skip
    """Return the channel of each lane of a block, its group, and whether the lane is in use."""
    lane = tl.arange(0, GROUPS * PLACES)
    group = block * GROUPS + lane // PLACES
    if FULL:  # said so, the compiler knows that neighbours lie beside each other
        return block * (GROUPS * PLACES) + lane, group, group < groups
    place = lane % PLACES
    return group * size + place, group, (place < size) & (group < groups)


@triton.jit
def over_group(value: tensor, GROUPS: constexpr, PLACES: constexpr) -> tensor:
    """Return for each lane the sum of a value over its group's lanes."""
    total = tl.sum(tl.reshape(value, (GROUPS, PLACES)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (GROUPS, PLACES)), (GROUPS * PLACES,))


@triton.jit
def merged(mean: tensor, deviation: tensor, count: tensor) -> tensor:
    """Return mean and sum of squared deviations of all rows, of those of each row's numbers."""
    total = tl.sum(count, 0)
    all_mean = tl.sum(mean * count, 0) / total
    apart = mean - all_mean[None, :]
    return all_mean, tl.sum(deviation + apart * apart * count, 0)


@triton.jit
def addend(
    added: tensor, image: tensor, stride: tensor, channel: tensor, live: tensor,
    ADDED: constexpr,
) -> tensor:  # fmt: skip
    """Return what is added to the pixels of each lane before the norm."""
    if ADDED:
        at = added + image * stride + channel
        return tl.load(at, mask=live, other=0.0).to(tl.float32)
    return tl.zeros(channel.shape, tl.float32)


@triton.jit
def moments(
    x: tensor, first: tensor, last: tensor, channels: tensor, size: tensor, channel: tensor,
    live: tensor, extra: tensor,
    ROWS: constexpr, GROUPS: constexpr, PLACES: constexpr,
) -> tensor:  # fmt: skip
    """Return mean and sum of squared deviations over the group of each lane, and the pixels."""
    row = tl.arange(0, ROWS)
    place = row[:, None] * channels + channel[None, :]
    mean = tl.zeros((ROWS, GROUPS * PLACES), tl.float32)
    deviation = tl.zeros((ROWS, GROUPS * PLACES), tl.float32)
    seen = 0.0
    for start in range(first, last, ROWS):
        here = (start + row < last)[:, None] & live[None, :]
        at = x + tl.cast(start, tl.int64) * channels
        value = tl.load(at + place, mask=here, other=0.0).to(tl.float32) + extra[None, :]
        seen += 1.0
        step = tl.where(here, value - mean, 0.0)
        mean += step / seen
        deviation += step * tl.where(here, value - mean, 0.0)
    count = ((last - first - row + ROWS - 1) // ROWS).to(tl.float32)
    count = tl.maximum(count, 0.0)[:, None]
    of_channel, apart = merged(mean, deviation, count)
    of_group = over_group(tl.where(live, of_channel, 0.0), GROUPS, PLACES) / size
    step = tl.where(live, of_channel - of_group, 0.0)
    apart = tl.where(live, apart, 0.0) + (last - first) * step * step
    return of_group, over_group(apart, GROUPS, PLACES)


@triton.jit
def sums(
    grad: tensor, x: tensor, first: tensor, last: tensor, channels: tensor, channel: tensor,
    live: tensor, mean: tensor, rstd: tensor, gain: tensor, offset: tensor,
    ROWS: constexpr, SILU: constexpr,
) -> tensor:  # fmt: skip
    """Return the sums over the pixels of the gradients of offset and gain, for each lane."""
    row = tl.arange(0, ROWS)
    place = row[:, None] * channels + channel[None, :]
    of_offset = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    of_gain = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    for start in range(first, last, ROWS):
        here = (start + row < last)[:, None] & live[None, :]
        skipped = tl.cast(start, tl.int64) * channels
        z, slope = before_gain(
            grad + skipped, x + skipped, place, here, mean, rstd, gain, offset, SILU
        )
        of_offset += slope
        of_gain += slope * z
    return tl.sum(of_offset, 0), tl.sum(of_gain, 0)


@triton.jit
def over_chunks(
    parts: tensor, image: tensor, channels: tensor, chunks: tensor, channel: tensor, live: tensor,
    CHUNKS: constexpr,
) -> tensor:  # fmt: skip
    """Return the sums over all chunks of an image, of parts (2, B, chunks, channels)."""
    one = tl.arange(0, CHUNKS)
    at = parts + (image * chunks + one[:, None]) * channels + channel[None, :]
    there = (one < chunks)[:, None] & live[None, :]
    of_offset = tl.sum(tl.load(at, mask=there, other=0.0), 0)
    at += tl.num_programs(0).to(tl.int64) * channels
    return of_offset, tl.sum(tl.load(at, mask=there, other=0.0), 0)


@triton.jit
def found(
    stats: tensor, image: tensor, images: tensor, groups: tensor, group: tensor, live: tensor
) -> tensor:
    """Return mean and 1 / std of each lane's group, of stats (2, B, groups)."""
    at = stats + image * groups + group
    mean = tl.load(at, mask=live, other=0.0)
    return mean, tl.load(at + images * groups, mask=live, other=0.0)


@triton.jit
def before_gain(
    grad: tensor, x: tensor, place: tensor, here: tensor, mean: tensor, rstd: tensor, gain: tensor,
    offset: tensor,
    SILU: constexpr,
) -> tensor:  # fmt: skip
    """Return the normalised pixels, and the gradient of these times gain plus offset."""
    z = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    slope = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
    if SILU:
        y = z * gain[None, :] + offset[None, :]
        share = 1 / (1 + tl.exp(-y))
        slope *= share * (1 + y * (1 - share))
    return z, slope


@triton.jit
def affine(
    weight: tensor, bias: tensor, scale: tensor, shift: tensor, image: tensor, scale_stride: tensor,
    shift_stride: tensor, channel: tensor, live: tensor,
    SCALED: constexpr,
) -> tensor:  # fmt: skip
    """Return weight, bias and 1 + scale of each lane, and the gain and offset that they make."""
    w = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    if SCALED:
        at = scale + image * scale_stride + channel
        factor = 1 + tl.load(at, mask=live, other=0.0).to(tl.float32)
        at = shift + image * shift_stride + channel
        added = tl.load(at, mask=live, other=0.0).to(tl.float32)
        return w, b, factor, w * factor, b * factor + added
    return w, b, tl.full(w.shape, 1.0, tl.float32), w, b


@triton.jit
def moments_kernel(
    x: tensor, added: tensor, parts: tensor, pixels: tensor, channels: tensor, size: tensor,
    groups: tensor, chunk: tensor, chunks: tensor, added_stride: tensor,
    ROWS: constexpr, GROUPS: constexpr, PLACES: constexpr, FULL: constexpr, ADDED: constexpr,
) -> None:  # fmt: skip
    """Store mean and sum of squared deviations of each chunk: parts (2, B, chunks, groups)."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks
    channel, group, live = lanes(size, groups, tl.program_id(1), GROUPS, PLACES, FULL)
    first = number * chunk
    last = tl.minimum(first + chunk, pixels)
    x += image * pixels * channels
    extra = addend(added, image, added_stride, channel, live, ADDED)
    mean, deviation = moments(
        x, first, last, channels, size, channel, live, extra, ROWS, GROUPS, PLACES
    )
    leads = live & (tl.arange(0, GROUPS * PLACES) % PLACES == 0)
    at = parts + tl.program_id(0).to(tl.int64) * groups + group
    beyond = (tl.num_programs(0)).to(tl.int64) * groups
    tl.store(at, mean, mask=leads)
    tl.store(at + beyond, deviation, mask=leads)


@triton.jit
def forward_kernel(
    x: tensor, y: tensor, weight: tensor, bias: tensor, scale: tensor, shift: tensor, added: tensor,
    parts: tensor, stats: tensor, pixels: tensor, channels: tensor, size: tensor, groups: tensor,
    chunk: tensor, chunks: tensor, scale_stride: tensor, shift_stride: tensor,
    added_stride: tensor, eps: tensor,
    ROWS: constexpr, GROUPS: constexpr, PLACES: constexpr, FULL: constexpr, CHUNKS: constexpr,
    SCALED: constexpr, ADDED: constexpr, SILU: constexpr,
) -> None:  # fmt: skip
    """Store y, like x (B, pixels, channels), and stats (2, B, groups): mean and 1 / std."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks
    images = tl.num_programs(0) // chunks
    channel, group, live = lanes(size, groups, tl.program_id(1), GROUPS, PLACES, FULL)
    first = number * chunk
    last = tl.minimum(first + chunk, pixels)
    skipped = image * pixels * channels
    x += skipped
    y += skipped
    extra = addend(added, image, added_stride, channel, live, ADDED)
    if CHUNKS > 1:
        one = tl.arange(0, CHUNKS)
        at = parts + (image * chunks + one[:, None]) * groups + group[None, :]
        beyond = tl.num_programs(0).to(tl.int64) * groups
        there = (one < chunks)[:, None] & live[None, :]
        count = tl.minimum(pixels - one * chunk, chunk).to(tl.float32) * size
        count = tl.where(one < chunks, count, 0.0)[:, None]
        mean, deviation = merged(
            tl.load(at, mask=there, other=0.0), tl.load(at + beyond, mask=there, other=0.0), count
        )
    else:
        mean, deviation = moments(
            x, first, last, channels, size, channel, live, extra, ROWS, GROUPS, PLACES
        )
    rstd = tl.rsqrt(deviation / (pixels * size) + eps)
    leads = live & (tl.arange(0, GROUPS * PLACES) % PLACES == 0) & (number == 0)
    at = stats + image * groups + group
    tl.store(at, mean, mask=leads)
    tl.store(at + images * groups, rstd, mask=leads)
    _, _, _, gain, offset = affine(
        weight, bias, scale, shift, image, scale_stride, shift_stride, channel, live, SCALED
    )
    mean -= extra
    row = tl.arange(0, ROWS)
    place = row[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        here = (start + row < last)[:, None] & live[None, :]
        skipped = tl.cast(start, tl.int64) * channels
        value = tl.load(x + skipped + place, mask=here, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * rstd[None, :] * gain[None, :] + offset[None, :]
        if SILU:
            value = value / (1 + tl.exp(-value))
        tl.store(y + skipped + place, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def sums_kernel(
    grad: tensor, x: tensor, weight: tensor, bias: tensor, scale: tensor, shift: tensor,
    added: tensor, stats: tensor, parts: tensor, pixels: tensor, channels: tensor, size: tensor,
    groups: tensor, chunk: tensor, chunks: tensor, scale_stride: tensor, shift_stride: tensor,
    added_stride: tensor,
    ROWS: constexpr, GROUPS: constexpr, PLACES: constexpr, FULL: constexpr, SCALED: constexpr,
    ADDED: constexpr, SILU: constexpr,
) -> None:  # fmt: skip
    """Store what `sums` returns for each chunk: parts (2, B, chunks, channels)."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks
    images = tl.num_programs(0) // chunks
    channel, group, live = lanes(size, groups, tl.program_id(1), GROUPS, PLACES, FULL)
    first = number * chunk
    last = tl.minimum(first + chunk, pixels)
    mean, rstd = found(stats, image, images, groups, group, live)
    mean -= addend(added, image, added_stride, channel, live, ADDED)
    _, _, _, gain, offset = affine(
        weight, bias, scale, shift, image, scale_stride, shift_stride, channel, live, SCALED
    )
    skipped = image * pixels * channels
    of_offset, of_gain = sums(
        grad + skipped, x + skipped, first, last, channels, channel, live, mean, rstd, gain,
        offset, ROWS, SILU,
    )  # fmt: skip
    at = parts + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(at, of_offset, mask=live)
    tl.store(at + tl.num_programs(0).to(tl.int64) * channels, of_gain, mask=live)


@triton.jit
def backward_kernel(
    grad: tensor, x: tensor, of_x: tensor, weight: tensor, bias: tensor, scale: tensor,
    shift: tensor, added: tensor, stats: tensor, parts: tensor, of_rest: tensor, of_added: tensor,
    pixels: tensor, channels: tensor, size: tensor, groups: tensor, chunk: tensor, chunks: tensor,
    scale_stride: tensor, shift_stride: tensor, added_stride: tensor,
    ROWS: constexpr, GROUPS: constexpr, PLACES: constexpr, FULL: constexpr, CHUNKS: constexpr,
    SCALED: constexpr, ADDED: constexpr, SILU: constexpr,
) -> None:  # fmt: skip
    """Store the gradients of x, of the rest by image (4, B, C), and of added (B, chunks, C).

    That of x is rstd (gain grad - a - b z), z the normalised x, a and b means over a group.
    """
    image = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks
    images = tl.num_programs(0) // chunks
    channel, group, live = lanes(size, groups, tl.program_id(1), GROUPS, PLACES, FULL)
    first = number * chunk
    last = tl.minimum(first + chunk, pixels)
    mean, rstd = found(stats, image, images, groups, group, live)
    mean -= addend(added, image, added_stride, channel, live, ADDED)
    w, b, factor, gain, offset = affine(
        weight, bias, scale, shift, image, scale_stride, shift_stride, channel, live, SCALED
    )
    skipped = image * pixels * channels
    grad += skipped
    x += skipped
    of_x += skipped
    if CHUNKS > 1:
        of_offset, of_gain = over_chunks(parts, image, channels, chunks, channel, live, CHUNKS)
    else:
        of_offset, of_gain = sums(
            grad, x, first, last, channels, channel, live, mean, rstd, gain, offset, ROWS, SILU
        )
    once = live & (number == 0)
    at = of_rest + image * channels + channel
    beyond = images.to(tl.int64) * channels
    tl.store(at, of_gain * factor, mask=once)
    tl.store(at + beyond, of_offset * factor, mask=once)
    if SCALED:
        tl.store(at + 2 * beyond, of_gain * w + of_offset * b, mask=once)
        tl.store(at + 3 * beyond, of_offset, mask=once)
    mean_slope = over_group(gain * of_offset, GROUPS, PLACES) / (pixels * size)
    mean_product = over_group(gain * of_gain, GROUPS, PLACES) / (pixels * size)
    total = tl.zeros((ROWS, GROUPS * PLACES), tl.float32)
    row = tl.arange(0, ROWS)
    place = row[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        here = (start + row < last)[:, None] & live[None, :]
        skipped = tl.cast(start, tl.int64) * channels
        z, slope = before_gain(
            grad + skipped, x + skipped, place, here, mean, rstd, gain, offset, SILU
        )
        value = gain[None, :] * slope - mean_slope[None, :] - mean_product[None, :] * z
        value *= rstd[None, :]
        tl.store(of_x + skipped + place, value.to(of_x.dtype.element_ty), mask=here)
        if ADDED:
            total += tl.where(here, value, 0.0)
    if ADDED:
        at = of_added + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(at, tl.sum(total, 0), mask=live)
