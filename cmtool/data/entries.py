"""What a source of images holds: the names of its images, and how to read one."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import NamedTuple

from torch import Tensor

from cmtool.data.decoding import SUFFIXES
from cmtool.errors import InputError

MAX_MEMBER = 64 << 20
"""Bytes that one image in an archive may have."""
MAX_IMAGES = 50_000_000
"""Images of tar archives and tables."""
LOOKED_FOR = f"looked for {', '.join(SUFFIXES)}, in files and folders that are not hidden"
HASHED = 64
"""Files of a streamed set whose content is hashed, evenly spread."""
TABLES = ("dataset.json", "labels.csv")
"""Tables of labels beside the images, the first of which counts."""


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


class Labels(NamedTuple):
    """A class per image, the names of all classes if they have any, and what to tell of them."""

    classes: list[int] | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Entries(NamedTuple):
    """What a source holds: a name per image, how to read one, labels, and a hash of it all.

    `read` gives a file's content, or the image itself (C, H, W) uint8 where it is not encoded.
    `left_out` says which other files there are; None if there are none. `sizes` gives the bytes of
    each image's file: then `contents` is the hash that counts, and `fingerprint` the one that
    cmtool 0.1 had, "" if it did not read such a source.
    """

    names: Names
    read: Callable[[int], bytes | Tensor]
    labels: Labels
    fingerprint: str
    left_out: str | None = None
    sizes: Callable[[], Sequence[int]] | None = None

    def contents(self) -> str:
        """Return a hash of image files: of all their sizes, of the content of some, of classes.

        It is the same in a folder, zip, tar or table: of an image's name only its place in the
        order counts, for a table may have no names. A file that cannot be read counts as empty.
        """
        assert self.sizes is not None
        sizes = self.sizes()
        digest = hashlib.sha256(array("Q", sizes).tobytes())
        for place in range(min(HASHED, len(sizes))):
            with suppress(InputError):
                content = self.read(place * len(sizes) // min(HASHED, len(sizes)))
                assert isinstance(content, bytes)
                digest.update(hashlib.sha256(content).digest())
        digest.update(repr(self.labels.classes).encode())
        return digest.hexdigest()[:16]


def numbered(count: int) -> Names:
    """Return the numbers 0 to count - 1 as names."""
    return Names(map(str, range(count)))


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image, and neither hidden nor macOS's own."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Tell whether a file is hidden, or macOS's own."""
    return re.search(r"(^|/)(\.[^./]|__MACOSX/)", name) is not None


def left_out(names: Iterable[str]) -> str | None:
    """Return how many of the files are no images, by their endings; None if there are none."""
    return told_left_out(Counter(filter(None, map(other_ending, names))))


def told_left_out(endings: Counter[str]) -> str | None:
    """Return how many files are left out, by their endings; None if there are none."""
    if not endings:
        return None
    ranked = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} {ending}" for ending, count in ranked[:6])
    more = ", ..." if len(endings) > 6 else ""
    return f"{endings.total():,} other files are left out: {shown}{more}"


def other_ending(name: str) -> str | None:
    """Return as what a file is left out; None for an image, a table, and what is no data."""
    if name in TABLES or is_image(name):
        return None
    if is_hidden(name):
        is_picture = name.lower().endswith(SUFFIXES) and not re.search(
            r"(^|/)(\._|__MACOSX/)", name
        )
        return "hidden" if is_picture else None
    return PurePosixPath(name).suffix.lower() or "without ending"


def fingerprint(facts: Iterable[str], labels: Sequence[int] | None) -> str:
    """Return a hash of facts about a source and of its labels, to recognise it."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()[:16]
