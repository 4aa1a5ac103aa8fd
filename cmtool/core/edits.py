"""Zero-shot edits (Song et al. 2023, App. D): where sampling starts, and what each x0 must keep.

An edit is sampling with `init = edit.init` and `project = edit.project`; see samplers.multistep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.core.types import Projection
from cmtool.errors import InputError


@dataclass(frozen=True)
class Edit:
    """`init` (B, C, H, W) is noised to start from; `project` puts back what the user gave.

    `project` is an idempotent affine map and does not clamp.
    """

    init: Tensor
    project: Projection


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
