"""clean-fid beside cmtool: the same images, and the same weight file, through its code."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import MissingError, UserError
from cmtool.evaluation.extractor import Extractor
from cmtool.evaluation.features import CLEAN_FID_MODES, INCEPTION, PROTOCOLS
from cmtool.evaluation.gaussian import Gaussian, frechet_distance


def check_usage(metric: str, protocol: str, runs: int) -> None:
    """Raise UserError for a measurement that clean-fid cannot repeat."""
    if metric != "fid":
        raise UserError(f"--cross-check of {metric}", "it is for fid")
    if PROTOCOLS[protocol].network != "inception":
        what = f"--cross-check: clean-fid does not have the features of --protocol {protocol}"
        good = [name for name, row in PROTOCOLS.items() if row.network == "inception"]
        raise UserError(what, f"choose --protocol {', '.join(good)}")
    if runs > 1:
        what = f"--cross-check measures once, and --runs asks for {runs} measurements"
        raise UserError(what, "leave --runs or --cross-check out")


def clean_fid_extractor(ours: Extractor) -> Extractor:
    """Return clean-fid's own features and resize, with the weight file of `ours`.

    Raises MissingError for a file that it cannot read: it knows NVIDIA's TorchScript only.
    """
    assert ours.file is not None
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from cleanfid.inception_torchscript import InceptionV3W  # type: ignore[import-untyped]
        from cleanfid.resize import build_resizer  # type: ignore[import-untyped]

        mode = CLEAN_FID_MODES[ours.resize]
        (Path(folder) / INCEPTION.name).symlink_to(ours.file.resolve())  # the name it looks for
        inside = mode == "legacy_tensorflow"
        try:
            network = InceptionV3W(folder, download=False, resize_inside=inside).to(ours.device)
        except RuntimeError:
            hint = f"give NVIDIA's file: {INCEPTION.url}"
            raise MissingError(f"clean-fid cannot read {ours.file}", hint) from None
    resize = build_resizer(mode)

    def features(images: Tensor) -> Tensor:
        with _quiet():
            pictures = images.permute(0, 2, 3, 1).cpu().numpy()
            resized = np.stack([resize(picture) for picture in pictures])
            batch = torch.from_numpy(resized).permute(0, 3, 1, 2).float()
            return torch.as_tensor(network(batch.to(ours.device))).float()

    return ours._replace(network=features, logits=None, precision="fp32")


def compare(ours: Extractor, value: float, made: Gaussian, reference: Gaussian) -> dict[str, Any]:
    """Return clean-fid's distance beside our `value`, from Gaussians of clean-fid's features.

    SciPy 1.18 takes away what clean-fid 0.1.35 calls. Where its distance fails, ours is used.
    """
    sides = [t.numpy() for side in (made, reference) for t in (side.mean, side.covariance)]
    try:
        with _quiet():
            from cleanfid.fid import frechet_distance as theirs  # type: ignore[import-untyped]

            found, distance = float(theirs(*sides)), "clean-fid's"
    except (TypeError, ValueError, ImportError, AttributeError, np.linalg.LinAlgError):
        found, distance = frechet_distance(made, reference), "cmtool's"
    tool, mode = f"clean-fid {version('clean-fid')}", CLEAN_FID_MODES[ours.resize]
    about = {"tool": tool, "mode": mode, "value": found}
    return {**about, "distance": distance, "difference": found - value}


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings of clean-fid, and what it prints: stdout is for results."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
