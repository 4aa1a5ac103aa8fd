"""Train the feature network of fd-emoji: `python -m tests.assets.make_emoji_features OUT`.

It learns three things from the training emoji: the category, which picture of the other vendor is
the same emoji, and the colours. Pictures are turned, moved, scaled and lit at random, so that it
must see what is drawn; the held-out emoji only measure it. The same seed gives the same file on the
same machine.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cmtool.core.rng import keyed_generator, seeded
from cmtool.data.datasets import Dataset, emoji
from cmtool.data.images import from_uint8
from cmtool.evaluation.bundled import EmojiFeatures
from cmtool.formats.native import write_weights

SEED, EPOCHS, BATCH, LR = 0, 80, 128, 2e-3
TEMPERATURE = 0.1


def warped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 3, H, W) on white, turned, moved, scaled, lit otherwise and with noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    angle, scale = uniform(-15, 15) * math.pi / 180, uniform(0.85, 1.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (cos, -sin, uniform(-0.15, 0.15), sin, cos, uniform(-0.15, 0.15))
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # what comes in is white
    light = uniform(0.8, 1.1)[:, None, None, None]
    noise = torch.randn(x.shape, generator=generator)
    return (light * moved + 0.05 * noise).clamp(-1, 1)


def thumbnails(images: Tensor) -> Tensor:
    """Return the mean colours (B, 48) of 4x4 parts of images (B, 3, H, W)."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


def pairs(data: Dataset) -> tuple[Tensor, Tensor]:
    """Return pictures (2, n, 3, 32, 32) of both vendors, and the categories (n,)."""
    assert data.labels is not None
    images = data.images[torch.arange(len(data))]
    return images.view(2, -1, *images.shape[1:]), data.labels[: len(data) // 2]


def alike(features: Tensor, network: EmojiFeatures) -> Tensor:
    """Return how alike each picture (B,) of one vendor is to each of the other, (B, B)."""
    ours, theirs = F.normalize(network.identity(features), dim=1).chunk(2)
    return ours @ theirs.T / TEMPERATURE


def loss(network: EmojiFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the three tasks for images (2 B, 3, 32, 32) and labels (B,)."""
    features, own = network(images), torch.arange(len(labels))
    scores = alike(features, network)
    same = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    category = F.cross_entropy(network.classes(features), labels.repeat(2))
    return same + category + 4 * F.mse_loss(network.colours(features), thumbnails(images))


def main(out: Path) -> None:
    """Train, report on the held-out emoji, and write half-precision weights to `out`."""
    images, labels = pairs(emoji("train"))
    with seeded(keyed_generator("features", SEED)):
        network = EmojiFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
    each = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * each)
    for step in range(EPOCHS * each):
        order = torch.randperm(len(labels), generator=keyed_generator("order", SEED, step // each))
        index = order[step % each * BATCH :][:BATCH]
        generator = keyed_generator("features", SEED, step)
        optimizer.zero_grad()
        x = warped(from_uint8(images[:, index].flatten(0, 1)), generator)
        loss(network, x, labels[index]).backward()
        optimizer.step()
        schedule.step()
    images, labels = pairs(emoji("held-out"))
    network.eval()
    with torch.no_grad():
        x = from_uint8(images.flatten(0, 1))
        features = network(x)
        right = network.classes(features).argmax(1) == labels.repeat(2)
        found = alike(features, network).argmax(1) == torch.arange(len(labels))
        error = F.mse_loss(network.colours(features), thumbnails(x)).sqrt()
    accuracy, same = float(right.float().mean()), float(found.float().mean())
    print(f"held-out: category {accuracy:.3f}, same emoji {same:.3f}, colours {error:.4f}")
    about = {"kind": "features", "seed": SEED, "steps": EPOCHS * each}
    about |= {"accuracy": round(accuracy, 4), "same": round(same, 4)}
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    write_weights(out, weights, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
