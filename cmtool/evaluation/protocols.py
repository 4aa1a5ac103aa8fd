"""Protocols: a feature network and a resize rule under one name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from cmtool.errors import UserError, nearest
from cmtool.evaluation.features import (
    Extractor,
    Resize,
    digits_extractor,
    inception_extractor,
    load_digits_features,
    vgg16_extractor,
)
from cmtool.evaluation.weights import INCEPTION, VGG16, find_file
from cmtool.system.files import file_sha256


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
    if network == "digits" and (file is not None or trust):
        raise UserError(
            "--feature-weights or --trust with --protocol digits, whose features are bundled",
            "leave them out, or choose another --protocol",
        )
    if network == "digits":
        return digits_extractor(*load_digits_features(), device)
    path = find_file(VGG16 if network == "vgg16" else INCEPTION, file, trust)
    sha256 = file_sha256(path)
    if resize is None:
        return vgg16_extractor(path, sha256, device=device)
    return inception_extractor(path, sha256, resize=resize, precision=precision, device=device)
