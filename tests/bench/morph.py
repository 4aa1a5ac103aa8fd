"""Draw the README's moving picture: `python -m tests.bench.morph morph.webp [MODEL]`.

In each column, of one class, the noise of one seed turns into that of the next, and so on round;
every frame is one call of the model. Pixels are enlarged and not blurred.
"""

import sys
from pathlib import Path

import torch

import cmtool
from cmtool.core.edits import enlarged
from cmtool.data.drawing import animation_bytes, grid
from cmtool.data.images import to_uint8
from cmtool.editing import interpolate
from cmtool.system.files import write_atomic

FRAMES, SCALE = 12, 3
SEEDS = [(3 * label + 1, 3 * label + 2, 3 * label + 3) for label in range(9)]


def turn(model, label, seeds):
    """Return frames (n, C, H, W) uint8 from each seed to the next, and back to the first."""
    parts = []
    for start, end in zip(seeds, (*seeds[1:], seeds[0]), strict=True):
        made = interpolate(model, start, end, frames=FRAMES + 1, label=label)
        parts.append(made[:-1])
    return to_uint8(torch.cat(parts))


def main(out, name="emoji-cmt"):
    model = cmtool.load_model(name)
    columns = [turn(model, label, seeds) for label, seeds in enumerate(SEEDS)]
    frames = [grid(torch.stack(pictures), len(columns)) for pictures in zip(*columns, strict=True)]
    write_atomic(Path(out), animation_bytes(enlarged(torch.stack(frames), SCALE), Path(out).suffix))


if __name__ == "__main__":
    main(*sys.argv[1:])
