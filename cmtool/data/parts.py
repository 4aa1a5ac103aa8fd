"""Bounds on the number of parts in an image file: a few bytes each, they take long to read."""

from __future__ import annotations

import re
from typing import Literal

MAX_CHUNKS = 100_000
"""Chunks of a PNG; one of 64 megapixels has 24,000 of 8 KiB."""
MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten."""
MAX_SEGMENTS = 400
"""Segments of a JPEG before its pixels, of up to 64 KiB; a colour profile may take 255."""
MAX_FILLING = 1 << 16
"""Bytes between the segments of a JPEG, which Pillow reads one at a time."""
MAX_VALUES = 250_000
"""Values of one tag of a TIFF, such as the places of its strips, and its number of tags."""
MAX_COMMENTS = 1000
MAX_HEADER = 4096
"""Bytes before the pixels of a PPM, comments included."""
SEGMENT = re.compile(rb"\xff([\x01-\xfe])(..)", re.DOTALL)
"""A marker of a JPEG, and the length of its segment if it begins one."""


def check_parts(content: bytes) -> None:
    """Raise ValueError for an image file of far more parts than encoders write."""
    if content.startswith(b"\x89PNG"):
        _check_chunks(content)
    elif content.startswith(b"\xff\xd8"):
        scans = content.count(b"\xff\xda")  # within pixels FF is followed by 0
        if scans > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans")
        _check_segments(content)
    elif content.startswith((b"II", b"MM")):
        _check_tags(content)
    elif re.match(rb"P[0-6fy]", content):  # all kinds that Pillow knows
        _check_header(content)


def _check_chunks(content: bytes) -> None:
    at = 8
    for _ in range(MAX_CHUNKS):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        if at >= len(content):
            return
    raise ValueError(f"it has more than {MAX_CHUNKS:,} chunks")


def _check_segments(content: bytes) -> None:
    at, left = 2, MAX_FILLING
    for _ in range(MAX_SEGMENTS):
        found = SEGMENT.search(content, at, at + left)
        if found is None:
            if at + left < len(content):
                raise ValueError(f"it has more than {MAX_FILLING:,} bytes between its segments")
            return
        left -= found.start() - at
        marker, length = found[1][0], int.from_bytes(found[2], "big")
        if marker == 0xDA:
            return
        is_alone = marker == 1 or 0xD0 <= marker <= 0xD9
        at = found.end(1) + (0 if is_alone else max(length, 2))
    raise ValueError(f"it has more than {MAX_SEGMENTS:,} segments")


def _check_tags(content: bytes) -> None:
    """Raise ValueError for very many tags, or values of one that are not single bytes."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], order)

    is_big = content[2:3] == b"+"
    width, wide, start = (8, 8, 8) if is_big else (4, 2, 4)
    first = number(start, width)
    count = number(first, wide)
    if count > MAX_VALUES:
        raise ValueError(f"it has {count:,} tags")
    for tag in range(first + wide, first + wide + count * (4 + 2 * width), 4 + 2 * width):
        values = number(tag + 4, width)
        if values > MAX_VALUES and number(tag + 2, 2) not in BYTE_TYPES:
            raise ValueError(f"its tag {number(tag, 2)} has {values:,} values")


BYTE_TYPES = (1, 2, 6, 7)
"""TIFF's types of single bytes, such as a colour profile: Pillow takes them as they are."""


def _check_header(content: bytes) -> None:
    header = re.sub(rb"#[^\r\n]*", b"", content[:MAX_HEADER])
    if len(content) > MAX_HEADER and len(header.split(maxsplit=4)) < 4:
        raise ValueError(f"its header has more than {MAX_HEADER:,} bytes")
    if content[1] in b"123" and content.count(b"#") > MAX_COMMENTS:
        raise ValueError(f"it has more than {MAX_COMMENTS:,} comments")
