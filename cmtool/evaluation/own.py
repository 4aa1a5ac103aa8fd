"""Features of the user's own: a TorchScript file, images in and features out.

Such a file is code, which runs when it is loaded. So it is loaded only if the user says so, or
names its sha256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.errors import InputError, MissingError
from cmtool.evaluation.extractor import Extractor, loaded_script
from cmtool.evaluation.takes import Takes, parsed
from cmtool.system.files import file_sha256

OPTION = "--features-input"
EXTRA = "input"
"""Extra file, or attribute, of a TorchScript file that says what the network takes."""
PROBE = (64, 64)


class Own(NamedTuple):
    """A feature network of the user's own: its file, and what it takes, as in "224,imagenet".

    It is loaded if it is trusted, or has the sha256. `size` is that of the images, (H, W), or () if
    it is not known: the network is tried on an image of this size.
    """

    file: Path
    input: str = ""
    trust: bool = False
    sha256: str | None = None
    size: tuple[int, ...] = ()


def own_extractor(own: Own, device: str = "cpu") -> Extractor:
    """Return the features of the network in a file of the user's.

    Raises InputError for a file that is not there, holds no TorchScript or does not make features,
    MissingError for one that may not be loaded, UserError for an input that is none.
    """
    path, sha256 = own.file, checked_sha256(own)
    usual = Takes()
    script, said = _read(path)
    takes = parsed(own.input, parsed(said, usual, f"{path}: its {EXTRA}"), OPTION)
    network = script.to(device)

    def features(images: Tensor) -> Tensor:
        # TorchScript's optimiser would change the last digits from the second call on
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            found = network(takes(images))
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise _unfit(path, takes, f"of {len(images)} images it makes {shape}")
        return found.flatten(1).float()

    size = takes.size or own.size or PROBE
    try:
        with torch.no_grad():
            width = features(torch.zeros(2, 3, *size, dtype=torch.uint8, device=device)).shape[1]
    except (RuntimeError, torch.jit.Error) as error:
        reason = str(error).strip().splitlines()[-1]
        shown = f"{size[1]}x{size[0]}"
        raise _unfit(path, takes, f"an image of {shown} ends in an error: {reason}") from None
    unsaid = not own.input and not said
    note = f"{path} does not say what it takes: it gets {takes}. {OPTION} 224,imagenet says it"
    return Extractor(
        "own", sha256, width, features, lambda rows: rows, 32 if device == "cpu" else 64, device,
        takes.resize if takes.size else "none", notes=(note,) if unsaid else (), file=path,
        input=str(takes),
    )  # fmt: skip


def label(name: str, own: Own | None) -> str:
    """Return the name of a score, which tells features of the user's own from others of theirs."""
    if own is None:
        return name
    digest = hashlib.sha256(f"{checked_sha256(own)} {own.input}".encode()).hexdigest()
    return f"{'fd' if name == 'fid' else name.removesuffix('-own')}-own-{digest[:8]}"


def checked_sha256(own: Own) -> str:
    """Return the sha256 of a file that may be loaded. Raises InputError or MissingError."""
    path = own.file
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check --features")
    found = file_sha256(path)
    if own.sha256 is not None and own.sha256.lower() != found:
        what = f"{path} is another file than is named: its sha256 is {found[:12]}..."
        raise MissingError(what, f"give the file with {own.sha256[:12]}..., or leave it out")
    if own.sha256 is None and not own.trust:
        what = f"{path} is code, which runs when it is loaded"
        hint = "add --trust, if you know where the file comes from"
        raise MissingError(what, f'{hint}; a preset says sha256 = "{found}"')
    return found


def _read(path: Path) -> tuple[Any, str]:
    """Return the script in a file, and what it says of its input, "" for nothing.

    Raises InputError for a file of anything else.
    """
    extra = {EXTRA: ""}
    try:
        script = loaded_script(path, extra)
    except RuntimeError:
        hint = "save the network with torch.jit.save"
        raise InputError(f"{path} is not a TorchScript file", hint) from None
    said: Any = extra[EXTRA] or getattr(script, EXTRA, "")
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    return script, said if isinstance(said, str) else ""


def _unfit(path: Path, takes: Takes, why: str) -> InputError:
    """Return the error for a file that does not make features of images."""
    hint = f"say what the network takes, for example {OPTION} 224,imagenet"
    return InputError(f"{path} gives no features for {takes}: {why}", hint)
