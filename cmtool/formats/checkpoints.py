"""From a path to weights: a file, or the checkpoints of a run, which are whole, and which are kept.

Weights are identified and hashed at most once. A folder without a complete manifest is not a
checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import Field

from cmtool.errors import InputError
from cmtool.formats import diffusers_dir, identify
from cmtool.formats.native import read_about, read_table
from cmtool.system.files import file_sha256, write_json
from cmtool.system.records import Facts, known_facts, read_facts

MANIFEST = "manifest.json"
BEST = "best.json"
NOT_WEIGHTS = {"optimizer", "method"}
"""Tensor files of a checkpoint that hold no network."""
AGAIN = "give another checkpoint"
T = TypeVar("T")


class Damaged(InputError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True)
class Found:
    """Weights on the disk: one file, or the folder of a diffusers pipeline."""

    path: Path

    @cached_property
    def format(self) -> str:
        """Return "native" or a key of FORMATS. Raises InputError for anything else."""
        return identify(self.path)

    @cached_property
    def sha256(self) -> str:
        """Return the hash of what is read of the model."""
        return file_sha256(self.path) if self.path.is_file() else diffusers_dir.sha256(self.path)

    @property
    def levels_file(self) -> Path:
        """Return the file of the noise levels that `cmtool search` finds for these weights."""
        if self.path.is_dir():
            return self.path / "levels.json"
        return self.path.with_name(f"{self.path.name}.levels.json")


def find(path: Path, weights: str = "ema") -> tuple[Found, list[str]]:
    """Return the weights that a path stands for, and why newer ones of its run are passed over.

    The path is a run, a checkpoint, a file or a pipeline. Raises InputError where it has no model.
    """
    if path.is_file() or diffusers_dir.is_it(path):
        return Found(path), []
    if not (path / "checkpoints").is_dir():
        return _in_checkpoint(path, weights), []
    found, complaints = newest(path / "checkpoints", lambda folder: _in_checkpoint(folder, weights))
    if found is None:
        raise _no_checkpoint(path)
    return found, complaints


def kind_of_run(run: Path) -> str | None:
    """Return the kind of model that a run made, None if it has no checkpoint. Hashes nothing."""
    found, _ = newest(run / "checkpoints", lambda folder: sized(folder, "ema"))
    return found and read_about(found[0].path).get("kind")


def _in_checkpoint(folder: Path, weights: str) -> Found:
    """Return the weights of a checkpoint. Raises Damaged if their hash is not the manifest's."""
    found, hashes = sized(folder, weights)
    if found.sha256 != hashes.get(found.path.name, found.sha256):
        raise _damaged(found.path)
    return found


def sized(folder: Path, weights: str) -> tuple[Found, dict[str, str]]:
    """Return a checkpoint's weights, and the hashes of its files. Hashes nothing.

    Raises Damaged for one whose files have not their sizes, InputError for weights it has not.
    """
    if not (folder / "model.safetensors").is_file():
        raise _no_checkpoint(folder)
    hashes = whole_files(folder)
    return Found(weight_file(folder, weights)), hashes


def _no_checkpoint(path: Path) -> Damaged:
    return Damaged(f"no checkpoint in {path}", "give a run folder or a checkpoint folder")


def _damaged(file: Path) -> Damaged:
    return Damaged(f"{file} is damaged", "give an earlier checkpoint")


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders step-N under `folder`, by N."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("[0-9]{1,18}", p.name[5:])]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name[5:]))


def newest(folder: Path, read: Callable[[Path], T]) -> tuple[T | None, list[str]]:
    """Return what `read` makes of the newest checkpoint that is not Damaged, and why others are."""
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return read(path), complaints
        except Damaged as error:
            complaints.append(error.what)
    return None, complaints


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and why newer ones were passed over."""
    return newest(folder, verify)


def verify(path: Path) -> Path:
    """Return the checkpoint. Raises Damaged unless every file has its size and hash."""
    for name, sha256 in whole_files(path).items():
        if file_sha256(path / name) != sha256:
            raise _damaged(path / name)
    return path


def whole_files(path: Path) -> dict[str, str]:
    """Return each file's hash by the manifest. Raises Damaged unless all have their sizes."""
    try:
        listed = read_table(path / MANIFEST)["files"]
        facts = {name: (fact["bytes"], fact["sha256"]) for name, fact in listed.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        what = f"{path} is not a whole checkpoint: no manifest"
        files = sorted(f for f in path.glob("*.safetensors") if f.stem not in NOT_WEIGHTS)
        hint = f"give its file of weights: {shlex.quote(str(files[0]))}" if files else AGAIN
        raise Damaged(what, hint) from None
    for name, (size, _) in facts.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise _damaged(file)
    return {name: sha256 for name, (_, sha256) in facts.items()}


def weight_file(path: Path, weights: str) -> Path:
    """Return the file of the named weights in a checkpoint. Raises InputError if there is none.

    "ema" also stands for the only EMA of another name, and for "model" where there is no EMA.
    """
    file = path / f"{weights}.safetensors"
    if not file.is_file() and weights == "ema":
        emas = list(path.glob("ema-*.safetensors")) or [path / "model.safetensors"]
        file = emas[0] if len(emas) == 1 else file
    if not file.is_file():
        held = ", ".join(weights_in(path))
        raise InputError(f"{path} holds no weights {weights!r}", f"it holds {held}")
    return file


def weights_in(path: Path) -> tuple[str, ...]:
    """Return the names of the weights in a checkpoint, () for another folder."""
    if not (path / MANIFEST).is_file():
        return ()
    return tuple(sorted({f.stem for f in path.glob("*.safetensors")} - NOT_WEIGHTS))


def point_to(folder: Path, final: Path) -> None:
    """Name the newest checkpoint in latest.json, for people and scripts; resuming looks itself."""
    write_json(folder / "latest.json", {"checkpoint": final.name}, durable=True)


class Best(Facts):
    """best.json: by which metric the best checkpoints were found, and their values."""

    metric: str
    num: int
    best: dict[Annotated[str, Field(pattern="^step-[0-9]{1,18}$")], float]


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

    A checkpoint that is gone is left out. With `like`, scores by another metric or number of images
    are left out too.
    """
    facts = known_facts(folder / BEST, Best)
    if facts is None or (like and (facts.metric, facts.num) != (like.metric, like.num)):
        return {}
    return {n: v for n, v in facts.best.items() if (folder / n / MANIFEST).is_file()}


def read_best(folder: Path) -> Best | None:
    """Return what best.json says, None without one. Raises InputError for a damaged one."""
    return read_facts(folder / BEST, Best)


def prune(folder: Path, keep: int, newest: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best ones.

    Those after step `newest` are not counted and not removed: they are damaged ones, which a
    resumed run has passed over.
    """
    found = [p for p in checkpoints(folder) if newest is None or int(p.name[5:]) <= newest]
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
    """Remove a checkpoint. Its first step, a renaming, makes it no checkpoint."""
    doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_temporary(folder: Path) -> None:
    """Remove half-written checkpoints; call it only while holding the run's lock."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
