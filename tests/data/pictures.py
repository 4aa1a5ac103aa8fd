"""Small valid files of every kind of image that is read, and damaged ones."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

RAMP = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
RGB = Image.fromarray(np.stack([RAMP, RAMP[::-1], 255 - RAMP], -1))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    exif[0x011A] = 72.5
    return exif


def chunk(kind, content):
    """A chunk of a PNG."""
    crc = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + crc


def png(width, height, *more, depth=8, kind=0, rows=b""):
    """A PNG made by hand: `kind` 0 is grey, 2 RGB, 3 a palette, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(width, height, pixels, *, bits=8, white=1, sign=1, tile=None, packed=False, strips=1):
    """A grey TIFF made by hand, of one tile of the given sides, or of strips, all in one place."""
    data = zlib.compress(pixels, 9) if packed else pixels
    tags = {256: width, 257: height, 258: bits, 259: 8 if packed else 1, 262: white, 277: 1}
    places = (324, 325) if tile else (273, 279)
    tags |= {322: tile[0], 323: tile[1]} if tile else {278: height // strips}
    start = 22 + 12 * (len(tags) + 3)
    tags |= {places[0]: start, places[1]: len(data), 339: sign}
    counts = {}
    if strips > 1:
        counts = dict.fromkeys(places, strips)
        table = struct.pack("<I", start + 4 * strips) * strips
        tags |= {places[0]: start, places[1]: start}  # as lengths, places are far too large
        data = table + data
    entries = (struct.pack("<HHII", tag, 4, counts.get(tag, 1), tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries)
    return head + bytes(4 + 8) + data


def bmp_of_runs(width, height, runs):
    """A BMP of 256 greys, its pixels as run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 256)
    start = 14 + len(head) + 1024
    return struct.pack("<2sIII", b"BM", start + len(runs), 0, start) + head + bytes(1024) + runs


def _grey(dtype):
    return Image.fromarray((RAMP.astype(np.float64) * 200).astype(dtype))


def _plain(kind, values, most=""):
    return f"{kind} 4 2 {most}\n{values}\n".encode()


MPO = {"save_all": True, "append_images": [RGB.convert("L").convert("RGB")]}
VALID = {
    "png rgb": saved(RGB, exif=turned()),
    "png grey": saved(RGB.convert("L"), optimize=True),
    "png palette": saved(RGB.quantize(16), transparency=3),
    "png rgba": saved(RGB.convert("RGBA")),
    "png bits": saved(RGB.convert("1")),
    "png grey alpha": saved(RGB.convert("LA")),
    "png 16": saved(_grey(np.uint16)),
    "jpeg": saved(RGB, "JPEG", exif=turned(), comment=b"a comment"),
    "jpeg grey": saved(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": saved(RGB.convert("CMYK"), "JPEG"),
    "jpeg progressive": saved(RGB, "JPEG", progressive=True),
    "jpeg of a phone": saved(RGB, "MPO", **MPO),
    "webp": saved(RGB, "WEBP", exif=turned()),
    "webp lossless": saved(RGB.convert("RGBA"), "WEBP", lossless=True),
    "bmp": saved(RGB, "BMP"),
    "bmp palette": saved(RGB.quantize(8), "BMP"),
    "bmp runs": bmp_of_runs(4, 2, b"\x04\x07\0\0\0\x04abcd\0\x01"),
    "tiff": saved(RGB, "TIFF", exif=turned()),
    "tiff lzw": saved(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate": saved(RGB.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
    "tiff bits": saved(RGB.convert("1"), "TIFF", compression="packbits"),
    "tiff jpeg": saved(RGB, "TIFF", compression="jpeg"),
    "tiff 16": saved(_grey(np.uint16), "TIFF"),
    "tiff 12": tiff(4, 2, b"\x12\x34\x56" * 4, bits=12),
    "tiff tile": tiff(8, 8, bytes(range(256)), tile=(16, 16), packed=True),
    "P1": _plain("P1", "0 1 0 1 1 0 1 0"),
    "P2": _plain("P2", "0 10 20 30 40 50 60 70 # end", 100),
    "P3": _plain("P3", "1 2 3 " * 8, 9),
    "P4": saved(RGB.convert("1"), "PPM"),
    "P5": saved(RGB.convert("L"), "PPM"),
    "P5 16": saved(_grey(np.uint16), "PPM"),
    "P6": saved(RGB, "PPM"),
}
"""A file of each kind that can be read."""


def damaged(content, rng: random.Random):
    """Return the file with some bytes changed, lost or doubled."""
    broken = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(broken), rng.choice((64, 1 << 30))))
        match rng.randrange(6):
            case 0:
                del broken[at : at + rng.randrange(1, 20)]
            case 1:
                broken[at:at] = broken[at : at + rng.randrange(1, 20)]
            case 2:
                broken[at] = rng.choice((0, 1, 127, 128, 255))
            case _:
                broken[at] ^= 1 << rng.randrange(8)
        if not broken:
            break
    return bytes(broken)
