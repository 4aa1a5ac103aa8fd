"""Statistics of a reference set in files: our own, clean-fid's, EDM's and ADM's."""

from __future__ import annotations

import json
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import InputError
from cmtool.evaluation.gaussian import Gaussian
from cmtool.formats.safe_pickle import NUMPY_TABLE, Array, Dtype, Machine, Refused, expect
from cmtool.system.files import replacing

MAX_WIDTH = 16_384
"""The most features an image may have: their covariance takes 2 GiB."""
MAX_RATIO = 200
"""The most that statistics may be compressed: floats hardly are."""


class Statistics(NamedTuple):
    """What a file of statistics holds.

    `gaussian` is its mu and sigma, if it has them; `num` in it is 0 if the file does not say it.
    `rows` are the features (N, D) themselves, if it has them. `has_images` says whether it holds
    images too. `about` says how cmtool made the file; it is empty for files of other tools.
    """

    name: str
    gaussian: Gaussian | None
    rows: Tensor | None
    has_images: bool
    about: dict[str, Any]


def read_statistics(name: str | Path) -> Statistics | None:
    """Return the statistics in an npz or pickle; None for a file that holds none.

    It reads `mu` and `sigma` (EDM, clean-fid and ADM), `feats` (clean-fid, for KID), and pickles
    of EDM2, which are not executed. Raises InputError for a file that is damaged or not finite.
    """
    path = Path(name)
    if not path.is_file() or path.suffix not in (".npz", ".pkl"):
        return None
    arrays = _npz_arrays(path) if path.suffix == ".npz" else _pickled_arrays(path)
    if not arrays.keys() & {"mu", "sigma", "feats"}:
        return None
    about: dict[str, Any] = {}
    if "about" in arrays:
        try:
            about = dict(json.loads(str(arrays["about"])))
        except (ValueError, TypeError, RecursionError):
            what = f"{path}: its `about` is no JSON object"
            raise InputError(what, "make the file again") from None
    rows = _finite(path, "feats", arrays["feats"], 2).float() if "feats" in arrays else None
    if not {"mu", "sigma"} & arrays.keys():
        return Statistics(os.fspath(name), None, rows, "arr_0" in arrays, about)
    for key in ("mu", "sigma"):
        if key not in arrays:
            raise InputError(f"{path} has no {key}", "make it again: cmtool eval reference")
    mean = _finite(path, "mu", arrays["mu"], 1)
    covariance = _finite(path, "sigma", arrays["sigma"], 2)
    if rows is not None and rows.shape[1] != len(mean):
        what = f"{path}: mu has {len(mean)} features, feats {rows.shape[1]}"
        raise InputError(what, "make the file again")
    if covariance.shape != (len(mean), len(mean)):
        what = f"{path}: mu has {len(mean)} features, sigma is {tuple(covariance.shape)}"
        raise InputError(what, "fetch it again, or make it: cmtool eval reference")
    num = arrays.get("num", np.array(0 if rows is None else len(rows)))
    if num.ndim != 0 or num.dtype.kind not in "iu" or num < 0:
        raise InputError(f"{path}: num is {str(num)[:40]}", "it must be the number of images")
    gaussian = Gaussian(mean, covariance, int(num))
    return Statistics(os.fspath(name), gaussian, rows, "arr_0" in arrays, about)


def write_statistics(
    path: Path, gaussian: Gaussian, rows: Tensor | None, about: Mapping[str, Any]
) -> None:
    """Write statistics as an npz that EDM's and clean-fid's tools read too.

    `rows`, if given, are kept as `feats`, for KID and precision and recall; `about` says how the
    statistics were made. Raises ResourceError.
    """
    mean, covariance, num = gaussian
    arrays: dict[str, Any] = {"mu": mean.numpy(), "sigma": covariance.numpy(), "num": np.array(num)}
    arrays["about"] = np.array(json.dumps(dict(about)))
    if rows is not None:
        arrays["feats"] = rows.float().numpy()
    with replacing(path) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **arrays)


def _npz_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of statistics, and `arr_0` as None if it is there."""
    wanted = {"mu", "sigma", "feats", "num", "about"}
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[str, Any] = {"arr_0": None} if "arr_0.npy" in archive.namelist() else {}
            for name in wanted & {n.removesuffix(".npy") for n in archive.namelist()}:
                info = archive.getinfo(f"{name}.npy")
                packed, size = info.compress_size, info.file_size
                if size > MAX_RATIO * max(packed, 1 << 16):
                    raise ValueError(f"{name} unpacks from {packed:,} to {size:,} bytes")
                with archive.open(f"{name}.npy") as member:
                    found[name] = np.lib.format.read_array(member, allow_pickle=False)
            return found
    except (
        ValueError, OSError, EOFError, KeyError, RuntimeError, MemoryError, NotImplementedError,
        struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(f"{path} cannot be read: {error}", "fetch or make it again") from None


def _pickled_arrays(path: Path) -> dict[str, Any]:
    """Return mu and sigma of a pickle, at its top or under `fid`. Nothing in it is executed."""
    size = path.stat().st_size
    try:
        with path.open("rb") as opened:
            table = expect(Machine(size, NUMPY_TABLE).run(opened, size), dict)
        table = expect(table.get("fid", table), dict)
        return {name: _array(table[name]) for name in ("mu", "sigma") if name in table}
    except Refused as error:
        what = f"{path} is no pickle of statistics: {error}"
        raise InputError(what, "it was not run: give an npz") from None
    except (ValueError, IndexError, KeyError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "fetch or make it again") from None


def _array(stored: Any) -> np.ndarray[Any, Any]:
    """Return the float array that a pickle describes."""
    match stored.state if isinstance(stored, Array) else None:
        case (_, tuple(shape), Dtype("f4" | "f8" as code), bool(fortran), bytes(raw)):
            whole = all(type(side) is int and side >= 0 for side in shape)
            if whole and len(raw) == int(np.prod(shape, dtype=object)) * int(code[1]):
                flat = np.frombuffer(raw, f"<{code}")
                return flat.reshape(shape, order="F" if fortran else "C")
    raise Refused("mu or sigma is no array of floats")


def _finite(path: Path, name: str, array: Any, ndim: int) -> Tensor:
    """Return an array as float64. Raises InputError for one of another form, or not finite."""
    if array.dtype.kind != "f" or array.ndim != ndim or not 0 < array.shape[-1] <= MAX_WIDTH:
        what = f"{path}: {name} is {array.dtype} {array.shape}"
        raise InputError(what, "it must hold statistics of features")
    tensor = torch.from_numpy(np.array(array, np.float64, order="C"))
    if not bool(torch.isfinite(tensor.float()).all()):  # what float32 cannot hold is not, either
        what = f"{path}: {name} has values that are not finite"
        raise InputError(what, "it was made of broken images: make it again")
    return tensor
