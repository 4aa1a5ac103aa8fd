"""The bundled emoji: 3,781 as two vendors drew them, 32x32 on white, in nine categories."""

from __future__ import annotations

import io
import lzma
from functools import cache
from pathlib import Path

import numpy as np

EMOJI = Path(__file__).parent.parent / "assets" / "emoji.npz.xz"
VENDORS = ("noto", "twemoji")
HELD_OUT_EVERY = 8


@cache
def stored() -> dict[str, np.ndarray]:
    """Return what the file holds of n emoji, first all of Noto and then all of Twemoji.

    `index` (2n, 32, 32) points into `colours`, from the picture's place in `starts` on. `category`,
    `base` (the emoji of which it is a skin tone, or itself) and `name` are (n,) strings.
    """
    with lzma.open(EMOJI) as file, np.load(io.BytesIO(file.read())) as content:
        return dict(content)


def pictures(which: np.ndarray) -> np.ndarray:
    """Return pictures (len(which), 3, 32, 32) uint8 by their places among all of both vendors."""
    all_of = stored()
    colours = all_of["starts"][which, None, None] + all_of["index"][which].astype(np.int64)
    return np.ascontiguousarray(all_of["colours"][colours].transpose(0, 3, 1, 2))


def held_out() -> np.ndarray:
    """Return (n,) bool: every eighth base emoji of each category, with all of its skin tones.

    So no emoji that is held out differs from one of training in its colours alone, and it is held
    out of both vendors.
    """
    category, base = stored()["category"], stored()["base"]
    chosen: set[str] = set()
    for one in np.unique(category):
        chosen.update(np.unique(base[category == one])[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return np.isin(base, list(chosen))


def read(is_held_out: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return pictures (N, 3, 32, 32) uint8 of a split, labels (N,) int64 and the classes' names."""
    names, labels = np.unique(stored()["category"], return_inverse=True)
    (chosen,) = np.nonzero(held_out() == is_held_out)
    places = np.concatenate([chosen + len(labels) * vendor for vendor in range(len(VENDORS))])
    return (
        pictures(places),
        np.tile(labels[chosen], len(VENDORS)).astype(np.int64),
        tuple(names.tolist()),
    )
