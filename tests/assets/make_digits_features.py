"""Train the feature network of fd-digits: `python -m tests.assets.make_digits_features OUT`.

The classifier learns class and colours from the training digits, with small shifts and noise;
the held-out digits only measure it. The same seed gives the same file on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cmtool.core.rng import keyed_generator, seeded
from cmtool.data.datasets import digits
from cmtool.data.images import from_uint8
from cmtool.evaluation.bundled import DigitsFeatures
from cmtool.formats.native import write_weights

SEED, EPOCHS, BATCH, LR = 0, 16, 128, 2e-3


def colours(images: Tensor) -> Tensor:
    """Return paper and ink of images (B, 3, 8, 8): their lightest and darkest pixel, (B, 6)."""
    flat = images.flatten(2)
    index = torch.stack([flat.sum(1).argmax(1), flat.sum(1).argmin(1)], 1)  # (B, 2)
    return flat.gather(2, index[:, None].expand(-1, 3, -1)).flatten(1)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 3, 8, 8) moved by up to one pixel each way, their edges repeated."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    moves = torch.randint(3, (len(x), 2), generator=generator)
    return torch.stack(
        [image[:, r : r + 8, c : c + 8] for image, (r, c) in zip(padded, moves, strict=True)]
    )


def loss(network: DigitsFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus the squared error of the colours."""
    features = network(images)
    logits, guess = network.classes(features), network.colours(features)
    return F.cross_entropy(logits, labels) + 2 * F.mse_loss(guess, colours(images))


def main(out: Path) -> None:
    """Train, report on the held-out digits, and write half-precision weights to `out`."""
    train, held_out = digits("train"), digits("held-out")
    assert train.labels is not None
    assert held_out.labels is not None
    with seeded(keyed_generator("features", SEED)):
        network = DigitsFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
    steps = EPOCHS * len(train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        generator = keyed_generator("features", SEED, step)
        index = torch.randint(len(train), (BATCH,), generator=generator)
        x = from_uint8(train.images[index])
        x = shifted(x, generator) + 0.1 * torch.randn(x.shape, generator=generator)
        optimizer.zero_grad()
        loss(network, x, train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        x = from_uint8(held_out.images[torch.arange(len(held_out))])
        features = network(x)
        logits, guess = network.classes(features), network.colours(features)
        accuracy = (logits.argmax(1) == held_out.labels).float().mean()
        error = F.mse_loss(guess, colours(x)).sqrt()
    print(f"held-out accuracy {accuracy:.4f}, colour error {error:.4f}", file=sys.stderr)
    write_weights(
        out,
        {name: tensor.half() for name, tensor in network.state_dict().items()},
        {"kind": "features", "seed": SEED, "steps": steps, "accuracy": round(float(accuracy), 4)},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
