"""As many images at once as a GPU has room for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool.core.types import Denoiser
from cmtool.system.devices import is_out_of_memory

PIXELS = 1 << 20
"""Most pixels of all images together that a network sees at once on a GPU: sixteen images of 256
pixels. More would hardly be faster, and a network of that size takes 0.7 GiB an image."""


def most_images(size: tuple[int, int]) -> int:
    """Return how many images (H, W) a network sees at once on a GPU, where memory allows."""
    return max(1, PIXELS // (size[0] * size[1]))


def in_room(f: Denoiser, network: nn.Module, size: tuple[int, int]) -> Denoiser:
    """Return a denoiser that shows f no more images of `size` (H, W) than there is room for.

    Where memory is short, it goes on with half as many, and stays at that. Of a sharded network
    every process must call as often as the others, so there the error is raised. `network` is what
    f calls.
    """
    most = most_images(size)
    is_sharded = any(hasattr(p, "device_mesh") for p in network.parameters())

    def fitting(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        nonlocal most
        answers: list[Tensor] = []
        while (done := sum(map(len, answers))) < len(x):
            images = min(most, len(x) - done)
            part = slice(done, done + images)
            more = (None if t is None else t[part] for t in given)
            try:
                answers.append(f(x[part], sigma[part], *more))
                continue
            except RuntimeError as error:
                if images == 1 or is_sharded or not is_out_of_memory(error):
                    raise
            most = images // 2  # the error is gone here, and with it what its frames held
            torch.cuda.empty_cache()
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    return fitting
