"""Feature networks, their weights, and protocols: a network and a resize rule under one name.

No file is ever downloaded: an error says what is missing, where it comes from, under which terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.core.tensors import chunks_of
from cmtool.data.images import from_uint8
from cmtool.errors import InputError, MissingError, UserError, nearest
from cmtool.evaluation.inception import WIDTH, clean_resized, folded, tf_resized
from cmtool.formats.native import read_weights
from cmtool.models import ASSETS
from cmtool.system.devices import autocast, full_float32, on_device
from cmtool.system.files import file_sha256

Resize = Literal["tf", "clean"]
CLEAN_FID_MODES: dict[str, str] = {"clean": "clean", "tf": "legacy_tensorflow"}
VGG_WIDTH = 4096
PIXELS_SIDE = 8
AGREEMENT = 1e-3  # how far folded features may be from the file's own, relative to their norm
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
TERMS = "NVIDIA's terms for research"


class Extractor(NamedTuple):
    """A feature network: from images (B, 3, H, W) uint8 to features (B, width) float32.

    A number depends on the network, the very file of its weights, and how images are resized.
    `logits` makes class logits of features, if there are any; `file` is None for bundled weights.
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

    @property
    def facts(self) -> dict[str, Any]:
        """What the JSON object says of the features."""
        keys = ("name", "sha256", "width", "resize", "precision")
        return {key: getattr(self, key) for key in keys}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, width) of images (B, 3 or 1, H, W) uint8, on the device.

        The network always sees `chunk` images, so that the features of an image do not depend on
        the others. Raises InputError for images that are neither RGB nor grey.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            raise InputError(f"images of {images.shape[1]} channels", "give RGB or grey ones")
        parts = [self.network(part.to(self.device)) for part in chunks_of(images, self.chunk)]
        return torch.cat(parts)[: len(images)]


class DigitsFeatures(nn.Module):
    """The classifier whose last hidden layer is the feature space of `fd-digits`.

    It learned the class and the colours of paper and ink together, so that the features see both
    shape and colour. From features, `classes` makes logits, `colours` 6 values in [-1, 1].
    """

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__()
        convs = (nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((3, 24, 1), (24, 48, 2), (48, 64, 1)))
        layers: list[nn.Module] = [layer for conv in convs for layer in (conv, nn.SiLU())]
        layers += nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, self.WIDTH), nn.SiLU()
        self.layers = nn.Sequential(*layers)
        self.classes = nn.Linear(self.WIDTH, 10)
        self.colours = nn.Linear(self.WIDTH, 6)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 64) of images (B, 3, 8, 8) in [-1, 1]. Raises InputError."""
        if images.shape[1:] != (3, 8, 8):
            c, h, w = images.shape[1:]
            what = f"fd-digits needs RGB images of 8x8, not {w}x{h} with {c} channels"
            hint = "it compares with the bundled digits only: give --reference, or --protocol edm"
            raise InputError(what, hint)
        features: Tensor = self.layers(images)
        return features


def digits_extractor(network: DigitsFeatures, sha256: str, device: str = "cpu") -> Extractor:
    """Return the features of fd-digits."""
    network = network.to(device).eval()
    return Extractor(
        "digits-features", sha256, network.WIDTH, lambda images: network(from_uint8(images)),
        network.classes, 256, device,
    )  # fmt: skip


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
    script, stored = _read_inception(path)
    notes: tuple[str, ...] = ()
    try:
        weight = stored["output.weight"].float()
        network: Any = folded(stored)
        if script is not None and not _agree(network, script):
            raise RuntimeError
    except (KeyError, RuntimeError):
        if "output.weight" not in stored or not hasattr(script, "layers"):
            raise MissingError(f"{path} is no Inception network", "delete it") from None
        network = script.layers
        notes = ("the folded network does not give what the file's own code gives: using that",)
    network, weight = on_device(network, device).eval(), weight.to(device)
    resized = {"tf": tf_resized, "clean": clean_resized}[resize]

    def features(images: Tensor) -> Tensor:
        x = (resized(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        with full_float32(), autocast(x.device.type, precision):
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
    network = _loaded_script(path)
    try:
        with torch.no_grad():
            width = network(torch.zeros(1, 3, 32, 32), return_features=True).numel()
    except RuntimeError:
        width = 0
    if width != VGG_WIDTH:
        raise MissingError(f"{path} is no VGG-16 network", "delete it")

    def features(images: Tensor) -> Tensor:
        return torch.as_tensor(network(images.float(), return_features=True)).flatten(1).float()

    network = network.to(device)
    chunk = 8 if device == "cpu" else 64
    return Extractor("vgg16", sha256, VGG_WIDTH, features, None, chunk, device, "inside", file=path)


def _read_inception(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the script in a file, None if it is a state dict; and its tensors."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            script = _loaded_script(path)
            return script, {name: t.detach() for name, t in script.state_dict().items()}
    try:
        return None, dict(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception:  # a page, a half download: torch's reader fails in many ways
        raise MissingError(f"{path} is damaged", "delete it, and fetch it again") from None


def _loaded_script(path: Path) -> Any:
    with warnings.catch_warnings():  # TorchScript is deprecated, but the files are in it
        warnings.simplefilter("ignore")
        try:
            return torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError:
            raise MissingError(f"{path} is damaged", "delete it, and fetch it again") from None


def _agree(network: nn.Module, script: Any) -> bool:
    """Tell whether the folded network gives the features of the file's own code."""
    images = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32) * 37 % 256
    with torch.no_grad():
        theirs = script(images.clone(), return_features=True).flatten(1).float()
        ours = network((tf_resized(images) - 128) / 128)
    return bool((ours - theirs).norm() <= AGREEMENT * theirs.norm())


def load_digits_features() -> tuple[DigitsFeatures, str]:
    """Return the bundled feature network of fd-digits, and the hash of its file."""
    file = ASSETS / "digits-features.safetensors"
    network = DigitsFeatures().eval().requires_grad_(False)
    network.load_state_dict({name: t.float() for name, t in read_weights(file).items()})
    return network, file_sha256(file)


class Protocol(NamedTuple):
    """How images become features: the network, and its resize rule.

    `metric` is the only metric that takes them, `shape` (C, H, W) the only shape of the images.
    """

    network: Literal["digits", "inception", "pixels", "vgg16"]
    resize: Resize | None = None
    metric: str | None = None
    shape: tuple[int, int, int] | None = None


PROTOCOLS = {
    "adm": Protocol("inception", "tf"),  # OpenAI's evaluator, as the paper reports
    "clean": Protocol("inception", "clean"),  # clean-fid: bicubic, antialiased
    "digits": Protocol("digits", shape=(3, 8, 8)),  # the classifier of the bundled digits, 8x8
    "edm": Protocol("inception", "tf"),  # EDM's fid.py
    "legacy-tf": Protocol("inception", "tf"),  # clean-fid's legacy_tensorflow, as the JAX release
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
        raise UserError(f"unknown --protocol {protocol!r}", nearest(protocol, PROTOCOLS))
    if precision not in ("fp32", "bf16"):
        raise UserError(
            f"unknown --feature-precision {precision!r}", nearest(precision, ["fp32", "bf16"])
        )
    network, resize = PROTOCOLS[protocol][:2]
    if network != "inception" and precision != "fp32":
        raise UserError(f"--feature-precision {precision} of --protocol {protocol}", "leave it out")
    if network in ("digits", "pixels"):
        if file is not None or trust:
            what = f"--feature-weights or --trust with --protocol {protocol}, which needs no file"
            raise UserError(what, "leave them out, or choose another --protocol")
        if network == "pixels":
            return pixels_extractor(device)
        return digits_extractor(*load_digits_features(), device)
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
            what = f"{path} cannot be checked: no sha256 of {wanted.name} is published"
            raise MissingError(what, "add --trust, if you know where the file comes from")
        if (found := file_sha256(path)) == wanted.sha256 or (trust and path != shared):
            return path
        what = f"{path} is not the published {wanted.name}: its sha256 is {found[:12]}..."
        hint = f"delete it, and fetch {wanted.url} again"
        hint += "" if path == shared else "; or add --trust to use it as it is"
        raise MissingError(f"{what}, not {wanted.sha256[:12]}...", hint)
    known = "" if wanted.sha256 is None else f"; sha256 {wanted.sha256[:12]}..."
    name = "inception" if wanted is INCEPTION else "vgg16"
    hint = f"cmtool weights get {name} --accept-terms ({wanted.megabytes} MB{known}; {TERMS})"
    hint += f", or download {wanted.url} to {own[0]}"
    hint += ", or name the file with --feature-weights"
    coarse = ". Without a file, --protocol pixels gives a coarse number"
    raise MissingError(
        f"{wanted.name} is missing: {wanted.what}", hint + coarse * (wanted is INCEPTION)
    )
