"""The headers of a tar archive, one after the other. Contents are passed over, nothing is written.

The tarfile module keeps an object of each member, and takes twice as long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
MAX_EXTRA = 1 << 20
"""Bytes of a header that extends another: a long name, or a table of pax."""
PLAIN = b"0\0 7"
"""Types of regular files."""
WITHOUT_CONTENT = b"123456"
"""Types of links, devices, folders and pipes: no content follows, whatever size they claim."""
OCTAL = re.compile(b"[0-7]*")
RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Header(NamedTuple):
    """A member of an archive: its name, where its content starts, and how many bytes it has.

    `kind` is "file", "folder", or what else it is in words: "a link", "a sparse file", "a device".
    """

    name: str
    start: int
    size: int
    kind: str


KINDS = {
    ord("1"): "a link", ord("2"): "a link", ord("3"): "a device", ord("4"): "a device",
    ord("5"): "folder", ord("6"): "a pipe", ord("S"): "a sparse file",
}  # fmt: skip


def is_tar(block: bytes) -> bool:
    """Tell whether the first block of a file is a header of a tar archive."""
    return len(block) == BLOCK and block[257:262] == b"ustar"


def headers(file: IO[bytes], file_size: int) -> Iterator[Header]:
    """Yield the members of a tar archive, ustar, GNU or pax.

    Raises ValueError for a damaged header, and for a file that ends too early. One that ends
    between two members without the mark of an end is taken as it is, as tar does.
    """
    at, extra = 0, dict[str, str]()
    while at < file_size:
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ValueError("it is cut short")
        if not block.strip(b"\0"):
            return
        if _sum(block) != _number(block[148:156]):
            raise ValueError(f"no header of a file at byte {at:,}")
        kind, size, start = block[156], _number(block[124:136]), at + BLOCK
        if "size" in extra and kind not in b"xgLK":
            size = _decimal(extra["size"])
        if kind in WITHOUT_CONTENT:
            size = 0
        at = start + -(-size // BLOCK) * BLOCK
        if start + size > file_size:
            raise ValueError(f"it is cut short, or its file at byte {start - BLOCK:,} claims more")
        if kind in b"xgLK":
            extra |= _extension(file, kind, size)
            continue
        name = extra.get("path", _name(block))
        is_sparse = any(key.startswith("GNU.sparse") for key in extra)
        extra = {}
        plain = "a sparse file" if is_sparse else "folder" if name.endswith("/") else "file"
        yield Header(name, start, size, plain if kind in PLAIN else KINDS.get(kind, "of no kind"))
        if kind == ord("S"):
            raise ValueError(f"{name!r} is a sparse file")  # more headers follow it


def _extension(file: IO[bytes], kind: int, size: int) -> dict[str, str]:
    """Return what a header says of the next: its path or size. That of all files is passed over."""
    if size > MAX_EXTRA:
        raise ValueError(f"a header of {size:,} bytes")
    content = file.read(size) if kind in b"xL" else b""
    if kind == ord("L"):
        return {"path": _text(content)}
    found, at = {}, 0
    while at < len(content) and (match := RECORD.match(content, at)):
        end = at + int(match[1])
        if end <= match.end():
            break
        found[_text(match[2])] = _text(content[match.end() : end - 1])
        at = end
    return found


def _sum(block: bytes) -> int:
    """Return the checksum of a header: its own field counts as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """Return a number in octal digits, or in GNU's binary form. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not OCTAL.fullmatch(digits):
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"a file of {text[:20]!r} bytes")
    return int(text)


def _name(block: bytes) -> str:
    """Return the name in a header; that of ustar has a second part, GNU's has not."""
    name, prefix = _text(block[:100]), _text(block[345:500])
    return f"{prefix}/{name}" if prefix and block[257:263] == b"ustar\0" else name


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
