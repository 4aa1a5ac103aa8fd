"""Does a model copy its training images? `python -m tests.bench.copies MODEL pairs.png [STEPS]`.

Each of 1,000 samples is put beside the training image nearest to it, in the features of the bundled
data and in pixels. The yardstick are held-out images, which nobody can have copied. Prints, for
both, the median distance to the nearest training image, and the share of samples that are nearer
than all but 5 % of held-out images are. The picture shows the twenty nearest samples and twenty of
all, each above its nearest training image.
"""

import sys
from pathlib import Path

import torch

import cmtool
from cmtool.data.datasets import load_dataset
from cmtool.data.drawing import grid, png_bytes
from cmtool.data.images import from_uint8, to_uint8
from cmtool.evaluation.bundled import load_features
from cmtool.system.files import write_atomic

SAMPLES, SHOWN = 1000, 20


def nearest(rows, others):
    """Return the distance of each row to the nearest of others, and where that is."""
    found = [torch.cdist(part, others).min(1) for part in rows.split(200)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def main(name, out, steps="1"):
    model = cmtool.load_model(name)
    train, held_out = (load_dataset(f"{model.bundled_data}:{s}") for s in ("train", "held-out"))
    samples = to_uint8(cmtool.sample(model, range(SAMPLES), steps=int(steps)))
    network, _ = load_features(model.bundled_data)
    sets = {"samples": samples, "held-out": held_out.images[:], "train": train.images[:]}
    spaces = {
        "features": {key: network(from_uint8(images)) for key, images in sets.items()},
        "pixels": {key: from_uint8(images).flatten(1) for key, images in sets.items()},
    }
    for space, rows in spaces.items():
        made, where = nearest(rows["samples"], rows["train"])
        real, _ = nearest(rows["held-out"], rows["train"])
        share = (made < real.quantile(0.05)).float().mean()
        medians = f"samples {made.median():.2f}, held-out {real.median():.2f}"
        print(f"{space}: median to the nearest: {medians}; {100 * share:.1f} % nearer than 95 %")
        if space == "features":
            closest = made.argsort()[:SHOWN]
            some = torch.arange(SHOWN)
            parts = [samples[closest], train.images[where[closest]]]
            parts += [samples[some], train.images[where[some]]]
            write_atomic(Path(out), png_bytes(grid(torch.cat(parts), SHOWN, scale=2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
