"""Sets of images: from a name to the features of the set, or to statistics stored in a file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool import __version__
from cmtool.core.rng import keyed_generator
from cmtool.data.archives import NPZ_DAMAGE
from cmtool.data.batches import decoded_ahead
from cmtool.data.datasets import Dataset, listed_images, load_dataset
from cmtool.data.decoding import SUFFIXES
from cmtool.data.images import to_uint8
from cmtool.errors import InputError, UserError
from cmtool.evaluation.extractor import Extractor
from cmtool.evaluation.features import CLEAN_FID_MODES, PROTOCOLS
from cmtool.evaluation.gaussian import Gaussian, GaussianSums
from cmtool.evaluation.metrics import Features, Needs
from cmtool.formats.safe_pickle import NUMPY_TABLE, Array, Dtype, Machine, Refused, expect
from cmtool.system.dist import ALONE, Group
from cmtool.system.files import file_sha256, replacing

MAX_WIDTH = 16_384  # the most features an image may have: their covariance takes 2 GiB
EDM2_KEYS = {"dinov2": "fd_dinov2"}
"""Where EDM2's files of statistics have those of other protocols than FID's."""
MAX_RATIO = 200  # the most that statistics may be compressed: floats hardly are


class Statistics(NamedTuple):
    """What a file of statistics holds.

    `gaussian` is its mu and sigma, if it has them; `num` in it is 0 if the file does not say it.
    `rows` are the features (N, D) themselves, if it has them. `has_images` says whether it holds
    images too. `about` says how cmtool made the file; it is empty for files of other tools.
    `others` are the Gaussians that EDM2's file has for other protocols than those of Inception.
    """

    name: str
    gaussian: Gaussian | None
    rows: Tensor | None
    has_images: bool
    about: dict[str, Any]
    others: Mapping[str, Gaussian] = {}


Opened = Dataset | Statistics
OnProgress = Callable[[str, float, int], None]
"""Called with what is measured, the images that this process has done, and of how many."""
Given = Tensor | str | Path | Sequence[str | Path]
"""Images (N, C, H, W), uint8 or in [-1, 1]; a name or path; or paths of image files."""


class Setup(NamedTuple):
    """How images become features: the same for both sides of a comparison."""

    protocol: str
    extractor: Extractor
    batch: int = 256
    workers: int = 0
    group: Group = ALONE
    progress: OnProgress | None = None
    turn: str = "0"  # name of this pass over a side: processes meet by it


def open_set(given: Given) -> Opened:
    """Return the images, or the statistics. Raises InputError for what cannot be read."""
    if isinstance(given, Tensor):
        if given.ndim != 4:
            raise InputError(f"images of shape {tuple(given.shape)}", "give (N, C, H, W)")
        images = given if given.dtype == torch.uint8 else to_uint8(given)
        return Dataset("tensor", images.cpu(), None, 0)
    paths = [given] if isinstance(given, str | Path) else list(given)
    names = [os.fspath(path) for path in paths]
    if len(names) != 1 or names[0].lower().endswith(SUFFIXES):
        return listed_images(names)
    stored = read_statistics(names[0])
    if stored is not None:
        return stored
    return load_dataset(names[0], in_memory=False, labels="none")


def collect(
    opened: Opened, needs: Needs, setup: Setup, *, num: int | None = None, side: str = "images"
) -> Features:
    """Return the features of a set, or of `num` of its images, the same random ones always.

    What statistics lack is taken from the images in their file. Every process calls this with the
    same arguments. Raises InputError for statistics that cannot be compared or lack what the
    metric needs, UserError for a number of images of statistics.
    """
    if isinstance(opened, Statistics):
        return _from_statistics(opened, needs, setup, num, side)
    index = torch.arange(len(opened))
    if num is not None and num < len(opened):
        index = torch.randperm(len(opened), generator=keyed_generator("subset"))[:num]
    opened.images[index[:1]]  # every process takes the size of all from this image
    parts = index.split(setup.batch)[setup.group.rank :: setup.group.world_size]
    ahead = decoded_ahead(opened.images, parts, setup.workers)
    found = extract(ahead, needs, setup, side, sum(map(len, parts)))
    about = {"name": opened.name, "images": found.num, "fingerprint": found.fingerprint}
    return found._replace(about=about)


def extract(
    batches: Iterable[Tensor], needs: Needs, setup: Setup, side: str, total: int = 0
) -> Features:
    """Return the features of the images (B, C, H, W) uint8 that all processes have together.

    Every process calls this with its own images; no two calls have both `side` and turn alike. If
    only the Gaussian is needed, memory grows by a hash an image. Single features are in the order
    of hashes of their images: what is drawn of them by place is the same for any order, number of
    processes or threads.
    """
    extractor, group = setup.extractor, setup.group
    sums = GaussianSums(extractor.width)
    kept: list[Tensor] = []
    hashes: list[int] = []

    def take_all() -> None:
        for images in _regrouped(batches, extractor.chunk):
            on_cpu = images.cpu()  # before the features are queued, so that it waits for none
            features = extractor(images)
            if needs.gaussian:
                sums.add(features)
            if needs.rows:
                kept.append(features.cpu())
            hashes.extend(map(_hash, on_cpu))
            if setup.progress is not None:
                setup.progress(side, len(hashes), total)
        sums.check()

    group.together(take_all, f"features of {side} {setup.turn}")
    everyone = [mark for part in group.gather(hashes) for mark in part]
    num = len(everyone)
    if num < 2:
        raise InputError(f"{num} image{'s' * (num != 1)} to evaluate", "give 2 or more")
    rows = None
    if needs.rows:
        rows = torch.cat([torch.cat(part) for part in group.gather(kept) if part])
        rows = rows[torch.tensor(sorted(range(num), key=everyone.__getitem__))]
    if needs.gaussian and group.world_size > 1:
        sums.add_others(group.sum)
    gaussian = sums.gaussian() if needs.gaussian else None
    return Features(gaussian, rows, num, f"{sum(everyone) % 2**64:016x}")


def _regrouped(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the same images, in the same order, at least `size` at a time but for the last."""
    held: list[Tensor] = []
    for images in batches:
        held.append(images)
        if sum(map(len, held)) >= size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _hash(image: Tensor) -> int:
    """Return a hash of one image."""
    content = repr(tuple(image.shape)).encode() + image.numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _from_statistics(
    stored: Statistics, needs: Needs, setup: Setup, num: int | None, side: str
) -> Features:
    """Return what a file of statistics has of a set, and take the rest from its images."""
    _check_comparable(stored, setup)
    name, rows = stored.name, stored.rows
    gaussian = stored.others.get(setup.protocol, stored.gaussian)
    if needs.gaussian and gaussian is None and rows is not None:
        sums = GaussianSums(rows.shape[1])
        sums.add(rows)
        gaussian = sums.gaussian()
    missing = Needs(needs.gaussian and gaussian is None, needs.rows and rows is None)
    if num is not None and missing != needs:
        what = f"{num} images of {name}, which holds statistics of all"
        raise UserError(what, "leave the number out")
    if any(missing):
        if not stored.has_images:
            what = (
                f"{name} holds mu and sigma only: KID, precision and recall compare single images"
            )
            hint = "give the images, or statistics of cmtool eval reference --keep-features"
            raise InputError(what, hint)
        images = load_dataset(name, in_memory=False, labels="none")
        found = collect(images, missing, setup, num=num, side=side)
        gaussian, rows = gaussian or found.gaussian, found.rows if rows is None else rows
    single = len(rows) if rows is not None else 0
    num_images = gaussian.num if needs.gaussian and gaussian is not None else single
    about: dict[str, Any] = {"name": name, "sha256": file_sha256(Path(name))}
    if stored.about:
        about |= {"made_from": stored.about.get("data"), "protocol": stored.about.get("protocol")}
    if isinstance(stored.about.get("features"), dict):
        about["precision"] = stored.about["features"].get("precision")
    about["images"] = num_images or None
    if needs.rows and single != num_images:
        about["single_images"] = single
    return Features(gaussian, rows, num_images, "", about)


def _check_comparable(stored: Statistics, setup: Setup) -> None:
    """Raise InputError for statistics of other features than the protocol's."""
    name, protocol, extractor = stored.name, setup.protocol, setup.extractor
    gaussian = stored.others.get(protocol, stored.gaussian)
    tensors = gaussian and gaussian.mean, stored.rows
    for width in (tensor.shape[-1] for tensor in tensors if tensor is not None):
        if width != extractor.width:
            what = f"{name} has {width} features an image, --protocol {protocol} has"
            hint = "give statistics of this protocol, or another --protocol"
            raise InputError(f"{what} {extractor.width}", hint)
    said = stored.about.get("features")
    if isinstance(said, dict):
        made = stored.about.get("protocol")
        is_other = isinstance(made, str) and made in PROTOCOLS and made != protocol
        remedy = f"--protocol {made}" if is_other else "give its --feature-weights"
        remedy = "give its --features and --features-input" if made == "own" else remedy
        for key in ("name", "resize", "sha256", "input"):
            wanted = getattr(extractor, key)
            if said.get(key, "" if key == "input" else None) != wanted:
                what = f"{name} was made with {key} {said.get(key)!r}"
                hint = f"{remedy}, or make it again"
                raise InputError(f"{what}, --protocol {protocol} is {wanted!r}", hint)
        return  # its own word counts, not its name
    for resize, mode in CLEAN_FID_MODES.items():
        if f"_{mode}_" in Path(name).name and extractor.resize != resize:
            what = f"{name} is of clean-fid's mode {mode}"
            hint = f"--protocol {'clean' if resize == 'clean' else 'legacy-tf'}"
            raise InputError(f"{what}, --protocol {protocol} resizes by another rule", hint)


def save_features(path: Path, found: Features, setup: Setup) -> None:
    """Write the Gaussian of a set, and its single features if they were kept, as a reference."""
    assert found.gaussian is not None
    about = {
        "data": dict(found.about), "protocol": setup.protocol,
        "features": setup.extractor.facts, "cmtool": __version__,
    }  # fmt: skip
    write_statistics(path, found.gaussian, found.rows, about)


def read_statistics(name: str | Path) -> Statistics | None:
    """Return the statistics in an npz or pickle; None for a file that holds none.

    It reads `mu` and `sigma` (EDM, clean-fid and ADM), `feats` (clean-fid, for KID), and pickles
    of EDM2, which are not executed. Raises InputError for a file that is damaged or not finite.
    """
    path = Path(name)
    ending = path.suffix.lower()
    if not path.is_file() or ending not in (".npz", ".pkl"):
        return None
    arrays = _npz_arrays(path) if ending == ".npz" else _pickled_arrays(path)
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
    mean, covariance = _pair(path, arrays)
    if rows is not None and rows.shape[1] != len(mean):
        what = f"{path}: mu has {len(mean)} features, feats {rows.shape[1]}"
        raise InputError(what, "make the file again")
    num = arrays.get("num", np.array(0 if rows is None else len(rows)))
    if num.ndim != 0 or num.dtype.kind not in "iu" or num < 0:
        raise InputError(f"{path}: num is {str(num)[:40]}", "it must be the number of images")
    gaussian = Gaussian(mean, covariance, int(num))
    others = _others(path, arrays)
    return Statistics(os.fspath(name), gaussian, rows, "arr_0" in arrays, about, others)


def _pair(path: Path, arrays: Mapping[str, Any], start: str = "") -> tuple[Tensor, Tensor]:
    """Return mu (D,) and sigma (D, D) of a file; `start` is how their names begin.

    Raises InputError unless both are there, finite and of one width.
    """
    for key in (f"{start}mu", f"{start}sigma"):
        if key not in arrays:
            raise InputError(f"{path} has no {key}", "make it again: cmtool eval reference")
    mean = _finite(path, f"{start}mu", arrays[f"{start}mu"], 1)
    covariance = _finite(path, f"{start}sigma", arrays[f"{start}sigma"], 2)
    if covariance.shape != (len(mean), len(mean)):
        shape = tuple(covariance.shape)
        what = f"{path}: {start}mu has {len(mean)} features, {start}sigma is {shape}"
        raise InputError(what, "fetch it again, or make it: cmtool eval reference")
    return mean, covariance


def _others(path: Path, arrays: Mapping[str, Any]) -> dict[str, Gaussian]:
    """Return the Gaussians of other protocols, which EDM2's file has beside that of FID."""
    starts = {protocol: f"{protocol} " for protocol in EDM2_KEYS}
    return {
        protocol: Gaussian(*_pair(path, arrays, start), 0)
        for protocol, start in starts.items()
        if {f"{start}mu", f"{start}sigma"} & arrays.keys()
    }


def write_statistics(
    path: Path, gaussian: Gaussian, rows: Tensor | None, about: Mapping[str, Any]
) -> None:
    """Write an npz that EDM's and clean-fid's tools read too; rows are their `feats`, for KID."""
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
    except NPZ_DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}", "fetch or make it again") from None


def _pickled_arrays(path: Path) -> dict[str, Any]:
    """Return mu and sigma of a pickle, at its top or under `fid`. Nothing in it is executed.

    Those of other protocols have its name before theirs.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as opened:
            table = expect(Machine(size, NUMPY_TABLE).run(opened, size), dict)
        parts = {"": expect(table.get("fid", table), dict)}
        parts |= {f"{p} ": expect(table[k], dict) for p, k in EDM2_KEYS.items() if k in table}
        names = ("mu", "sigma")
        return {f"{p}{n}": _array(part[n]) for p, part in parts.items() for n in names if n in part}
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
