"""Files damaged at random load, or are refused as input: nothing else, and soon.

Damage falls on the structure of a file, hardly on its weights. `tests/bench/fuzz_formats.py` does
the same for as long as one likes.
"""

import io
import json
import pickletools
import re
import resource
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmtool.core.precond import iddpm_sigmas
from cmtool.errors import UserError
from cmtool.models import load_model
from tests.formats import test_hostile as hostile
from tests.golden import golden

MAX_SECONDS = 2.0
ROOM = 4 << 30
"""Address space beyond what the process has at the start."""


# ---- files in pieces -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: an atom (one whole value), other structure, or weights; or a bracket."""

    content: bytes = b""
    kind: str = "structure"


OPEN, CLOSE = Piece(kind="open"), Piece(kind="close")
"""Between them stands what a storage or an array holds, or another file."""


@dataclass(frozen=True)
class Kind:
    """A format: the pieces of each good file, what else to put in, and pieces to a file."""

    suffix: str
    files: dict[str, Callable[[Path], list[Piece]]]
    odd: list[bytes]
    atoms: list[bytes]
    join: Callable[[list[Piece], Random], bytes]


def opcodes(stream):
    """Return the opcodes of the pickle the stream stands at; what pushes one value is an atom."""
    whole, out = stream.getvalue(), []
    found = [(opcode, position) for opcode, _, position in pickletools.genops(stream)]
    ends = [position for _, position in found[1:]] + [stream.tell()]
    for (opcode, start), end in zip(found, ends, strict=True):
        is_atom = not opcode.stack_before and len(opcode.stack_after) == 1 and opcode.name != "MARK"
        out.append(Piece(whole[start:end], "atom" if is_atom else "structure"))
    return out


def pickle_pieces(content):
    """Return an EDM pickle in pieces: opcodes, within storages too, and the numbers of storages."""
    out = []
    for piece in opcodes(io.BytesIO(content)):
        opcode = piece.content
        if opcode[:1] not in (b"B", b"C", b"\x8e") or len(opcode) < 100:
            out.append(piece)
            continue
        head = {b"B": 5, b"C": 2, b"\x8e": 9}[opcode[:1]]
        stream = io.BytesIO(opcode[head:])
        inner = [piece for _ in range(5) for piece in opcodes(stream)]
        length = Piece(stream.read(8))
        out += [OPEN, *inner, length, Piece(stream.read(), "weights"), CLOSE]
    return out


def join_nested(pieces, close):
    """Return the pieces in one; `close` is told what stands between brackets."""
    levels = [[]]
    for piece in pieces:
        if piece is OPEN:
            levels.append([])
        elif piece is CLOSE and len(levels) > 1:
            inner = b"".join(levels.pop())
            levels[-1].append(close(inner))
        else:
            levels[-1].append(piece.content)
    return b"".join(b"".join(level) for level in levels)


def join_pickle(pieces, rng):
    """Return the file; storages get their right length."""
    return join_nested(pieces, lambda inner: b"B" + struct.pack("<I", len(inner)) + inner)


@cache
def storages():
    return hostile.adm_pickle()[1]


def pt_pieces(_):
    return opcodes(io.BytesIO(hostile.adm_pickle()[0]))


def join_pt(pieces, rng):
    """Return an archive around the pickle; its own bytes are damaged only now and then."""
    whole = bytearray(hostile.archive(join(pieces, rng), storages()))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.choice([m.start() for m in re.finditer(rb"PK[\x01\x03\x05]", whole)])
        whole[min(at + rng.randrange(60), len(whole) - 1)] = rng.choice(EDGES)
    return bytes(whole[: rng.randrange(len(whole))] if rng.random() < 0.05 else whole)


def join(pieces, rng):
    return b"".join(piece.content for piece in pieces)


def json_pieces(content):
    """Return JSON in pieces: its values are atoms, its keys are not."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"(?:\s*:)?|[-+\w.]+|\S', content)
    return [
        Piece(token.encode(), "atom" if re.match(r'(?!.*:$)["\w-]', token) else "structure")
        for token in tokens
    ]


def safetensors_pieces(folder):
    """Return a file of ours: its header in pieces, then what it says of the model."""
    header, _ = hostile.laid_out()
    about = {"kind": "teacher", "weights": "model", "step": 1, "preset": hostile.CARD}
    return [*json_pieces(json.dumps(header)), OPEN, *json_pieces(json.dumps(about))]


def join_safetensors(pieces, rng):
    """Return the file, its lengths right but for one in eight."""
    middle = pieces.index(OPEN) if OPEN in pieces else len(pieces)
    header, about = join(pieces[:middle], rng), join(pieces[middle + 1 :], rng)
    said = b'{"__metadata__": {"cmtool": ' + json.dumps(about.decode(errors="replace")).encode()
    header = said + b"}, " + header[1:]
    length = len(header) + (rng.choice(EDGES) - 128 if rng.random() < 0.125 else 0)
    return struct.pack("<Q", max(length, 0)) + header + hostile.laid_out()[1]


def packed(content):
    """Return msgpack in pieces; within the arrays too, whose extension is left out."""
    out, at = [], 0
    while at < len(content):
        first, kind = content[at], "atom"
        after = content[at + 1 : at + 9]
        if first in (
            0xC4,
            0xC5,
            0xC6,
            0xC7,
            0xC8,
            0xC9,
            0xD9,
            0xDA,
            0xDB,
        ):  # bytes, extension, text
            width = {4: 1, 5: 2, 6: 4, 7: 1, 8: 2, 9: 4}.get(first - 0xC0) or 1 << (first - 0xD9)
            number = int.from_bytes(after[:width], "big")
            start = at + 1 + width + (0xC7 <= first <= 0xC9)
            end = start + number
            if 0xC7 <= first <= 0xC9:
                out += [OPEN, *packed(content[start:end]), CLOSE]
                at = end
                continue
            kind = "weights" if first <= 0xC6 else "atom"
        elif 0x80 <= first < 0xA0 or (first >= 0xDC and first < 0xE0):
            kind, end = "structure", at + 1 + {0xDC: 2, 0xDE: 2, 0xDD: 4, 0xDF: 4}.get(first, 0)
        elif 0xA0 <= first < 0xC0:
            end = at + 1 + first - 0xA0
        else:
            end = at + 1 + {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}.get(first, 0)
        out.append(Piece(content[at:end], kind))
        at = end
    return out


def msgpack_pieces(_):
    return packed(hostile.jcm())


def join_msgpack(pieces, rng):
    """Return the file; arrays get their right length."""
    return join_nested(pieces, lambda inner: msgpack.packb(msgpack.ExtType(1, inner)))


def config_pieces(folder):
    hostile.pipeline(folder / "made")
    text = (folder / "made" / "unet" / "config.json").read_text()
    steps = (folder / "made" / "scheduler" / "scheduler_config.json").read_text()
    shutil.rmtree(folder / "made")
    return [*json_pieces(json.dumps(json.loads(text))), OPEN, *json_pieces(steps)]


EDGES = [0, 1, 2, 0x7F, 0x80, 0xC0, 0xDD, 0xDF, 0xFE, 0xFF]
NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, 2**64 - 1]
OPCODES = [
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes),
    b"r\x05\x00\x00\x00", b")\x86", b"(", b"cposix\nsystem\n",
    b"ctorch.storage\n_load_from_bytes\n", b"ccollections\nOrderedDict\n)R",
]  # fmt: skip
VALUES = [None, True, False, 0, 1, -1, 7, 255, 2**31 - 1, 2**40, 2**63, 2**79, 0.0, -1.0, 0.5,
          1e300, float("nan"), float("inf"), "", "x", "model", "EDMPrecond", "SongUNet", "0", b"",
          b"x", (), [], {}, set(), (1,), [1, 2], {"a": 1}, "\ud800", "\x1b[2J", "\n"]  # fmt: skip
LITERALS = [*map(hostile.code, VALUES), b"j\x01\x00\x00\x00", b"h\x00", b"h\x05"]
PUNCTUATION = [b",", b":", b"[", b"]", b"{", b"}", b"[" * 2000, b'{"name": "adm"}', b'"', b"\xff"]
WORDS = [
    b"1e999", b"-1", b"0", b"1", b"2", b"1000000000", b"123456789012345678901234567890", b"null",
    b"true", b"NaN", b"Infinity", b"1.5", b"1e-300", b'""', b'"x"', b'"\\ud800"', b"[]", b"{}",
    b"[8, 8]", b"[8]", b'"\\u001b[2J"', b'{"name": "adm"}', b'{"name": "song"}', b'"name"',
    b'"loss"', b'"model"', b'"adm"', b'"edm"', b'"noise"', b'"vp"', b'"train"', b'"\\n"', b"64",
]  # fmt: skip
HEADS = [bytes([n]) for n in range(0x80, 0xE0)] + [
    b"\xdd\xff\xff\xff\xff", b"\xdf\x00\x10\x00\x00", b"\xc9\xff\xff\xff\xff\x01", b"\xc7\x00\x01",
    b"\xd6\xff\x00\x00\x00\x00",
]  # fmt: skip
PACKED = [
    *(msgpack.packb(value) for value in VALUES
      if not isinstance(value, set | str) and value not in (2**79,)),
    *map(msgpack.packb, ["", "x", "params", "Conv_0", "float16", "float32", "bfloat16", "int8"]),
    *map(msgpack.packb, [-(2**63), 2**64 - 1, 3, 8, 16, "__msgpack_chunked_array__", "shape"]),
    msgpack.packb(hostile.array([0, 8])), msgpack.packb(hostile.array([3, 3, 3, 8])),
]  # fmt: skip


def iddpm_state():
    levels = hostile.tensor(torch.tensor(iddpm_sigmas(steps=9)))
    return {"M": 9, "C_1": 0.001, "C_2": 0.008, "_buffers": {"u": levels}}


def golden_pickle(name):
    return lambda folder: pickle_pieces(golden(name, folder).read_bytes())


def good(make):
    return lambda folder: pickle_pieces(make())


KINDS = {
    "golden pickles": Kind(
        ".pkl",
        {name: golden_pickle(name) for name in ("edm_ddpmpp.pkl", "edm_ncsnpp.pkl")},
        OPCODES,
        LITERALS,
        join_pickle,
    ),
    "pickles": Kind(
        ".pkl",
        {
            "song": good(hostile.snapshot),
            "fourier": good(hostile.fourier_snapshot),
            "vp": good(lambda: hostile.snapshot(name="VPPrecond", state={"M": 9, "beta_d": 1.0})),
            "iddpm": good(lambda: hostile.snapshot(name="iDDPMPrecond", state=iddpm_state())),
        },
        OPCODES,
        LITERALS,
        join_pickle,
    ),
    "archives": Kind(".pt", {"adm": pt_pieces}, OPCODES, LITERALS, join_pt),
    "safetensors": Kind(
        ".safetensors", {"ours": safetensors_pieces}, PUNCTUATION, WORDS, join_safetensors
    ),
    "msgpack": Kind("", {"jcm": msgpack_pieces}, HEADS, PACKED, join_msgpack),
    "configs": Kind("folder", {"pipe": config_pieces}, PUNCTUATION, WORDS, join),
}


# ---- damage --------------------------------------------------------------------------------------


def near(rng, pieces, kinds=("structure", "atom")):
    """Return a random place: in the structure, but for one in twenty."""
    for _ in range(20):
        at = rng.randrange(len(pieces))
        if pieces[at].content and (pieces[at].kind in kinds or rng.random() < 0.002):
            return at
    return 0


def damage(rng, pieces, other, kind):
    """Change the list of pieces in one way. `other` is the list of another file, or the same."""
    if rng.random() < 0.7:  # a value for a value: the file stays well formed
        at = near(rng, pieces, ("atom",))
        odd = rng.random() < 0.7
        new = rng.choice(kind.atoms) if odd else other[near(rng, other, ("atom",))].content
        pieces[at] = Piece(new, pieces[at].kind)
        return
    at, length = near(rng, pieces), rng.choice([1, 1, 1, 2, 3, 8, 40])
    content = bytearray(pieces[at].content)
    match rng.randrange(11):
        case 0 if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 1 if content:
            content[rng.randrange(len(content))] = rng.choice(EDGES)
        case 2:
            width = rng.choice([1, 2, 4, 8])
            order = rng.choice(["little", "big"])
            start = rng.randrange(max(1, len(content) - width + 1))
            number = rng.choice(NUMBERS) % 256**width
            content[start : start + width] = number.to_bytes(width, order)
        case 3:
            content.insert(rng.randrange(len(content) + 1), rng.randrange(256))
        case 4:
            pieces[at : at + length] = [p for p in pieces[at : at + length] if p in (OPEN, CLOSE)]
            return
        case 5:
            pieces[at:at] = pieces[at : at + length] * rng.choice([1, 1, 2, 20])
            return
        case 6:
            start = near(rng, other)
            pieces[at:at] = other[start : start + length]
            return
        case 7:
            to = near(rng, pieces)
            pieces[at], pieces[to] = pieces[to], pieces[at]
            return
        case 8:
            pieces.insert(at, Piece(rng.choice([*kind.odd, *kind.atoms])))
            return
        case 9 if rng.random() < 0.3:
            pieces[at:] = other[near(rng, other) :]  # two files in one
            return
        case 10 if rng.random() < 0.3 and at:
            del pieces[at:]
            return
        case _:
            content = rng.choice(kind.odd)
    pieces[at] = Piece(bytes(content), pieces[at].kind)


def damaged(rng, kind, files):
    """Return the content of a damaged file; `files` are the pieces of the good ones."""
    pieces = list(rng.choice(files))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        damage(rng, pieces, rng.choice(files), kind)
    pieces = pieces or [Piece()]
    return kind.join(pieces, rng) if kind.suffix != "folder" else pieces


def write(kind, content, path):
    """Write a damaged file, or the folder of which two files are damaged."""
    if kind.suffix != "folder":
        path.write_bytes(content)
        return
    if not path.exists():
        hostile.pipeline(path)
    middle = content.index(OPEN) if OPEN in content else len(content)
    (path / "unet" / "config.json").write_bytes(join(content[:middle], None))
    (path / "scheduler" / "scheduler_config.json").write_bytes(join(content[middle + 1 :], None))


def outcome(path):
    """Return "loaded" or why not, and the seconds. Any error but the user's comes through."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_model(path, otherwise="teacher")
        said = "loaded"
    except UserError as error:
        said = error.what
    return said, time.process_time() - start


# ---- the test ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _little_memory():
    """A file that asks for much is to be refused, not to end the test run."""
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = used + ROOM
    soft = wanted if limits[0] == resource.RLIM_INFINITY else min(wanted, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    made = {name: [make(folder) for make in kind.files.values()] for name, kind in KINDS.items()}
    return made, folder


EXAMPLES = {"golden pickles": 150, "pickles": 600, "archives": 500, "safetensors": 1000,
            "msgpack": 1000, "configs": 500}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_load_or_are_refused_soon(name, files):
    made, folder = files
    kind = KINDS[name]
    path = folder / f"damaged{kind.suffix}"

    @settings(
        max_examples=EXAMPLES[name], derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32))
    def check(seed):
        write(kind, damaged(Random(seed), kind, made[name]), path)
        said, seconds = outcome(path)
        assert said
        assert seconds < MAX_SECONDS

    check()


@pytest.mark.parametrize("name", KINDS)
def test_pieces_make_the_file_they_were_cut_from(name, files):
    made, folder = files
    kind = KINDS[name]
    for pieces in made[name]:
        path = folder / f"whole{kind.suffix}"
        whole = pieces if kind.suffix == "folder" else kind.join(pieces, Random(1))
        write(kind, whole, path)
        assert outcome(path)[0] == "loaded"
