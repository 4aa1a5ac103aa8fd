"""The checkpoints of a run: which are there, which of them are whole, and which stay.

A folder without a complete manifest is not a checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from cmtool.errors import InputError
from cmtool.formats.native import read_table
from cmtool.system.files import file_facts, write_json

MANIFEST = "manifest.json"
BEST = "best.json"


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders step-N under `folder`, by N."""
    found = [
        p for p in folder.glob("step-*") if p.is_dir() and re.fullmatch("[0-9]{1,18}", p.name[5:])
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and why newer ones were passed over."""
    complaints = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except InputError as error:
            complaints.append(error.what)
            continue
        return path, complaints
    return None, complaints


def verify(path: Path) -> None:
    """Raise InputError unless every file of the checkpoint has the size and hash it was given."""
    try:
        manifest = dict(read_table(path / MANIFEST)["files"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{path} is not a whole checkpoint: no manifest", "use another") from None
    for name, facts in manifest.items():
        file = path / name
        if not file.is_file() or file_facts(file) != facts:
            raise InputError(f"{file} is damaged", "use the checkpoint before it")


def point_to(folder: Path, final: Path) -> None:
    """Name the newest checkpoint in latest.json, for people and scripts; resuming looks itself."""
    write_json(folder / "latest.json", {"checkpoint": final.name}, durable=True)


class Score(NamedTuple):
    """A checkpoint's value by some metric over `num` images; the lower the better."""

    metric: str
    num: int
    value: float


def record_best(folder: Path, name: str, score: Score, keep: int) -> None:
    """Put a checkpoint's score into best.json, if it is one of the best `keep`."""
    ranked = {**best(folder, score), name: score.value}
    if not math.isfinite(score.value):
        del ranked[name]
    kept = dict(sorted(ranked.items(), key=lambda item: (item[1], item[0]))[:keep])
    facts = {"metric": score.metric, "num": score.num, "checkpoint": next(iter(kept), None)}
    write_json(folder / BEST, {**facts, "best": kept}, durable=True)


def is_best(folder: Path, score: Score, keep: int) -> bool:
    """Tell whether a score is better than one of the best `keep` checkpoints that are there."""
    if not keep or not math.isfinite(score.value):
        return False
    values = sorted(best(folder, score).values())
    return len(values) < keep or score.value < values[keep - 1]


def best(folder: Path, like: Score | None = None) -> dict[str, float]:
    """Return the checkpoints that best.json names, and their values.

    Those only that are there, and by the metric and number of images of `like`, if given.
    """
    try:
        facts = read_table(folder / BEST)
        found = {str(name): float(value) for name, value in facts["best"].items()}
        other = like and (facts["metric"], facts["num"]) != (like.metric, like.num)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {} if other else {n: v for n, v in found.items() if (folder / n / MANIFEST).is_file()}


def prune(folder: Path, keep: int, newest: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best ones.

    Those after step `newest` do not count and stay: a resumed run passed them over as damaged.
    """
    found = checkpoints(folder)
    if newest is not None:
        found = [path for path in found if int(path.name[5:]) <= newest]
    spared = best(folder)
    for old in found[:-keep]:
        if old.name not in spared:
            discard(old)


def prune_all(folder: Path) -> None:
    """Remove every checkpoint of a run that is to be overwritten."""
    for old in checkpoints(folder):
        discard(old)
    for name in ("latest.json", BEST):
        (folder / name).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a checkpoint, which is no longer one from the first moment on."""
    doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_temporary(folder: Path) -> None:
    """Remove half-written checkpoints; call it only while holding the run's lock."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
