"""Bounds on the number of parts in an image file: a few bytes each, they take long to read."""

from __future__ import annotations

import re

MAX_CHUNKS = 100_000
"""Chunks of a PNG; one of 64 megapixels has 24,000 of 8 KiB."""
MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten."""
MAX_COMMENTS = 1000
MAX_HEADER = 4096
"""Bytes before the pixels of a PPM, comments included."""


def check_parts(content: bytes) -> None:
    """Raise ValueError for an image file of far more parts than encoders write."""
    if content.startswith(b"\x89PNG"):
        _check_chunks(content)
    elif content.startswith(b"\xff\xd8"):
        scans = content.count(b"\xff\xda")  # within pixels FF is followed by 0
        if scans > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans")
    elif re.match(rb"P[1-6]", content):
        _check_header(content)


def _check_chunks(content: bytes) -> None:
    at = 8
    for _ in range(MAX_CHUNKS):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        if at >= len(content):
            return
    raise ValueError(f"it has more than {MAX_CHUNKS:,} chunks")


def _check_header(content: bytes) -> None:
    header = re.sub(rb"#[^\r\n]*", b"", content[:MAX_HEADER])
    if len(content) > MAX_HEADER and len(header.split(maxsplit=4)) < 4:
        raise ValueError(f"its header has more than {MAX_HEADER:,} bytes")
    if content[1] in b"123" and content.count(b"#") > MAX_COMMENTS:
        raise ValueError(f"it has more than {MAX_COMMENTS:,} comments")
