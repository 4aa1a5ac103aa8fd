"""Bundle the emoji: `python -m tests.assets.make_emoji noto-64.zip twemoji-64.zip emoji.csv OUT`.

The zips hold pictures of 64x64 with alpha, under the same names; the table names each, the emoji of
which it is a skin tone, and its category. On white, each mean of 2x2 pixels, then the 32 colours
that suit a picture best: its pixels are off by 3 to 4 grey levels (root mean square).
"""

from __future__ import annotations

import csv
import io
import lzma
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, COLOURS = 32, 32
Row = dict[str, str]


def main(zips: list[Path], table: Path, out: Path) -> None:
    """Write indices, palettes, categories and names of all pictures to `out`, compressed."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "Component"]
    rows.sort(key=lambda row: (row["category"], row["base"], row["image"]))  # alike ones together
    pairs = [indexed(picture) for path in zips for picture in pictures(path, rows)]
    colours = np.concatenate([palette for palette, _ in pairs])
    content = io.BytesIO()
    np.savez(
        content,
        index=np.stack([index for _, index in pairs]),
        colours=colours,
        starts=np.cumsum([0, *(len(palette) for palette, _ in pairs)])[:-1].astype(np.int32),
        category=np.array([row["category"] for row in rows]),
        base=np.array([row["base"] for row in rows]),
        name=np.array([row["name"].lower() for row in rows]),
    )
    out.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def pictures(path: Path, rows: list[Row]) -> list[Image.Image]:
    """Return a vendor's pictures of the rows, RGB of SIZE x SIZE on white."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for row in rows:
            drawn = Image.open(io.BytesIO(archive.read(row["image"]))).convert("RGBA")
            paper = Image.new("RGBA", drawn.size, "white")
            paper.alpha_composite(drawn)
            found.append(paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    return found


def indexed(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the palette (n, 3) of a picture, its colours in order, and their indices (H, W)."""
    few = picture.quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE).convert("RGB")
    pixels = np.asarray(few).reshape(-1, 3)
    palette, index = np.unique(pixels, axis=0, return_inverse=True)
    return palette, index.reshape(SIZE, SIZE).astype(np.uint8)


if __name__ == "__main__":
    *archives, listing, target = map(Path, sys.argv[1:])
    main(archives, listing, target)
