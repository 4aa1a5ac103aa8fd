"""Draw the README's picture of the six edits: `python -m tests.bench.gallery edits.png`.

Ten held-out digits, one of each class, through the commands; strokes are painted by hand.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from cmtool.cli.demo import first_of_each_class
from cmtool.data.datasets import digits
from cmtool.data.decoding import read_image
from cmtool.data.drawing import grid, png_bytes

STROKES = [  # a digit's strokes on 8x8 pixels
    [(2, 1, 5, 1), (5, 1, 5, 6), (5, 6, 2, 6), (2, 6, 2, 1)],
    [(4, 0, 4, 7)],
    [(1, 1, 5, 1), (5, 1, 5, 3), (5, 3, 1, 6), (1, 6, 6, 6)],
    [(1, 0, 5, 0), (5, 0, 3, 3), (3, 3, 5, 5), (5, 6, 1, 7)],
    [(3, 0, 1, 4), (1, 4, 6, 4), (5, 2, 5, 7)],
    [(6, 0, 2, 0), (2, 0, 2, 3), (2, 3, 5, 4), (5, 4, 2, 7)],
    [(4, 0, 2, 4), (2, 4, 2, 6), (2, 6, 5, 6), (5, 4, 2, 4)],
    [(1, 1, 6, 1), (6, 1, 3, 7)],
    [(2, 1, 5, 1), (5, 1, 2, 6), (2, 6, 5, 6), (5, 6, 2, 1)],
    [(5, 3, 2, 3), (2, 3, 2, 1), (2, 1, 5, 1), (5, 1, 4, 7)],
]
MODEL = ["-c", "digits-cd", "--device", "cpu"]
PAPER = [(250, 235, 200), (215, 240, 250), (235, 250, 215), (250, 220, 230), (240, 240, 240)]
INK = [(120, 10, 90), (20, 70, 140), (30, 90, 20), (150, 60, 10), (40, 40, 60)]


def cmtool(*arguments):
    subprocess.run([sys.executable, "-m", "cmtool", *map(str, arguments)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def painting(index):
    image = Image.new("RGB", (8, 8), PAPER[index % 5])
    draw = ImageDraw.Draw(image)
    for line in STROKES[index]:
        draw.line(line, fill=INK[index % 5], width=1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def edited(folder, pictures, edit, *arguments):
    """Return the answers to the pictures, in order."""
    names = [folder / f"{label}.png" for label in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        name.write_bytes(png_bytes(picture))
    cmtool("edit", edit, *names, *arguments, *MODEL, "--out", folder / edit)
    return torch.stack([read_image(folder / edit / name.name) for name in names])


def main():
    pictures = first_of_each_class(digits("held-out"))
    small = torch.nn.functional.avg_pool2d(pictures.float(), 2).round().to(torch.uint8)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    grey = (pictures * torch.tensor([0.2989, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
    grey = grey.round().to(torch.uint8).expand(-1, 3, -1, -1)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures + 0.4 * 127.5 * noise).clamp(0, 255).to(torch.uint8)
    masked = pictures.clone()
    masked[..., 4:] = 128
    painted = torch.stack([painting(label) for label in range(10)])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = {
            "digits": [pictures],
            "inpaint": [masked, edited(folder, pictures, "inpaint", "--box", "4,0,4,8")],
            "superres": [large, edited(folder, small, "superres", "--factor", "2")],
            "colorize": [grey, edited(folder, grey, "colorize")],
            "denoise": [noisy, edited(folder, noisy, "denoise", "--sigma", "0.4")],
            "stroke": [painted, edited(folder, painted, "stroke")],
            "interpolate": [],
        }
        for first, last, label in ((3, 7, 4), (11, 20, 8)):
            strip = folder / f"strip-{label}.png"
            ends = ["--seeds", f"{first},{last}", "--frames", "10", "--class", label]
            cmtool("edit", "interpolate", *ends, *MODEL, "--out", strip)
            rows["interpolate"].append(torch.stack(read_image(strip).split(8, dim=2)))
    heights = [len(parts) for parts in rows.values()]
    figure = Figure(figsize=(7.6, 0.66 * sum(heights)), layout="constrained", dpi=100)
    for axis, (name, parts) in zip(
        figure.subplots(len(rows), 1, height_ratios=heights), rows.items(), strict=True
    ):
        axis.imshow(grid(torch.cat(parts), 10).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
