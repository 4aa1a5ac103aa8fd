"""Protocols: a feature network and a resize rule under one name, and their published weights.

No file is ever downloaded: an error says what is missing, where it comes from, under which terms.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cmtool.errors import InputError, MissingError, UserError, nearest
from cmtool.evaluation.features import (
    Extractor,
    Resize,
    digits_extractor,
    inception_extractor,
    load_digits_features,
    vgg16_extractor,
)
from cmtool.system.files import file_sha256

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
TERMS = "NVIDIA's terms for research"


class Protocol(NamedTuple):
    """How images become features: the network, and its resize rule.

    `metric` is the only metric that takes these features, `shape` (C, H, W) the only shape of the
    images that they are made of.
    """

    network: Literal["digits", "inception", "vgg16"]
    resize: Resize | None = None
    metric: str | None = None
    shape: tuple[int, int, int] | None = None


PROTOCOLS = {
    "adm": Protocol("inception", "tf"),  # OpenAI's evaluator, as the paper reports
    "clean": Protocol("inception", "clean"),  # clean-fid: bicubic, antialiased
    "digits": Protocol("digits", shape=(3, 8, 8)),  # the classifier of the bundled digits, 8x8
    "edm": Protocol("inception", "tf"),  # EDM's fid.py
    "legacy-tf": Protocol("inception", "tf"),  # clean-fid's legacy_tensorflow, as the JAX release
    "vgg16": Protocol("vgg16", metric="pr"),  # improved precision and recall, as ECT and StyleGAN
}
"""`adm`, `edm` and `legacy-tf` make the same features; their references differ."""


class WeightFile(NamedTuple):
    """A published file; `sha256` is None if nobody has published one."""

    name: str
    what: str
    megabytes: int
    sha256: str | None = None

    @property
    def url(self) -> str:
        """Where the file comes from."""
        return f"{NVIDIA}/{self.name}"


INCEPTION = WeightFile(
    "inception-2015-12-05.pt", "Inception v3 of 2015, the feature network of FID", 96,
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)  # fmt: skip
VGG16 = WeightFile("vgg16.pt", "VGG-16, the feature network of improved precision and recall", 553)


def build_extractor(
    protocol: str,
    *,
    file: Path | None = None,
    trust: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
) -> Extractor:
    """Return the feature network of a protocol.

    `file` holds its weights, if they are not in one of the usual places; `trust` takes a file of
    unknown sha256. Raises UserError, and MissingError for the file.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol!r}", nearest(protocol, PROTOCOLS))
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--feature-precision {precision!r}", nearest(precision, ["fp32", "bf16"]))
    network, resize, *_ = PROTOCOLS[protocol]
    if network != "inception" and precision != "fp32":
        raise UserError(f"--feature-precision {precision} of --protocol {protocol}", "leave it out")
    if network == "digits":
        if file is None and not trust:
            return digits_extractor(*load_digits_features(), device)
        raise UserError(
            "--feature-weights or --trust with --protocol digits, whose features are bundled",
            "leave them out, or choose another --protocol",
        )
    path = find_file(VGG16 if network == "vgg16" else INCEPTION, file, trust)
    sha256 = file_sha256(path)
    if resize is None:
        return vgg16_extractor(path, sha256, device=device)
    return inception_extractor(path, sha256, resize=resize, precision=precision, device=device)


def find_file(wanted: WeightFile, given: Path | None = None, trust: bool = False) -> Path:
    """Return a weight file: `given`, else in $CMTOOL_CACHE/weights, torch's cache or /tmp.

    A file of another sha256 than the published one is used only with `trust`, and never from /tmp.
    Raises MissingError, which says how to get the file.
    """
    if given is not None and not given.is_file():
        raise InputError(f"no such file: {given}", "check --feature-weights")
    shared = Path(tempfile.gettempdir()) / wanted.name
    cache = Path(os.environ.get("CMTOOL_CACHE") or Path.home() / ".cache" / "cmtool")
    own = [cache / "weights" / wanted.name, Path(torch.hub.get_dir(), "checkpoints", wanted.name)]
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
            + "; or add --trust to use it as it is" * (path != shared),
        )
    known = "" if wanted.sha256 is None else f", sha256 {wanted.sha256[:12]}..."
    raise MissingError(
        f"{wanted.name} is not there: {wanted.what}",
        f"put it at {own[0]}, or give --feature-weights FILE; it comes from {wanted.url}"
        f" ({wanted.megabytes} MB{known}; {TERMS})",
    )
