"""Published weight files that evaluation needs: where they are looked for, and their hashes.

None is ever downloaded: an error says what is missing, where it comes from and under which terms.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from cmtool.errors import InputError, MissingError
from cmtool.system.files import file_sha256


class WeightFile(NamedTuple):
    """A published file; `sha256` is None if nobody has published one."""

    name: str
    what: str
    megabytes: int
    sha256: str | None
    url: str
    terms: str


INCEPTION = WeightFile(
    name="inception-2015-12-05.pt",
    what="Inception v3 of 2015, the feature network of FID",
    megabytes=96,
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    terms="NVIDIA's terms for research",
)
VGG16 = WeightFile(
    name="vgg16.pt",
    what="VGG-16, the feature network of improved precision and recall",
    megabytes=553,
    sha256=None,
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt",
    terms="NVIDIA's terms for research",
)


def cache_folder() -> Path:
    """Return the folder of cmtool's own copies: $CMTOOL_CACHE/weights, ~/.cache/cmtool/weights."""
    root = os.environ.get("CMTOOL_CACHE") or Path.home() / ".cache" / "cmtool"
    return Path(root) / "weights"


def find_file(wanted: WeightFile, given: Path | None = None, trust: bool = False) -> Path:
    """Return the path of a weight file: `given`, else in cmtool's cache, torch's or /tmp.

    A file of another sha256 than the published one is used only with `trust`, and never from /tmp.
    Raises MissingError, which says how to get the file.
    """
    if given is not None and not given.is_file():
        raise InputError(f"no such file: {given}", "check --feature-weights")
    shared = Path(tempfile.gettempdir()) / wanted.name
    own = [cache_folder() / wanted.name, Path(torch.hub.get_dir()) / "checkpoints" / wanted.name]
    for path in [given] if given is not None else [*own, shared]:
        if not path.is_file():
            continue
        if wanted.sha256 is None:
            if trust:
                return path
            raise MissingError(
                f"{path} cannot be checked: no sha256 of {wanted.name} is published",
                "add --trust, if you know where the file comes from",
            )
        if (found := file_sha256(path)) == wanted.sha256 or (trust and path != shared):
            return path
        raise MissingError(
            f"{path} is not the published {wanted.name}: its sha256 is {found[:12]}...,"
            f" not {wanted.sha256[:12]}...",
            f"delete it, and fetch {wanted.url} again"
            + ("" if path == shared else "; or add --trust to use it as it is"),
        )
    known = "" if wanted.sha256 is None else f", sha256 {wanted.sha256[:12]}..."
    raise MissingError(
        f"{wanted.name} is not there: {wanted.what}",
        f"put it at {own[0]}, or give --feature-weights FILE; it comes from {wanted.url}"
        f" ({wanted.megabytes} MB{known}; {wanted.terms})",
    )
