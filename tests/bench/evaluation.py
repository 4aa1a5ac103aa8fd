"""Time of evaluation beside clean-fid's: `python -m tests.bench.evaluation [--repeats 3]`.

The Frechet distance of 2,048 features (goal 12 of README.md) and Inception features of a folder of
32x32 images in memory (goal 13), on a file of random weights, one thread; both take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from cmtool.evaluation.features import inception_extractor
from cmtool.evaluation.gaussian import Gaussian, frechet_distance
from tests.bench.measure import alternate, ratio
from tests.published import write_detector

warnings.simplefilter("ignore")


def gaussian(rows: torch.Tensor) -> Gaussian:
    """Return the statistics of features (N, D)."""
    return Gaussian(rows.mean(0), rows.T.cov(), len(rows))


def distances(repeats: int) -> None:
    """Print how our Frechet distance compares with clean-fid's."""
    from cleanfid import fid

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2048, 2048, generator=generator).double() / 45
    a, b = (
        gaussian((torch.randn(4000, 2048, generator=generator).double() @ mixing * s).relu())
        for s in (1.0, 1.1)
    )
    sides = [t.numpy() for g in (a, b) for t in (g.mean, g.covariance)]
    theirs, ours = fid.frechet_distance(*sides), frechet_distance(a, b)
    seconds = alternate(
        {
            "clean-fid": lambda: fid.frechet_distance(*sides),
            "cmtool": lambda: frechet_distance(a, b),
        },
        repeats,
    )
    times = ratio(seconds["clean-fid"], seconds["cmtool"]).wall
    print(f"Frechet distance, 2,048-d: {times:.1f}x, relative difference {ours / theirs - 1:.1e}")


def features(repeats: int, count: int) -> None:
    """Print how our features compare with clean-fid's, which are the file's own code."""
    from cleanfid.fid import get_batch_features
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception-2015-12-05.pt"
        write_detector(path)
        for resize, inside in (("tf", True), ("clean", False)):
            network = InceptionV3W(folder, download=False, resize_inside=inside)
            resized = build_resizer("clean")

            def theirs(inside=inside, network=network, resized=resized) -> np.ndarray:
                batch = images.float()
                if not inside:
                    each = [resized(image.permute(1, 2, 0).numpy()) for image in images]
                    batch = torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).contiguous()
                return get_batch_features(batch, network, torch.device("cpu"))

            kinds = {
                precision: inception_extractor(path, "", resize=resize, precision=precision)
                for precision in ("fp32", "bf16")
            }
            expected = torch.from_numpy(theirs())
            seconds = alternate(
                {"clean-fid": theirs}
                | {name: (lambda kind=kind: kind(images)) for name, kind in kinds.items()},
                repeats,
            )
            for name, kind in kinds.items():
                off = float((kind(images) - expected).norm() / expected.norm())
                times = ratio(seconds["clean-fid"], seconds[name]).wall
                each = min(s.wall for s in seconds[name]) / count
                print(
                    f"features, {resize}, {name}: {times:.2f}x, {1 / each:.1f} images/s, {off:.0e}"
                )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    features(arguments.repeats, arguments.images)
    distances(arguments.repeats)


if __name__ == "__main__":
    main()
