"""Feature networks, their weights, and protocols: a network and a resize rule under one name.

No file is ever downloaded: an error says what is missing, where it comes from, under which terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.tensors import precise
from cmtool.data.images import from_uint8
from cmtool.errors import InputError, MissingError, UserError, nearest
from cmtool.evaluation.bundled import FEATURES, bundled_extractor, load_features
from cmtool.evaluation.extractor import Extractor, loaded_script
from cmtool.evaluation.inception import WIDTH, clean_resized, folded, tf_resized
from cmtool.evaluation.own import Own, own_extractor
from cmtool.evaluation.takes import Takes
from cmtool.evaluation.vit import clip_image, dinov2
from cmtool.system.devices import autocast, on_device
from cmtool.system.files import file_sha256
from cmtool.weights import PUBLISHED, Published

Resize = Literal["tf", "clean"]
CLEAN_FID_MODES: dict[str, str] = {"clean": "clean", "tf": "legacy_tensorflow"}
VGG_WIDTH = 4096
PIXELS_SIDE = 8
OTHER_FILE = "fetch it again, or give another file with --feature-weights"
AGREEMENT = 1e-3  # how far folded features may be from the file's own, relative to their norm


def pixels_extractor(device: str = "cpu") -> Extractor:
    """Return the features of fd-pixels: an image averaged to 8x8, RGB in [-1, 1], (B, 192).

    They need no weights. They see colours and coarse shapes, and nothing finer.
    """

    def features(images: Tensor) -> Tensor:
        side = PIXELS_SIDE
        return F.adaptive_avg_pool2d(from_uint8(images), side).flatten(1)

    sha256 = hashlib.sha256(f"pixels {PIXELS_SIDE}".encode()).hexdigest()  # there is no file
    return Extractor("pixels-8x8", sha256, 3 * PIXELS_SIDE**2, features, None, 256, device)


def inception_extractor(
    path: Path, sha256: str, *, resize: Resize = "tf", precision: str = "fp32", device: str = "cpu"
) -> Extractor:
    """Return the 2,048 features of the Inception network in a file, after a resize rule.

    `tf` is the rule of NVIDIA's file and TensorFlow's graph, `clean` the rule of clean-fid. The
    file is NVIDIA's TorchScript, or OpenAI's state dict. The norms are folded in, if this gives
    the features of the file's own code, else that code is run. Logits have no bias, as in the
    published scores. Raises MissingError for a file that is damaged or holds another network.
    """
    script, stored = _read_weights(path)
    notes: tuple[str, ...] = ()
    try:
        weight = stored["output.weight"].float()
        network: Any = folded(stored)
        if script is not None and not _agree(network, script):
            raise RuntimeError
    except (KeyError, RuntimeError):
        if "output.weight" not in stored or not hasattr(script, "layers"):
            raise MissingError(f"{path} is no Inception network", OTHER_FILE) from None
        network = script.layers
        notes = ("the folded network does not give what the file's own code gives: using that",)
    network, weight = on_device(network, device).eval(), weight.to(device)
    resized = {"tf": tf_resized, "clean": clean_resized}[resize]

    def features(images: Tensor) -> Tensor:
        x = (resized(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(x.device.type, precision):
            return torch.as_tensor(network(x)).flatten(1).float()

    return Extractor(
        "inception-2015-12-05", sha256, WIDTH, features, lambda f: f.float() @ weight.T,
        8 if device == "cpu" else 64, device, resize, precision, notes, path,
    )  # fmt: skip


def vgg16_extractor(path: Path, sha256: str, *, device: str = "cpu") -> Extractor:
    """Return the 4,096 features of NVIDIA's VGG-16 file, which resizes images itself.

    Kynkaanniemi et al. (2019), StyleGAN2-ADA and ECT take precision and recall of them. Raises
    MissingError for a file that is damaged or holds another network.
    """
    network = _script(path)
    try:
        with torch.no_grad():
            width = network(torch.zeros(1, 3, 32, 32), return_features=True).numel()
    except RuntimeError:
        width = 0
    if width != VGG_WIDTH:
        raise MissingError(f"{path} is no VGG-16 network", OTHER_FILE)

    def features(images: Tensor) -> Tensor:
        return torch.as_tensor(network(images.float(), return_features=True)).flatten(1).float()

    network = network.to(device)
    chunk = 8 if device == "cpu" else 64
    return Extractor("vgg16", sha256, VGG_WIDTH, features, None, chunk, device, "inside", file=path)


VITS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], nn.Module], Takes]] = {
    "dinov2": ("dinov2-vitl14", dinov2, Takes((224, 224), "imagenet", "bicubic")),
    "clip": ("clip-vit-b-32", clip_image, Takes((224, 224), "clip", "crop")),
}
"""The name of a transformer's features, how it is made of a file's tensors, and what it takes."""


def vit_extractor(kind: str, path: Path, sha256: str, *, device: str = "cpu") -> Extractor:
    """Return the class token of a vision transformer in a file.

    `dinov2` resizes and normalises as EDM2's calculate_metrics.py, and takes the 1,024 features
    after the last norm. `clip` does as clean-fid's clip_features.py, and takes the 512 features
    after the projection. Raises MissingError for a file that is damaged or of another network.
    """
    name, make, takes = VITS[kind]
    _, stored = _read_weights(path)
    try:
        network = make(stored)
        width = network(torch.zeros(1, 3, *(takes.size or (224, 224)))).shape[1]
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise MissingError(f"{path} is no network of {kind}", OTHER_FILE) from None
    network = on_device(network, device).eval()

    def features(images: Tensor) -> Tensor:
        return torch.as_tensor(network(takes(images))).float()

    chunk = 8 if device == "cpu" else 64
    return Extractor(name, sha256, width, features, None, chunk, device, str(takes), file=path)


def _read_weights(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the script in a file, None if it is a state dict; and its tensors.

    Raises MissingError for a file that is damaged, and for a table of anything but tensors.
    """
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            script = _script(path)
            return script, {name: t.detach() for name, t in script.state_dict().items()}
    try:
        stored = dict(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception:  # a page, a half download: torch's reader fails in many ways
        raise MissingError(f"{path} is damaged", OTHER_FILE) from None
    for name, tensor in stored.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{path} is not a state dict: its {str(name)[:60]!r} is not a tensor"
            raise MissingError(what, OTHER_FILE)
    return None, stored


def _script(path: Path) -> Any:
    """Return the TorchScript in a file of weights. Raises MissingError for any other file."""
    try:
        return loaded_script(path)
    except RuntimeError:
        raise MissingError(f"{path} is damaged", OTHER_FILE) from None


def _agree(network: nn.Module, script: Any) -> bool:
    """Tell whether the folded network gives the features of the file's own code."""
    images = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32) * 37 % 256
    with torch.no_grad():
        theirs = script(images.clone(), return_features=True).flatten(1).float()
        ours = network((tf_resized(images) - 128) / 128)
    return bool((ours - theirs).norm() <= AGREEMENT * theirs.norm())


class Protocol(NamedTuple):
    """How images become features: the network, and its resize rule.

    `metric` is the only metric that takes them, `shape` (C, H, W) the only shape of the images.
    """

    network: Literal["clip", "digits", "dinov2", "emoji", "inception", "own", "pixels", "vgg16"]
    resize: Resize | None = None
    metric: str | None = None
    shape: tuple[int, int, int] | None = None


PROTOCOLS = {
    "adm": Protocol("inception", "tf"),  # OpenAI's evaluator, as the paper reports
    "clean": Protocol("inception", "clean"),  # clean-fid: bicubic, antialiased
    "clip": Protocol("clip"),  # CLIP's ViT-B/32, as clean-fid and Kynkaanniemi et al. (2023)
    "digits": Protocol("digits", shape=(3, 8, 8)),  # the classifier of the bundled digits, 8x8
    "dinov2": Protocol("dinov2"),  # DINOv2's ViT-L/14, as EDM2 and ECT report FD-DINOv2
    "edm": Protocol("inception", "tf"),  # EDM's fid.py
    "emoji": Protocol("emoji", shape=(3, 32, 32)),  # the classifier of the bundled emoji, 32x32
    "legacy-tf": Protocol("inception", "tf"),  # clean-fid's legacy_tensorflow, as the JAX release
    "own": Protocol("own"),  # a network of the user's own, which --features names
    "pixels": Protocol("pixels"),  # the pixels of the image at 8x8: no weights, and no fine detail
    "vgg16": Protocol("vgg16", metric="pr"),  # improved precision and recall, as ECT and StyleGAN
}
"""`adm`, `edm` and `legacy-tf` make the same features; their references differ."""


class WeightFile(NamedTuple):
    """A published file; `sha256` is None if nobody has published one."""

    name: str
    what: str
    megabytes: int
    sha256: str | None = None
    key: str = "inception"
    """What cmtool weights calls it."""

    @property
    def published(self) -> Published:
        """What cmtool weights knows of it."""
        return PUBLISHED[self.key]

    @property
    def url(self) -> str:
        """Where the file comes from."""
        return self.published.url


def _known(key: str) -> WeightFile:
    row = PUBLISHED[key]
    return WeightFile(row.file, row.what, row.megabytes or 0, row.sha256, key)


INCEPTION, VGG16, DINOV2, CLIP = map(_known, ("inception", "vgg16", "dinov2", "clip"))


def build_extractor(
    protocol: str,
    *,
    file: Path | None = None,
    trust: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    own: Own | None = None,
) -> Extractor:
    """Return the feature network of a protocol.

    `file` holds its weights, if they are not in one of the usual places; `trust` takes a file of
    unknown sha256. `own` is the network of the protocol `own`. Without float64 on the device, it
    computes on the CPU. Raises UserError, and MissingError for the file.
    """
    device = device if precise(device) == torch.float64 else "cpu"
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown --protocol {protocol!r}", nearest(protocol, PROTOCOLS))
    if precision not in ("fp32", "bf16"):
        raise UserError(
            f"unknown --feature-precision {precision!r}", nearest(precision, ["fp32", "bf16"])
        )
    network, resize = PROTOCOLS[protocol][:2]
    if network != "inception" and precision != "fp32":
        raise UserError(f"--feature-precision {precision} of --protocol {protocol}", "leave it out")
    if own is not None and network == "own":
        return own_extractor(own, device)
    if own is not None:
        raise UserError(f"--features with --protocol {protocol}", "leave --protocol out")
    if network == "own":
        raise UserError("--protocol own names no network", "give its file: --features FILE.pt")
    if network in (*FEATURES, "pixels"):
        if file is not None or trust:
            what = f"--feature-weights or --trust with --protocol {protocol}, which needs no file"
            raise UserError(what, "leave them out, or choose another --protocol")
        if network == "pixels":
            return pixels_extractor(device)
        return bundled_extractor(*load_features(network), device)
    wanted = {"inception": INCEPTION, "vgg16": VGG16, "dinov2": DINOV2, "clip": CLIP}[network]
    path = find_file(wanted, file, trust)
    sha256 = file_sha256(path)
    if network in VITS:
        return vit_extractor(network, path, sha256, device=device)
    if resize is None:
        return vgg16_extractor(path, sha256, device=device)
    return inception_extractor(path, sha256, resize=resize, precision=precision, device=device)


def find_file(wanted: WeightFile, given: Path | None = None, trust: bool = False) -> Path:
    """Return a weight file: `given`, else in $CMTOOL_CACHE/weights or torch's cache.

    A file of another sha256 than the published one is used only with `trust`. Files in /tmp, where
    clean-fid leaves its own, are not looked for: anyone may change them. Raises MissingError, which
    says how to get the file.
    """
    if given is not None and not given.is_file():
        raise InputError(f"no such file: {given}", "check --feature-weights")
    cache = Path(os.environ.get("CMTOOL_CACHE") or Path.home() / ".cache" / "cmtool")
    own = [cache / "weights" / wanted.name, Path(torch.hub.get_dir(), "checkpoints", wanted.name)]
    for path in [given] if given is not None else own:
        if not path.is_file():
            continue
        if wanted.sha256 is None:
            if trust:
                return path
            what = f"{path} cannot be checked: no sha256 of {wanted.name} is published"
            raise MissingError(what, "add --trust, if you know where the file comes from")
        if (found := file_sha256(path)) == wanted.sha256 or trust:
            return path
        what = f"{path} is not the published {wanted.name}: its sha256 is {found[:12]}..."
        hint = "give another file with --feature-weights"
        if given is None:
            hint = f"delete it, and fetch {wanted.url} again"
        hint += "; or add --trust to use it as it is"
        raise MissingError(f"{what}, not {wanted.sha256[:12]}...", hint)
    known = "" if wanted.sha256 is None else f"; sha256 {wanted.sha256[:12]}..."
    terms, consent = wanted.published.terms, " --accept-terms" * wanted.published.wants_consent
    hint = f"cmtool weights get {wanted.key}{consent} ({wanted.megabytes} MB{known}; {terms})"
    hint += f", or download {wanted.url} to {own[0]}"
    hint += ", or name the file with --feature-weights"
    coarse = ". Without a file, --protocol pixels gives a coarse number"
    raise MissingError(
        f"{wanted.name} is missing: {wanted.what}", hint + coarse * (wanted.key != "vgg16")
    )
