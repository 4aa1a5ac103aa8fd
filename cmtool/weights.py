"""Files that others publish: their addresses, terms and hashes, and where they belong.

Nothing is fetched unless `cmtool weights get` is typed. The hashes are those that the publisher, or
a hub that keeps a copy, states; where nobody states one, that of the first download is kept.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cmtool.errors import InputError, MissingError, UserError, nearest
from cmtool.system.files import file_sha256, read_own, write_atomic

if TYPE_CHECKING:
    from cmtool.system.download import OnBytes, OnNote

OPENAI = "https://openaipublic.blob.core.windows.net/consistency"
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
TORCHVISION = "https://download.pytorch.org/models"
META = "https://dl.fbaipublicfiles.com"
CLIP = "https://openaipublic.azureedge.net/clip/models"
NO_COMMERCE = "CC BY-NC-SA 4.0: no commercial use"
RESEARCH = "NVIDIA's terms for research: no commercial use"
OFFLINE = ("CMTOOL_OFFLINE", "HF_HUB_OFFLINE")
"""Variables that forbid to use the network, unless they are empty or 0."""
MIRROR = "CMTOOL_MIRROR"
"""Variable that holds the address of a folder with copies: their names are those of the files."""


class Published(NamedTuple):
    """A file that others publish; `sha256` may be its beginning, or None if nobody states it."""

    url: str
    what: str
    terms: str
    sha256: str | None = None
    megabytes: int | None = None
    wants_consent: bool = False
    of_torch: bool = False
    """It lies where torchvision and lpips look for it."""
    saved_as: str = ""
    """Its name here, where the publisher's name is that of other files too."""

    @property
    def file(self) -> str:
        """The name of the file on this machine and on a mirror."""
        return self.saved_as or self.url.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Where the file belongs."""
        if self.of_torch:
            xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            home = Path(os.environ.get("TORCH_HOME") or xdg / "torch").expanduser()
            return home / "hub" / "checkpoints" / self.file
        cache = Path(os.environ.get("CMTOOL_CACHE") or Path.home() / ".cache" / "cmtool")
        return cache / "weights" / self.file


def _nvidia(folder: str, name: str, what: str, sha256: str | None = None) -> Published:
    return Published(f"{NVIDIA}/{folder}/{name}", what, NO_COMMERCE, sha256, wants_consent=True)


def _edm() -> dict[str, Published]:
    """Return EDM's teachers (Karras et al. 2022), and its statistics of CIFAR-10."""
    hashes = {
        "cifar10-32x32-uncond-vp": "4d5dcc1f1d0d41c8934ad21626eeddbd"
        "c0460182becf9fc059a0631b1eedb4da"
    }
    data = (
        "cifar10-32x32-cond",
        "cifar10-32x32-uncond",
        "ffhq-64x64-uncond",
        "afhqv2-64x64-uncond",
    )
    names = [f"{each}-{process}" for each in data for process in ("vp", "ve")]
    return {
        f"edm-{name}": _nvidia(
            "edm/pretrained", f"edm-{name}.pkl", f"EDM teacher, {name}", hashes.get(name)
        )
        for name in [*names, "imagenet-64x64-cond-adm"]
    }


def _edm2() -> dict[str, Published]:
    """Return EDM2's teachers of ImageNet 64x64 (Karras et al. 2024)."""
    snapshots = ("s-1073741-0.075", "m-2147483-0.060", "l-1073741-0.040", "xl-0671088-0.040")
    return {
        f"edm2-img64-{each[: each.index('-')]}": _nvidia(
            "edm2/posthoc-reconstructions", f"edm2-img64-{each}.pkl",
            f"EDM2-{each[: each.index('-')].upper()} teacher, ImageNet 64x64",
        )
        for each in snapshots
    }  # fmt: skip


def _openai() -> dict[str, Published]:
    """Return the models of the PyTorch release (Song et al. 2023)."""
    kinds = {
        "edm_{}_ema": "EDM teacher",
        "cd_{}_l2": "distilled (CD, l2)",
        "cd_{}_lpips": "distilled (CD, LPIPS)",
        "ct_{}": "trained without a teacher (CT)",
    }
    places = {"imagenet64": "ImageNet 64x64", "bedroom256": "LSUN bedrooms", "cat256": "LSUN cats"}
    return {
        kind.format(place): Published(
            f"{OPENAI}/{kind.format(place)}.pt", f"{said}, {where}", "MIT"
        )
        for place, where in places.items()
        for kind, said in kinds.items()
    }


def _jax() -> dict[str, Published]:
    """Return the CIFAR-10 models of the JAX release; their checkpoints are named alike."""
    checkpoints = {"cd-l1": 80, "cd-l2": 80, "cd-lpips": 80, "ct-lpips": 74}
    return {
        f"jcm-{name}": Published(
            f"{OPENAI}/jcm_checkpoints/{name}/checkpoints/checkpoint_{number}",
            f"CIFAR-10, {name.upper()} of the JAX release",
            "Apache-2.0",
            saved_as=f"jcm-{name}-{number}",
        )
        for name, number in checkpoints.items()
    }


PUBLISHED: dict[str, Published] = {
    "inception": Published(
        f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "Inception v3 of 2015, the feature network of FID",
        RESEARCH,
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        96,
        wants_consent=True,
    ),
    "vgg16": Published(
        f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt",
        "VGG-16, the feature network of improved precision and recall",
        RESEARCH,
        None,
        553,
        wants_consent=True,
    ),
    "dinov2": Published(
        f"{META}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "DINOv2's ViT-L/14, the feature network of FD-DINOv2",
        "Apache-2.0",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1218,
    ),
    "clip": Published(
        f"{CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "CLIP's ViT-B/32, the feature network of FD-CLIP",
        "MIT",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        354,
    ),
    **{
        f"lpips-{net}": Published(
            f"{TORCHVISION}/{file}", f"{net} of torchvision, for LPIPS", "BSD-3-Clause",
            file.rpartition("-")[2].partition(".")[0], size, of_torch=True,
        )
        for net, file, size in (
            ("vgg", "vgg16-397923af.pth", 528),
            ("alex", "alexnet-owt-7be5be79.pth", 233),
            ("squeeze", "squeezenet1_1-b8a52dc0.pth", 5),
        )
    },
    **_edm(),
    "edm-cifar10-reference": _nvidia(
        "edm/fid-refs", "cifar10-32x32.npz", "EDM's statistics of CIFAR-10, for --reference"
    ),
    **_edm2(),
    **_openai(),
    **_jax(),
}  # fmt: skip
"""By the name that `cmtool weights` takes."""


def published(name: str) -> Published:
    """Return a file by its name. Raises UserError."""
    if name not in PUBLISHED:
        raise UserError(f"no weights {name!r}", nearest(name, PUBLISHED))
    return PUBLISHED[name]


def is_offline() -> bool:
    """Tell whether a variable forbids to use the network."""
    return any(os.environ.get(name, "") not in ("", "0") for name in OFFLINE)


def fetched(
    name: str,
    *,
    accept_terms: bool = False,
    progress: OnBytes = lambda *_: None,
    note: OnNote = lambda _: None,
) -> Path:
    """Return the path of a file, fetched unless it is there and whole.

    Raises UserError where its terms want consent, MissingError where the network may not be used,
    and what `download` raises.
    """
    wanted = published(name)
    path, known = wanted.path, expected_sha256(wanted)
    from cmtool.system.download import download

    if path.is_file() and known is not None and file_sha256(path).startswith(known):
        return path
    if is_offline():
        offline = next(v for v in OFFLINE if os.environ.get(v, "") not in ("", "0"))
        what = f"{name} is not there, and {offline} forbids to fetch it"
        hint = f"on a machine with a network: curl -Lo {wanted.file} {wanted.url}; then copy it to"
        raise MissingError(what, f"{hint} {path}")
    if wanted.wants_consent and not accept_terms:
        hint = f"if you agree: cmtool weights get {name} --accept-terms"
        raise UserError(f"{name} has terms: {wanted.terms}", hint)
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    url = f"{mirror}/{wanted.file}" if mirror else wanted.url
    found = download(url, path, sha256=known, progress=progress, note=note)
    if known is None:
        write_atomic(_kept(path), found.encode() + b"\n")
        note(f"nobody states the sha256 of {wanted.file}; it is {found}, and kept")
    return path


def expected_sha256(wanted: Published) -> str | None:
    """Return the stated sha256 of a file, else that of its first download, else None."""
    if wanted.sha256 is not None:
        return wanted.sha256
    try:
        kept = read_own(_kept(wanted.path)).decode(errors="replace").strip()
    except (OSError, InputError):
        return None
    return kept if len(kept) == 64 else None


def state_of(wanted: Published) -> str:
    """Return whether a file is `there`, `missing`, `changed`, or there but `unknown`."""
    path, known = wanted.path, expected_sha256(wanted)
    if not path.is_file():
        return "missing"
    if known is None:
        return "unknown"
    return "there" if file_sha256(path).startswith(known) else "changed"


def _kept(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
