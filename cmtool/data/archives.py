"""Write many images into one file: a zip of PNG files as EDM's tools read it, an npz as ADM's."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from cmtool.system.files import replacing


def write_zip(path: Path, pictures: Iterable[tuple[str, bytes, int | None]]) -> int:
    """Write at least one (name, PNG, class) uncompressed, the classes as dataset.json.

    Return their number. The same pictures make the same bytes.
    """
    labels = []
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content, label in pictures:
            archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo has a fixed date
            labels.append((name, label))
        table = None if labels[0][1] is None else labels
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": table}))
    return len(labels)


def write_npz(
    path: Path, images: Iterable[Tensor], count: int, labels: Sequence[int] | None
) -> None:
    """Write `count` images (C, H, W) uint8 as arr_0 (N, H, W, C), and their classes as arr_1.

    Each image is written at once, so that memory does not grow with their number.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        rows = (image.numpy().transpose(1, 2, 0) for image in images)
        first = next(rows)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for row in itertools.chain([first], rows):
                member.write(row.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(labels, np.int64))
