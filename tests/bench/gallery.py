"""Draw the README's picture of the edits: `python -m tests.bench.gallery edits.png [MODEL]`.

Ten held-out pictures of the model's bundled data go through the commands, each of another class as
far as there are so many. Each row is what an edit was given, and below its answers.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch.nn.functional import avg_pool2d

import cmtool
from cmtool.core.edits import blur, enlarged, gaussian_kernel, luma
from cmtool.data.datasets import load_dataset
from cmtool.data.decoding import read_image
from cmtool.data.drawing import grid, png_bytes
from cmtool.data.images import from_uint8, to_uint8

COUNT = 10
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
PAPER = [(250, 235, 200), (215, 240, 250), (235, 250, 215), (250, 220, 230), (240, 240, 240)]
INK = [(120, 10, 90), (20, 70, 140), (30, 90, 20), (150, 60, 10), (40, 40, 60)]


def run(*arguments):
    subprocess.run([sys.executable, "-m", "cmtool", *map(str, arguments)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def digit_painted(index):
    image = Image.new("RGB", (8, 8), PAPER[index % 5])
    draw = ImageDraw.Draw(image)
    for line in STROKES[index]:
        draw.line(line, fill=INK[index % 5], width=1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def painted(pictures):
    """Rough paintings: of digits by hand; of others by large dabs of their colours."""
    if pictures.shape[-1] == 8:
        return torch.stack([digit_painted(index) for index in range(COUNT)])
    dabs = avg_pool2d(pictures.float(), 4).round().to(torch.uint8)
    return enlarged(dabs, 4)


def chosen(data):
    """Ten pictures of a data set: of each class in turn, spread over it."""
    places = []
    for turn in range(COUNT):
        mine = (data.labels == turn % data.num_classes).nonzero().flatten()
        places.append(int(mine[turn * (len(mine) - 1) // COUNT]))
    return data.images[torch.tensor(places)]


def edited(folder, model, pictures, edit, *arguments):
    """Return the answers to the pictures, in order."""
    names = [folder / f"{label}.png" for label in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        name.write_bytes(png_bytes(picture))
    options = ["-c", model, "--device", "cpu", "--overwrite"]
    run("edit", edit, *names, *arguments, *options, "--out", folder / edit)
    return torch.stack([read_image(folder / edit / name.name) for name in names])


def strip(folder, model, seeds, label):
    """Return ten pictures from one seed to another, of a class."""
    out = folder / "strip.png"
    ends = ["--seeds", seeds, "--frames", COUNT, "--class", label, "--overwrite"]
    run("edit", "interpolate", *ends, "-c", model, "--device", "cpu", "--out", out)
    picture = read_image(out)
    return torch.stack(picture.split(picture.shape[1], dim=2))


def rows(folder, model, pictures):
    """Return by edit what it was given, and its answers: pictures of one size."""
    answers = partial(edited, folder, model)
    side = pictures.shape[-1]
    half, factor = side // 2, 2 if side == 8 else 4
    small = avg_pool2d(pictures.float(), factor).round().to(torch.uint8)
    grey = luma(pictures.float()).round().to(torch.uint8).expand(-1, 3, -1, -1)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures + 0.4 * 127.5 * noise).clamp(0, 255).to(torch.uint8)
    masked = pictures.clone()
    masked[..., half:] = 128
    paintings = painted(pictures)
    made = {
        "given": [pictures],
        "inpaint": [masked, answers(pictures, "inpaint", "--box", f"{half},0,{half},{side}")],
        "superres": [enlarged(small, factor), answers(small, "superres", "--factor", factor)],
        "colorize": [grey, answers(grey, "colorize")],
        "denoise": [noisy, answers(noisy, "denoise", "--sigma", "0.4")],
        "stroke": [paintings, answers(paintings, "stroke")],
    }
    if side > 8:
        blurred = to_uint8(blur(from_uint8(pictures), gaussian_kernel(1.5)))
        made["deblur"] = [blurred, answers(blurred, "deblur", "--gaussian", "1.5")]
        made["variations"] = [answers(pictures, "variations")]
    ends = (("3,7", 4), ("11,20", 8))
    made["interpolate"] = [strip(folder, model, seeds, label) for seeds, label in ends]
    return made


def main(out, model="emoji-cmt"):
    data = load_dataset(f"{cmtool.load_model(model).bundled_data}:held-out")
    with tempfile.TemporaryDirectory() as made:
        parts = rows(Path(made), model, chosen(data))
    heights = [len(group) for group in parts.values()]
    figure = Figure(figsize=(7.6, 0.66 * sum(heights)), layout="constrained", dpi=100)
    for axis, (name, group) in zip(
        figure.subplots(len(parts), 1, height_ratios=heights), parts.items(), strict=True
    ):
        sheet = grid(torch.cat(group), COUNT).permute(1, 2, 0).numpy()
        axis.imshow(sheet, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
