"""Classifier-free guidance: a model that exaggerates what a class changes in its answer."""

from __future__ import annotations

import torch
from torch import Tensor

from cmtool.core.types import NO_CLASS, Denoiser


def guided(denoiser: Denoiser, weight: float) -> Denoiser:
    """Return D(no class) + weight (D(class) - D(no class)) (Ho & Salimans 2022, eq. 6).

    Weight 1 is the denoiser itself; 2 to 4 give clearer images of less variety. A call costs two,
    made as one batch. Without labels there is nothing to guide.
    """
    if weight == 1:
        return denoiser

    def guided_denoiser(
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        sigma_to: Tensor | None = None,
        /,
    ) -> Tensor:
        if labels is None:
            return denoiser(x, sigma, labels, sigma_to)
        both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
        ends = None if sigma_to is None else sigma_to.repeat(2)
        answer = denoiser(x.repeat(2, 1, 1, 1), sigma.repeat(2), both, ends)
        known, unknown = answer.chunk(2)
        return unknown + weight * (known - unknown)

    return guided_denoiser
