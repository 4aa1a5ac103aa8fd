"""What a source of images holds: the names of its images, how to read one, their labels."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from cmtool.data.images import SUFFIXES

MAX_MEMBER = 64 << 20
"""Bytes that one image in an archive may have."""


class Names:
    """The names of a source's images, packed into one string.

    A list of a million strings takes a hundred megabytes, in each process that reads it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        packed, ends = bytearray(), array("Q", [0])
        for name in names:
            packed += name.encode("utf-8", "surrogateescape")
            ends.append(len(packed))
        self.packed, self.ends = bytes(packed), ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        name = self.packed[self.ends[index] : self.ends[index + 1]]
        return name.decode("utf-8", "surrogateescape")


class Entries(NamedTuple):
    """What a source holds: a name per image, how to read one, labels, and a hash of it all.

    `read` gives a file's content, or the image itself (C, H, W) uint8 where it is not encoded.
    """

    names: Names
    read: Callable[[int], bytes | Tensor]
    labels: list[int] | None
    fingerprint: str


def numbered(count: int) -> Names:
    """Return the numbers 0 to count - 1 as names."""
    return Names(map(str, range(count)))


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image, and neither hidden nor macOS's own."""
    hidden = re.search(r"(^|/)(\.[^./]|__MACOSX/)", name)
    return name.lower().endswith(SUFFIXES) and hidden is None


def fingerprint(facts: Iterable[str], labels: Sequence[int] | None) -> str:
    """Return a hash of facts about a source and of its labels, to recognise it."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()[:16]
