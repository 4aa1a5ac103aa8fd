"""Which part of a set's images each class has, so that samples are drawn alike."""

from __future__ import annotations

import os
from pathlib import Path

from cmtool.data.datasets import Dataset, load_dataset
from cmtool.errors import InputError, UserError
from cmtool.evaluation.sets import Given, read_statistics
from cmtool.presets.schema import Card

DATA = "give the data that it was trained on as --reference, or leave --classes out"


def shares_of(given: Given | None, preset: Card) -> tuple[float, ...]:
    """Return which part of a set's images each class of a model has. Raises InputError for none."""
    classes = preset.model.num_classes
    if not classes:
        raise UserError("--classes reference: the model has no classes", "leave --classes out")
    name = os.fspath(given) if isinstance(given, str | Path) else ""
    is_file = Path(name).is_file() and name.lower().endswith((".npz", ".pkl"))
    stored = read_statistics(name) if is_file else None
    if not name or (stored is not None and not stored.has_images):
        raise InputError("--classes reference: the reference holds no images with classes", DATA)
    data = load_dataset(name, in_memory=False)
    if data.labels is None or data.num_classes != classes:
        what = f"{name} has {data.num_classes} classes, and the model {classes}"
        raise InputError(f"--classes reference: {what}", DATA)
    return shares_in(data)


def shares_in(data: Dataset) -> tuple[float, ...]:
    """Return which part of the images of a set with labels each class has."""
    assert data.labels is not None
    counts = data.labels.cpu().bincount(minlength=data.num_classes)
    return tuple((counts / counts.sum()).tolist())
