"""Draw the README's picture of samples: `python -m tests.bench.samples samples.png`.

Other models: `python -m tests.bench.samples samples.png TEACHER STUDENT`.

Twenty seeds, drawn by the teacher, by the student in one step, and in two. Pixels are enlarged and
not blurred.
"""

import sys
from pathlib import Path

import torch

import cmtool
from cmtool.data.drawing import grid, png_bytes
from cmtool.data.images import to_uint8
from cmtool.system.files import write_atomic

SEEDS, COLUMNS, SIDE, GAP = range(20), 10, 64, 24


def main(out, teacher="emoji-edm", student="emoji-cmt"):
    rows = []
    guidance = cmtool.load_model(student).preset.loss.guidance  # that it was distilled with
    for name, steps, weight in ((teacher, None, guidance), (student, 1, 1.0), (student, 2, 1.0)):
        model = cmtool.load_model(name)
        images = to_uint8(cmtool.sample(model, SEEDS, steps=steps, guidance=weight))
        rows.append(grid(images, COLUMNS, scale=max(SIDE // images.shape[-1], 1)))
    gap = torch.full((3, GAP, rows[0].shape[-1]), 255, dtype=torch.uint8)
    write_atomic(Path(out), png_bytes(torch.cat([rows[0], gap, rows[1], gap, rows[2]], 1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
