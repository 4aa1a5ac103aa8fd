"""The feature networks of the bundled data sets: those of fd-digits and fd-emoji."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from cmtool.data.images import from_uint8
from cmtool.errors import InputError
from cmtool.evaluation.extractor import Extractor
from cmtool.formats.native import read_weights
from cmtool.models import ASSETS
from cmtool.system.files import file_sha256


class BundledFeatures(nn.Module):
    """A small classifier whose last hidden layer, of WIDTH values, is a feature space.

    `layers` makes features of images, `classes` makes logits of features, and `colours` a few
    colours of the image, so that features see both shape and colour.
    """

    NAME: ClassVar[str]
    SIDE: ClassVar[int]
    WIDTH: ClassVar[int] = 64
    layers: nn.Sequential
    classes: nn.Linear

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, WIDTH) of images (B, 3, SIDE, SIDE) in [-1, 1]. Raises InputError."""
        if images.shape[1:] != (3, self.SIDE, self.SIDE):
            c, h, w = images.shape[1:]
            size = f"{self.SIDE}x{self.SIDE}"
            what = f"fd-{self.NAME} needs RGB images of {size}, not {w}x{h} with {c} channels"
            own = f"it compares with the bundled {self.NAME} only"
            raise InputError(what, f"{own}: give --reference, or --protocol edm")
        features: Tensor = self.layers(images)
        return features


class DigitsFeatures(BundledFeatures):
    """The features of fd-digits, of the class and of the colours of paper and ink.

    From features, `classes` makes 10 logits, `colours` 6 values in [-1, 1].
    """

    NAME, SIDE = "digits", 8

    def __init__(self) -> None:
        super().__init__()
        convs = (nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((3, 24, 1), (24, 48, 2), (48, 64, 1)))
        layers: list[nn.Module] = [layer for conv in convs for layer in (conv, nn.SiLU())]
        layers += nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, self.WIDTH), nn.SiLU()
        self.layers = nn.Sequential(*layers)
        self.classes = nn.Linear(self.WIDTH, 10)
        self.colours = nn.Linear(self.WIDTH, 6)


class EmojiFeatures(BundledFeatures):
    """The features of fd-emoji, of what is drawn, whoever drew it, and of its colours.

    From features, `classes` makes logits of the nine categories, `identity` a vector that is
    alike for the same emoji of two vendors, and `colours` the means of 4x4 parts, 48 values.
    """

    NAME, SIDE = "emoji", 32

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 16, 1), (16, 32, 2), (32, 48, 2), (48, 64, 2))
        convs = (nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in widths)
        layers: list[nn.Module] = [layer for conv in convs for layer in (conv, nn.SiLU())]
        layers += nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, self.WIDTH), nn.SiLU()
        self.layers = nn.Sequential(*layers)
        self.classes = nn.Linear(self.WIDTH, 9)
        self.identity = nn.Linear(self.WIDTH, 32)
        self.colours = nn.Linear(self.WIDTH, 48)


def load_features(name: str) -> tuple[BundledFeatures, str]:
    """Return the bundled feature network of a data set, and the hash of its file."""
    file = ASSETS / f"{name}-features.safetensors"
    network = FEATURES[name]().eval().requires_grad_(False)
    network.load_state_dict({key: t.float() for key, t in read_weights(file).items()})
    return network, file_sha256(file)


def bundled_extractor(network: BundledFeatures, sha256: str, device: str = "cpu") -> Extractor:
    """Return the features of a bundled network."""
    network = network.to(device).eval()
    return Extractor(
        f"{network.NAME}-features", sha256, network.WIDTH,
        lambda images: network(from_uint8(images)), network.classes, 256, device,
    )  # fmt: skip


FEATURES: dict[str, type[BundledFeatures]] = {"digits": DigitsFeatures, "emoji": EmojiFeatures}
