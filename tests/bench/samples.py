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
    for name, steps in ((teacher, None), (student, 1), (student, 2)):
        images = to_uint8(cmtool.sample(cmtool.load_model(name), SEEDS, steps=steps))
        rows.append(grid(images, COLUMNS, scale=max(SIDE // images.shape[-1], 1)))
    gap = torch.full((3, GAP, rows[0].shape[-1]), 255, dtype=torch.uint8)
    write_atomic(Path(out), png_bytes(torch.cat([rows[0], gap, rows[1], gap, rows[2]], 1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
