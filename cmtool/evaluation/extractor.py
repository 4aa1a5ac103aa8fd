"""Extractors: a feature network with all that its numbers depend on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.core.tensors import chunks_of, to_device
from cmtool.errors import InputError
from cmtool.system.devices import full_float32


class Extractor(NamedTuple):
    """A feature network: from images (B, 3, H, W) uint8 to features (B, width) float32.

    A number depends on the network, the very file of its weights, and how images are resized.
    `logits` makes class logits of features, if there are any; `file` is None for bundled weights.
    `input` says what a network of the user's own takes.
    """

    name: str
    sha256: str
    width: int
    network: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None
    chunk: int
    device: str
    resize: str = "none"
    precision: str = "fp32"
    notes: tuple[str, ...] = ()
    file: Path | None = None
    input: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What the JSON object says of the features."""
        keys = (
            "name",
            "sha256",
            "width",
            "resize",
            "precision",
            *(["input"] if self.input else []),
        )
        return {key: getattr(self, key) for key in keys}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, width) of images (B, 3 or 1, H, W) uint8, on the device.

        The network always sees `chunk` images, so that the features of an image do not depend on
        the others. It never computes in TF32, which would make another number on a GPU. Raises
        InputError for images that are neither RGB nor grey.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            raise InputError(f"images of {images.shape[1]} channels", "give RGB or grey ones")
        with full_float32():
            chunks = chunks_of(images, self.chunk)
            parts = [self.network(to_device(part, self.device)) for part in chunks]
        return torch.cat(parts)[: len(images)]


def loaded_script(path: Path, extra: dict[str, Any] | None = None) -> Any:
    """Return the TorchScript in a file, in eval mode: loading runs what is in it.

    The values of `extra` become those of the file's extra files of these names. Raises RuntimeError
    for any other file.
    """
    with warnings.catch_warnings():  # TorchScript is deprecated, but the files are in it
        warnings.simplefilter("ignore")
        return torch.jit.load(path, "cpu", _extra_files=extra).eval()
