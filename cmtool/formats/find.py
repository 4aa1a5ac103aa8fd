"""From a path to the weights that it stands for, which are identified and hashed at most once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cmtool.formats import diffusers_dir, identify
from cmtool.formats.checkpoints import Damaged, newest, weight_file, whole_files
from cmtool.formats.native import read_about
from cmtool.system.files import file_sha256


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
    if path.is_file() or (path / diffusers_dir.INDEX).is_file():
        return Found(path), []
    if not (path / "checkpoints").is_dir():
        return _in_checkpoint(path, weights), []
    found, complaints = newest(path / "checkpoints", lambda folder: _in_checkpoint(folder, weights))
    if found is None:
        raise _no_checkpoint(path)
    return found, complaints


def kind_of_run(run: Path) -> str | None:
    """Return the kind of model that a run made, None if it has no checkpoint. Hashes nothing."""
    found, _ = newest(run / "checkpoints", lambda folder: _sized(folder, "ema"))
    return found and read_about(found[0].path).get("kind")


def _in_checkpoint(folder: Path, weights: str) -> Found:
    """Return the weights of a checkpoint. Raises Damaged if their hash is not the manifest's."""
    found, hashes = _sized(folder, weights)
    if found.sha256 != hashes.get(found.path.name, found.sha256):
        raise Damaged(f"{found.path} is damaged", "give an earlier checkpoint")
    return found


def _sized(folder: Path, weights: str) -> tuple[Found, dict[str, str]]:
    """Return the weights of a checkpoint, and the hashes of all its files by its manifest.

    Raises Damaged unless all files have their sizes, InputError if these weights are not there.
    """
    if not (folder / "model.safetensors").is_file():
        raise _no_checkpoint(folder)
    hashes = whole_files(folder)
    return Found(weight_file(folder, weights)), hashes


def _no_checkpoint(path: Path) -> Damaged:
    return Damaged(f"no checkpoint in {path}", "give a run folder or a checkpoint folder")
