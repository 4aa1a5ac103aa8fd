"""Files made to do harm: nothing in them runs, and each is refused in time, with a reason.

All attacks run in one child process with little address space, which says after each one what
came of it; a child that hangs or dies is replaced, and the attack is marked. The payload of every
code attack makes a file, the canary. What is tested is the command, `cmtool checkpoint info`.
"""

import contextlib
import gc
import io
import json
import lzma
import os
import pickle
import random
import re
import resource
import select
import socket
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import msgpack
import pytest
import torch
from torch import nn

from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.networks.song import Song, SongOptions
from cmtool.formats import diffusers_dir, jcm_msgpack
from cmtool.formats.edm_pkl import adm_rules, song_rules
from cmtool.formats.foreign import translate_back

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(900),
]  # as long as it takes if many hang

ROOT = Path(__file__).parents[2]
CANARY = "canary"  # in the child's working folder
SHELL = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w')"
MAX_SECONDS = 1.0
MAX_GROWTH = 300 << 20
ADDRESS_SPACE = 6 << 30
PATIENCE = 4.0
"""Seconds without a word from the child until it is taken to hang."""
LONGEST = 800
"""Characters of an error message, the path of the file included."""


# ---- pickles, written opcode by opcode -----------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What a function returns, by REDUCE."""

    function: object
    args: object


@dataclass(frozen=True)
class New:
    """An object of a container class, by NEWOBJ and BUILD."""

    name: str
    state: object


@dataclass(frozen=True)
class Raw:
    """Opcodes that leave one object on the stack."""

    code: bytes


def long1(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def code(value):
    """Return opcodes of protocols up to 4 that push the value; nothing is memoised."""
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else long1(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
        case set():
            return b"\x8f(" + b"".join(map(code, value)) + b"\x90"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode("utf-8", "surrogatepass")
        case Call():
            return code(value.function) + code(value.args) + b"R"
        case New():
            return code(Name(CONTAINER, value.name)) + b")\x81" + code(value.state) + b"b"
        case Raw():
            return value.code
    raise TypeError(type(value))


def pickled(value):
    return b"\x80\x04" + code(value) + b"."


def put(index, value):
    """Return the value, stored in the memo."""
    return Raw(code(value) + b"r" + struct.pack("<I", index))


def get(index):
    return Raw(b"j" + struct.pack("<I", index))


def many(value, count):
    """Return a list of equal items, written fast."""
    return Raw(b"](" + code(value) * count + b"e")


def table(items):
    """Return a dict of pairs, whose keys may come twice and need no hash here."""
    return Raw(b"}(" + b"".join(code(k) + code(v) for k, v in items) + b"u")


EMPTY = b"\x80\x02}."
CONTAINER = "torch.nn.modules.container"
RECONSTRUCT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
LOAD = Name("torch.storage", "_load_from_bytes")
ORDERED = Name("collections", "OrderedDict")
SYSTEM = Name("posix", "system")
TOUCH = Call(SYSTEM, (SHELL,))
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM_FACTS = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def stored(
    content, kind="FloatStorage", count=None, second=None, *, key="0", keys=("0",), view=None,
    magic=MAGIC, version=1001, facts=SYSTEM_FACTS, tail=b"",
):  # fmt: skip
    """Return the bytes of torch's legacy layout for one storage, which may lie."""
    count = len(content) // 4 if count is None else count
    kind = Name("torch", kind) if isinstance(kind, str) else kind
    identity = Raw(code(("storage", kind, key, "cpu", count, view)) + b"Q")
    parts = [magic, version, facts, identity, list(keys)]
    second = len(content) // 4 if second is None else second
    return b"".join(map(pickled, parts)) + struct.pack("<q", second) + content + tail


def storage(content, *args, **kwargs):
    return Call(LOAD, (stored(content, *args, **kwargs),))


def view(base, size, stride, offset=0, hooks=None):
    hooks = Call(ORDERED, ()) if hooks is None else hooks
    return Call(REBUILD, (base, offset, size, stride, False, hooks))


def tensor(t):
    t = t.detach().contiguous()
    return view(storage(t.numpy().tobytes()), tuple(t.shape), t.stride())


def record(class_name, state, source="# nothing"):
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
    return Call(RECONSTRUCT, ({**meta, "state": state},))


def module(parameters=None, modules=None, **state):
    return {"_parameters": parameters or {}, "_buffers": {}, "_modules": modules or {}, **state}


def tree(tensors, make=lambda _, state: New("ModuleDict", state)):
    """Return the state of a module tree for tensors by dotted name."""
    parameters = {name: value for name, value in tensors.items() if "." not in name}
    modules = {}
    for name, value in tensors.items():
        if "." in name:
            head, _, rest = name.partition(".")
            modules.setdefault(head, {})[rest] = value
    return module(parameters, {name: make(name, tree(t)) for name, t in modules.items()})


SONG = SongOptions(model_channels=8, channel_mult=(1,), num_blocks=1, attention_levels=())
DHARIWAL = AdmOptions(
    model_channels=64, channel_mult=(1,), num_res_blocks=1, attention_levels=(),
    min_group_channels=4,
)  # fmt: skip
SONG_ARGUMENTS = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 0, "augment_dim": 0,
    "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
    "dropout": 0.1, "embedding_type": "positional", "encoder_type": "standard",
    "decoder_type": "standard", "resample_filter": [1, 1],
}  # fmt: skip
DHARIWAL_ARGUMENTS = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 0, "augment_dim": 0,
    "model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
    "dropout": 0.1,
}  # fmt: skip


@cache
def song_tensors(options=SONG):
    ours = Song(options, 3).state_dict()
    return translate_back(song_rules(options, list(ours), 8), ours)


@cache
def song_code(options=SONG):
    """Return the tensors' opcodes by name: writing them is the slow part."""
    return {name: Raw(code(tensor(t))) for name, t in song_tensors(options).items()}


@cache
def dhariwal_code():
    ours = Adm(DHARIWAL, 3).state_dict()
    theirs = translate_back(adm_rules(DHARIWAL, list(ours), 8), ours)
    return {name: Raw(code(tensor(t))) for name, t in theirs.items()}


def snapshot(
    *, given=None, state=None, name="EDMPrecond", inner="SongUNet", tensors=None, inner_state=None,
    source="raise RuntimeError('embedded source must never run')", before=None, extra=None,
):  # fmt: skip
    """Return a snapshot that loads, but for what is changed."""
    song = inner != "DhariwalUNet"
    arguments = (SONG_ARGUMENTS if song else DHARIWAL_ARGUMENTS) | (given or {})
    weights = (song_code() if song else dhariwal_code()) if tensors is None else tensors
    network = tree(weights) | {"_init_args": (), "_init_kwargs": arguments} | (inner_state or {})
    outer = module({}, {"model": record(inner, network, source)})
    outer |= {"_init_args": (), "_init_kwargs": {}, "sigma_data": 0.5, "sigma_min": 0.0}
    outer |= {"sigma_max": float("inf")} | (state or {})
    whole = {} if before is None else {"first": before}
    whole |= {"ema": record(name, outer, source), "loss_fn": None, "augment_pipe": None}
    return pickled(whole if extra is None else {**whole, "dataset_kwargs": extra})


def laughs(levels=60, make=b"\x86"):
    """Return x = (x, x), so often that to walk it takes for ever; a list for `make` b"]..."."""
    out = b")"
    for index in range(levels):
        out += b"r" + struct.pack("<I", index) + code(get(index))
        out += make if make == b"\x86" else b""
    return Raw(out)


def laughing_lists(levels=60):
    out = code(put(0, []))
    for index in range(1, levels):
        out = out + code(put(index, [get(index - 1), get(index - 1)])) + b"0"
    return Raw(out + b"0" + code(get(levels - 1)))


def deep(levels, opening=b"]", closing=b"a"):
    """Return nested lists, or whatever the opcodes make."""
    return Raw(opening * (levels + 1) + closing * levels)


def deep_boxes(levels):
    start = code(Name(CONTAINER, "ModuleList")) + b")\x81}" + code("_modules") + b"}" + code("0")
    return Raw(start * levels + b"N" + b"ssb" * levels)


def nested_storages(levels, size):
    """Return `_load_from_bytes` of a pickle that calls `_load_from_bytes`, and so on."""
    content = bytes(size)
    for _ in range(levels):
        content = pickled(Call(LOAD, (content,)))
    return Call(LOAD, (content,))


def unknown(state=None, name="Precond", **kwargs):
    """Return a snapshot of a class we do not know, whose arguments a message shows."""
    return pickled({"ema": record(name, module(**(state or {})) | {"_init_kwargs": kwargs})})


def one_module(**state):
    """Return a snapshot whose preconditioner holds what is given, and no network we know."""
    return pickled({"ema": record("Precond", module() | state)})


def with_first_tensor(value):
    tensors = dict(song_code())
    tensors[next(iter(tensors))] = value
    return snapshot(tensors=tensors)


def colliding(count):
    """Return a dict of whole numbers with one hash."""
    keys = b"".join(long1(k * (2**61 - 1)) + b"N" for k in range(1, count + 1))
    return Raw(b"}(" + keys + b"u")


def cut(make, part):
    content = make()
    return content[: int(part * len(content))]


def text(content):
    return b"\x80\x02" + content


FUNCTIONS = [
    ("os", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "__import__"), ("__builtin__", "eval"), ("builtins", "open"), ("io", "open"),
    ("pickle", "loads"), ("_pickle", "loads"), ("torch", "load"), ("torch.serialization", "load"),
    ("functools", "partial"), ("operator", "methodcaller"), ("operator", "attrgetter"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("codecs", "encode"),
    ("_codecs", "encode"), ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy", "load"), ("numpy", "ndarray"),
    ("torch.nn.modules.linear", "Linear"), ("torch", "device"), ("torch", "FloatStorage"),
    ("torch.hub", "load"), ("torch.jit", "load"), ("pathlib", "Path"), ("shutil", "rmtree"),
    ("cmtool.cli", "main"), ("torch_utils.persistence", "_src_to_module"),
    ("dnnlib.util", "open_url"),
    ("torch.storage", "UntypedStorage"), ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.storage", "io.open_code"), ("torch", "storage._load_from_bytes"),
    ("collections", "OrderedDict.fromkeys"), ("builtins", "set.__class__"), ("", ""),
    ("os ", "system"), ("torch.storage _load_from_bytes", "x"),
]  # fmt: skip

CODE_IN_PICKLES = {
    "reduce": lambda: pickled({"ema": TOUCH}),
    "reduce, bare": lambda: pickled(TOUCH),
    "reduce beside a good network": lambda: snapshot(extra=TOUCH),
    "reduce before a good network": lambda: snapshot(before=TOUCH),
    "reduce, result thrown away": lambda: b"\x80\x04" + code(TOUCH) + b"0" + snapshot()[2:],
    "reduce by stack_global": lambda: pickled(
        {"ema": Raw(code("posix") + code("system") + b"\x93" + code((SHELL,)) + b"R")}
    ),
    "protocol 0": lambda: f"cposix\nsystem\n(S'{SHELL}'\ntR.".encode(),
    "protocol 0, marked 2": lambda: text(f"cposix\nsystem\n(S'{SHELL}'\ntR.".encode()),
    "protocol 0, eval": lambda: text(f"cbuiltins\neval\n(V{PYTHON}\ntR.".encode()),
    "inst": lambda: text(f"(S'{SHELL}'\niposix\nsystem\n.".encode()),
    "obj": lambda: text(f"(cposix\nsystem\nS'{SHELL}'\no.".encode()),
    "newobj": lambda: pickled(Raw(code(Name("subprocess", "Popen")) + code((SHELL,)) + b"\x81")),
    "newobj of a function": lambda: pickled(Raw(code(SYSTEM) + code((SHELL,)) + b"\x81")),
    "newobj of what is called": lambda: pickled(Raw(code(LOAD) + code((b"",)) + b"\x81")),
    "newobj_ex": lambda: pickled(Raw(code(SYSTEM) + code((SHELL,)) + b"}\x92")),
    "eval": lambda: pickled(Call(Name("builtins", "eval"), (PYTHON,))),
    "eval in a state": lambda: snapshot(state={"x": Call(Name("builtins", "eval"), (PYTHON,))}),
    "getattr, then called": lambda: pickled(
        Call(Call(Name("builtins", "getattr"), (Name("os", "path"), "system")), (SHELL,))
    ),
    "getattr of what is known": lambda: pickled(
        Call(Call(Name("builtins", "getattr"), (LOAD, "__globals__")), (SHELL,))
    ),
    "build on a class": lambda: pickled(
        Raw(code(Name(CONTAINER, "ModuleDict")) + code({"__init__": SYSTEM}) + b"b")
    ),
    "build on a known class": lambda: pickled(
        Raw(code(Name(CONTAINER, "ModuleDict")) + code({"__reduce__": LOAD}) + b"b")
    ),
    "build on a function": lambda: pickled(Raw(code(LOAD) + code({"__code__": 1}) + b"b")),
    "build on a record": lambda: pickled(
        Raw(code(record("EDMPrecond", {})) + code({"class_name": "x", "__class__": "y"}) + b"b")
    ),
    "build with slots": lambda: pickled(New("ModuleDict", (None, {"__class__": LOAD}))),
    "build of a dict": lambda: pickled(Raw(b"}" + code({"x": 1}) + b"b")),
    "call of a text": lambda: pickled(Call("posix.system", (SHELL,))),
    "call of a tuple": lambda: pickled(Call(("posix", "system"), (SHELL,))),
    "call of a record": lambda: pickled(Call(record("EDMPrecond", {}), (SHELL,))),
    "call with a list": lambda: pickled(Call(LOAD, [b""])),
    "call with a text": lambda: pickled(Call(LOAD, SHELL)),
    "storage pickle runs code": lambda: pickled(Call(LOAD, (pickled(TOUCH),))),
    "storage pickle runs code after the magic": lambda: pickled(
        Call(LOAD, (pickled(MAGIC) + pickled(1001) + pickled(TOUCH),))
    ),
    "storage facts run code": lambda: with_first_tensor(
        view(storage(bytes(8), facts={**SYSTEM_FACTS, "x": TOUCH}), (2,), (1,))
    ),
    "storage identity runs code": lambda: with_first_tensor(
        view(storage(bytes(8), key=TOUCH), (2,), (1,))
    ),
    "storage kind runs code": lambda: with_first_tensor(
        view(storage(bytes(8), kind=TOUCH), (2,), (1,))
    ),
    "storage keys run code": lambda: with_first_tensor(
        view(storage(bytes(8), keys=(TOUCH,)), (2,), (1,))
    ),
    "storage is a zip that runs code": lambda: pickled(Call(LOAD, (archive(TOUCH),))),
    "persistent source runs code": lambda: snapshot(source=PYTHON),
    "persistent object of another type": lambda: pickled(
        Call(RECONSTRUCT, ({"type": "module", "module_src": PYTHON, "class_name": "X"},))
    ),
    "persistent object with hooks": lambda: pickled(Call(RECONSTRUCT, ({}, TOUCH))),
    "ext1": lambda: pickled(Raw(b"\x82\x01")),
    "ext2": lambda: pickled(Raw(b"\x83\x01\x00")),
    "ext4": lambda: pickled(Raw(b"\x84\x01\x00\x00\x00")),
    "persid": lambda: pickled(Raw(b"P0\n")),
    "binpersid": lambda: pickled(Raw(code(("storage", LOAD, "0", "cpu", 1)) + b"Q")),
    "next_buffer": lambda: b"\x80\x05\x97.",
    "readonly_buffer": lambda: b"\x80\x05N\x98.",
    **{
        f"function {module}.{name}": partial(
            lambda module, name: pickled({"ema": Call(Name(module, name), (PYTHON,))}), module, name
        )
        for module, name in FUNCTIONS
    },
    **{
        f"fetched {module}.{name}": partial(
            lambda module, name: snapshot(extra=Name(module, name)), module, name
        )
        for module, name in FUNCTIONS
        if (module, name) != ("torch", "FloatStorage")
    },
}  # fmt: skip

LYING_PICKLES = {
    **{
        f"{name} of 2^{bits}": partial(
            lambda opcode, bits: pickled(Raw(opcode + struct.pack("<Q", 2**bits - 1) + b"x")),
            opcode, bits,
        )
        for name, opcode in [("binbytes8", b"\x8e"), ("binunicode8", b"\x8d"),
                             ("bytearray8", b"\x96"), ("frame", b"\x95")]
        for bits in (31, 33, 40, 62, 63, 64)
    },
    "binbytes": lambda: pickled(Raw(b"B\xff\xff\xff\xffx")),
    "binunicode": lambda: pickled(Raw(b"X\xff\xff\xff\xffx")),
    "binstring of -1": lambda: pickled(Raw(b"T\xff\xff\xff\xffx")),
    "long4 of 2^31": lambda: pickled(Raw(b"\x8b\xff\xff\xff\x7fx")),
    "long4 of -1": lambda: pickled(Raw(b"\x8b\xff\xff\xff\xffx")),
    "long1 of 255 bytes": lambda: pickled(Raw(b"\x8a\xff" + b"\x7f" * 255)),
    "long text": lambda: text(b"L" + b"9" * 1_000_000 + b"L\n."),
    "int text": lambda: text(b"I" + b"9" * 1_000_000 + b"\n."),
    "float text": lambda: text(b"F" + b"9" * 1_000_000 + b"\n."),
    "unicode text": lambda: text(b"V" + b"\\u0041" * 100_000 + b"\n."),
    "string text without quotes": lambda: text(b"Sabc\n."),
    "name of a megabyte": lambda: pickled(Name("x" * 1_000_000, "y")),
    "name without end": lambda: text(b"cposix"),
    "name that commands the terminal": lambda: pickled(Name("o\x1b]0;title\x07\x1b[2J", "\x9b31m")),
    "name of half a character": lambda: pickled(
        Raw(code("\ud800") + code("\udfff") + b"\x93")
    ),
    "name that is not text": lambda: pickled(Raw(code(1) + code(2) + b"\x93")),
    "memo bomb": lambda: pickled(Raw(b"Nr\xff\xff\xff\x7f")),
    "memo bomb of 2^32": lambda: pickled(Raw(b"Nr\xff\xff\xff\xff")),
    "memo bomb in text": lambda: text(b"Np999999999999\n."),
    "memo without a value": lambda: pickled(get(5)),
    "put on an empty stack": lambda: text(b"q\x00."),
    "memoize on an empty stack": lambda: pickled(Raw(b"\x94")),
    "pop of nothing": lambda: text(b"0."),
    "pop below a mark": lambda: text(b"N(00."),
    "tuple below a mark": lambda: text(b"NN(\x86."),
    "pop_mark without a mark": lambda: text(b"N1."),
    "stop with nothing": lambda: text(b"."),
    "stop with two": lambda: text(b"NN."),
    "stop with a mark": lambda: text(b"(N."),
    "dup": lambda: text(b"N2\x86."),
    "unknown opcode": lambda: text(b"\xff."),
    "protocol 9": lambda: b"\x80\x09" + snapshot()[2:],
    "dict of three": lambda: text(b"}(NNNu."),
    "setitems of a list": lambda: text(b"](NNu."),
    "append to a dict": lambda: text(b"}Na."),
    "additems to a list": lambda: pickled(Raw(b"](N\x90")),
    "twice the same key": lambda: pickled(table([("a", 1), ("a", 2)])),
    "twice ema": lambda: pickled(table([("ema", 1), ("ema", 2)])),
    "twice a parameter": lambda: one_module(_parameters=table([("w", None), ("w", None)])),
    "key None": lambda: pickled(table([(None, 1)])),
    "key of bytes": lambda: pickled(table([(b"ema", 1)])),
    "key that is a list": lambda: pickled(table([([], 1)])),
    "bytes follow": lambda: snapshot() + b"x",
    "a second pickle follows": lambda: snapshot() + pickled(TOUCH),
    "zeros follow": lambda: snapshot() + bytes(4096),
    "not a table": lambda: pickled([1, 2, 3]),
    "nothing in it": lambda: pickled({}),
    "ema is a text": lambda: pickled({"ema": "network"}),
    "ema is a tensor": lambda: pickled({"ema": tensor(torch.zeros(2))}),
    **{
        f"cut at {part:.3f}": partial(cut, snapshot, part)
        for part in [n / 48 for n in range(1, 48)] + [0.9999]
    },
    **{f"cut to {size} bytes": partial(lambda size: snapshot()[:size], size)
       for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 48, 63, 64, 65, 100, 200)},
}  # fmt: skip

STORAGES = {
    **{
        f"storage of {count} numbers": partial(
            lambda count: with_first_tensor(view(storage(bytes(8), count=count), (2,), (1,))), count
        )
        for count in (2**40, -1, 3, 1, 0, 2**79, 2.0, "2")
    },
    "storage of True numbers": lambda: with_first_tensor(
        view(storage(bytes(4), count=True, second=1), (1,), (1,))
    ),
    "storage says another length": lambda: with_first_tensor(
        view(storage(bytes(8), second=2**40), (2,), (1,))
    ),
    "storage says a negative length": lambda: with_first_tensor(
        view(storage(bytes(8), second=-2), (2,), (1,))
    ),
    "storage is followed": lambda: with_first_tensor(
        view(storage(bytes(8), tail=b"x"), (2,), (1,))
    ),
    "storage of another kind": lambda: with_first_tensor(
        view(storage(bytes(8), "ComplexFloatStorage"), (2,), (1,))
    ),
    "storage of no kind": lambda: with_first_tensor(
        view(storage(bytes(8), kind=LOAD), (2,), (1,))
    ),
    "storage with a view": lambda: with_first_tensor(
        view(storage(bytes(8), view=("0", 0, 2)), (2,), (1,))
    ),
    "storage of another key": lambda: with_first_tensor(
        view(storage(bytes(8), keys=("1",)), (2,), (1,))
    ),
    "storage of two keys": lambda: with_first_tensor(
        view(storage(bytes(8), keys=("0", "0")), (2,), (1,))
    ),
    "storage without magic": lambda: with_first_tensor(
        view(storage(bytes(8), magic=1), (2,), (1,))
    ),
    "storage of another version": lambda: with_first_tensor(
        view(storage(bytes(8), version=1002), (2,), (1,))
    ),
    "storage of a big-endian machine": lambda: with_first_tensor(
        view(storage(bytes(8), facts={**SYSTEM_FACTS, "little_endian": False}), (2,), (1,))
    ),
    "storage of nothing": lambda: pickled(Call(LOAD, (b"",))),
    "storage of a text": lambda: pickled(Call(LOAD, ("x",))),
    "storage without arguments": lambda: pickled(Call(LOAD, ())),
    "storage cut": lambda: pickled(Call(LOAD, (stored(bytes(8))[:60],))),
    "storage without elements": lambda: pickled(Call(LOAD, (stored(b"", count=0)[:-8],))),
    "one storage 100,000 times": lambda: pickled(
        [put(0, stored(bytes(4))), *[Call(LOAD, (get(0),))] * 100_000]
    ),
    "one storage of a megabyte 1,000 times": lambda: pickled(
        [put(0, stored(bytes(1 << 20))), *[Call(LOAD, (get(0),))] * 1000]
    ),
    "storages in storages": lambda: pickled({"ema": nested_storages(60, 16)}),
    "storages in storages, large": lambda: pickled({"ema": nested_storages(240, 4 << 20)}),
    "tensor larger than its storage": lambda: with_first_tensor(
        view(storage(bytes(8)), (1000,), (1,))
    ),
    "tensor beyond its storage": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,), (1,), offset=2)
    ),
    "tensor at a negative place": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,), (1,), offset=-1)
    ),
    "tensor of negative size": lambda: with_first_tensor(view(storage(bytes(8)), (-2, -1), (1, 1))),
    "tensor of negative stride": lambda: with_first_tensor(
        view(storage(bytes(8)), (2,), (-1,), offset=1)
    ),
    "tensor of stride 0": lambda: with_first_tensor(view(storage(bytes(8)), (10**12,), (0,))),
    "tensor of stride 2^62": lambda: with_first_tensor(
        view(storage(bytes(8)), (2, 2), (2**62, 2**62))
    ),
    "tensor of size 2^79": lambda: with_first_tensor(view(storage(bytes(8)), (2**79,), (1,))),
    "tensor of one number, stride 2^79": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,), (2**79,))
    ),
    "tensor of no number, size 2^79": lambda: with_first_tensor(
        view(storage(bytes(8)), (0, 2**79), (1, 1))
    ),
    "tensor of no number, size 2^62": lambda: with_first_tensor(
        view(storage(bytes(8)), (2**62, 2**62, 0), (1, 1, 1))
    ),
    "tensor of no number, unknown class": lambda: unknown(
        {"parameters": {"w": view(storage(bytes(8)), (2**70, 0), (1, 1))}}
    ),
    "tensor of nine dimensions": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,) * 9, (1,) * 9)
    ),
    "tensor of 200,000 dimensions": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,) * 200_000, (1,) * 200_000)
    ),
    "tensor of broken size": lambda: with_first_tensor(view(storage(bytes(8)), (1.5,), (1,))),
    "tensor of size True": lambda: with_first_tensor(view(storage(bytes(8)), (True,), (1,))),
    "tensor of a list of sizes": lambda: with_first_tensor(view(storage(bytes(8)), [2], (1,))),
    "tensor of two sizes, one stride": lambda: with_first_tensor(
        view(storage(bytes(8)), (1, 2), (1,))
    ),
    "tensor without storage": lambda: with_first_tensor(view("storage", (1,), (1,))),
    "tensor with hooks": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,), (1,), hooks={"x": LOAD})
    ),
    "tensor without arguments": lambda: pickled(Call(REBUILD, ())),
    "parameter without tensor": lambda: pickled(Call(PARAMETER, ("x", True, Call(ORDERED, ())))),
    "parameter that is a list": lambda: with_first_tensor([1.0, 2.0]),
    "tensor of another shape": lambda: with_first_tensor(view(storage(bytes(8)), (2,), (1,))),
    "tensor of one number": lambda: with_first_tensor(view(storage(bytes(8)), (), ())),
    "tensor of nan": lambda: snapshot(
        tensors={
            name: Raw(code(tensor(torch.full_like(t, float("nan")))))
            for name, t in song_tensors().items()
        }
    ),
    "2,000 views of a megabyte": lambda: snapshot(
        tensors={
            "first": put(0, view(storage(bytes(1 << 20)), (1 << 18,), (1,))),
            **{f"w{n}": get(0) for n in range(2000)},
        }
    ),
    "20,000 numbers of a storage of four megabytes": lambda: snapshot(
        tensors={
            "first": put(0, view(storage(bytes(4 << 20)), (1,), (1,))),
            **{f"w{n}": get(0) for n in range(20_000)},
        }
    ),
    "numpy object": lambda: pickled(
        Call(Name("numpy.core.multiarray", "scalar"), (Call(Name("numpy", "dtype"), ("O8",)), b""))
    ),
    "numpy number of the wrong length": lambda: pickled(
        Call(
            Name("numpy.core.multiarray", "scalar"),
            (Call(Name("numpy", "dtype"), ("f8", False, True)), b"123"),
        )
    ),
    "numpy byte order": lambda: pickled(
        Raw(code(Call(Name("numpy", "dtype"), ("f8",))) + code((3, ">", None)) + b"b")
    ),
    "ordered dict of pairs": lambda: pickled(Call(ORDERED, ([("a", 1)],))),
}  # fmt: skip

BOMBS = {
    "laughs": lambda: snapshot(extra=laughs()),
    "laughs as ema": lambda: pickled({"ema": laughs()}),
    "laughs as a key": lambda: pickled(table([(laughs(), 1)])),
    "laughs in a set": lambda: pickled(Raw(b"\x8f(" + code(laughs()) + b"\x90")),
    "laughs in a set of protocol 2": lambda: pickled(
        Call(Name("builtins", "set"), ([laughs()],))
    ),
    "laughs in a frozenset": lambda: pickled(Raw(b"(" + code(laughs()) + b"\x91")),
    "laughs as a class name": lambda: pickled({"ema": record(laughs(), {})}),
    "laughs as an argument shown": lambda: unknown(model_channels=laughs()),
    "laughs of lists as an argument shown": lambda: unknown(model_channels=laughing_lists()),
    "laughs as an argument": lambda: snapshot(given={"num_blocks": laughs()}),
    "laughs as a choice": lambda: snapshot(given={"embedding_type": laughs()}),
    "laughs as a list": lambda: snapshot(given={"channel_mult": laughs()}),
    "laughs as attention": lambda: snapshot(given={"attn_resolutions": laughs()}),
    "laughs as a note": lambda: snapshot(given={"label_dropout": laughs()}),
    "laughs as positional arguments": lambda: snapshot(inner_state={"_init_args": laughs()}),
    "laughs as sigma_data": lambda: snapshot(state={"sigma_data": laughs()}),
    "laughs as a size": lambda: with_first_tensor(view(storage(bytes(8)), (laughs(),), (1,))),
    "laughs as hooks": lambda: with_first_tensor(
        view(storage(bytes(8)), (1,), (1,), hooks=laughs())
    ),
    "laughs as a storage's key": lambda: with_first_tensor(
        view(storage(bytes(8), keys=(laughs(),)), (2,), (1,))
    ),
    "laughs as a storage's identity": lambda: with_first_tensor(
        view(storage(bytes(8), key=laughs()), (2,), (1,))
    ),
    "laughs as a storage's magic": lambda: with_first_tensor(
        view(storage(bytes(8), magic=laughs()), (2,), (1,))
    ),
    "laughs as a numpy type": lambda: pickled(Call(Name("numpy", "dtype"), (laughs(),))),
    "laughs as a numpy state": lambda: pickled(
        Raw(code(Call(Name("numpy", "dtype"), ("f8",))) + code((3, laughs())) + b"b")
    ),
    "laughs as an ordered dict": lambda: pickled(Call(ORDERED, (laughs(),))),
    "laughs as a buffer set": lambda: snapshot(
        inner_state={"_buffers": {"b": None}, "_non_persistent_buffers_set": laughs()}
    ),
    "laughs as label_dropout of a list": lambda: snapshot(
        given={"label_dropout": laughing_lists()}
    ),
    "numbers of one hash": lambda: snapshot(extra=colliding(100_000)),
    "list 200,000 deep": lambda: snapshot(extra=deep(200_000)),
    "list 200,000 deep as ema": lambda: pickled({"ema": deep(200_000)}),
    "list 200,000 deep as an argument": lambda: snapshot(given={"num_blocks": deep(200_000)}),
    "list 200,000 deep as a choice": lambda: snapshot(given={"embedding_type": deep(200_000)}),
    "list 200,000 deep as an argument shown": lambda: unknown(x=deep(200_000)),
    "list 200,000 deep as a note": lambda: snapshot(given={"label_dropout": deep(200_000)}),
    "tuple 200,000 deep": lambda: snapshot(extra=deep(200_000, b")", b"\x85")),
    "tuple 200,000 deep as a key": lambda: pickled(table([(deep(200_000, b")", b"\x85"), 1)])),
    "table 90,000 deep": lambda: snapshot(
        extra=Raw(b"}X\x00\x00\x00\x00" * 90_000 + b"N" + b"s" * 90_000)
    ),
    "boxes 40,000 deep": lambda: snapshot(extra=deep_boxes(40_000)),
    "boxes 40,000 deep as a network": lambda: unknown({"modules": {"0": deep_boxes(40_000)}}),
    "list in itself": lambda: snapshot(extra=Raw(code(put(0, [])) + code(get(0)) + b"a")),
    "list in itself as an argument shown": lambda: unknown(
        x=Raw(code(put(0, [])) + code(get(0)) + b"a")
    ),
    "table in itself as ema": lambda: pickled(
        Raw(code(put(0, {})) + code("ema") + code(get(0)) + b"s")
    ),
    "module in itself": lambda: pickled({
        "ema": Raw(
            code(record("Precond", put(0, module())))
            + code(put(1, None)) + b"0r\x02\x00\x00\x00"
            + code(get(0)) + code("_modules") + code({"a": get(2)}) + b"s0"
        )
    }),
    "module shared": lambda: unknown({"modules": {"a": put(0, New("ModuleDict", module())),
                                                  "b": get(0)}}),
    "module 40 deep": lambda: unknown({"modules": {"a": sequentials(40)}}),
    "module that is a number": lambda: unknown({"modules": {"a": 7}}),
    "module whose parameters are a list": lambda: one_module(_parameters=[1]),
    "module whose modules are a text": lambda: one_module(_modules="abc"),
    "module with numbers for names": lambda: one_module(_parameters={1: None}),
    "parameters shared by 10,000 modules": lambda: unknown({
        "parameters": put(0, {
            "first": put(1, tensor(torch.zeros(1))), **{f"w{n}": get(1) for n in range(10_000)}
        }),
        "modules": {
            f"m{n}": New("ModuleDict", {"_parameters": get(0)}) for n in range(10_000)
        },
    }),
    "50,000 buffers looked for in a list": lambda: one_module(
        _buffers={f"b{n}": 1 for n in range(50_000)},
        _non_persistent_buffers_set=[f"{n}" for n in range(50_000)] +
        [f"b{n}" for n in range(50_000)],
    ),
    "buffers looked for in a number": lambda: one_module(
        _buffers={"b": 1}, _non_persistent_buffers_set=7
    ),
    "one source met 20,000 times": lambda: pickled([
        put(0, ({"type": "class", "class_name": "x", "state": {}, "module_src": "x" * 1_000_000},)),
        *[Raw(code(RECONSTRUCT) + code(get(0)) + b"R0N")] * 20_000,
    ]),
    "one list made a set 20,000 times": lambda: pickled([
        put(0, (many("x", 50_000),)),
        *[Raw(code(Name("builtins", "set")) + code(get(0)) + b"R0N")] * 20_000,
    ]),
    "one list of names made a set 2,000 times": lambda: pickled([
        put(0, ([f"{n}" for n in range(20_000)],)),
        *[Call(Name("builtins", "set"), get(0))] * 2000,
    ]),
    "490,000 opcodes": lambda: pickled(Raw(b"N0" * 245_000 + b"}")),
    "490,000 marks": lambda: pickled(Raw(b"(0" * 245_000 + b"}")),
    "490,000 sets": lambda: pickled(Raw(b"(" + b"\x8f" * 490_000 + b"l")),
    "490,000 frames": lambda: pickled(Raw((b"\x95" + bytes(8)) * 490_000 + b"}")),
    "490,000 memos": lambda: pickled(Raw(b"N" + b"\x94" * 490_000)),
    "2,000,000 opcodes": lambda: pickled(Raw(b"N0" * 1_000_000 + b"}")),
    "150,000 names of parameters": lambda: unknown({
        "parameters": {f"{n}": None for n in range(150_000)}
    }),
}  # fmt: skip


def sequentials(levels):
    out = New("Sequential", module())
    for _ in range(levels):
        out = New("Sequential", module({}, {"0": out}))
    return out


HUGE = [10**9, 2**79, -1, 1.5, float("nan"), float("inf"), "4", None, [4], {}, True]
ARGUMENTS = {
    "num_blocks": [*HUGE, 0, 1 << 20, 1025, 1000],
    "model_channels": [*HUGE, 10**12, 0, 1, 2, 3, 1 << 20],
    "label_dim": [*HUGE, 1 << 20],
    "augment_dim": [*HUGE, 1 << 20],
    "in_channels": [*HUGE, 0, 1 << 20],
    "out_channels": HUGE[:6],
    "img_resolution": [*HUGE, 0, 5000],
    "channel_mult": [*HUGE, [], [0], [-1], [10**9], [1.5], [[1]], [1] * 17, "abc", [1 << 20],
                     [1] * 16],
    "attn_resolutions": [[10**9] * 17, "8", [8.0], [None], [8] * 16],
    "embedding_type": [7, [], {}, "x", "fourier"],
    "encoder_type": [7, [], "x"],
    "decoder_type": [7, [], "x"],
    "resample_filter": [*HUGE, [], [0, 0], [-1, 1], [1], [1] * 17, [10**9, 1], [[1, 1]], [1] * 16],
    "dropout": [float("nan"), float("inf"), -0.1, 1, 1.0, 10**400, "0", None, []],
    "channel_mult_emb": [*HUGE, 0, 1 << 20],
    "channel_mult_noise": [*HUGE, 0, 1 << 20],
    "label_dropout": ["\x1b[2Jx", "x\nhint: run this"],
}  # fmt: skip
STATES = {
    "sigma_data": [0, 0.0, -1.0, float("nan"), "0.5", None, [], 10**70],
    "sigma_min": [100.0, -1.0, float("nan"), float("inf"), "x", 10**23],
    "sigma_max": [0, 0.001, -1.0, float("nan"), "x", None],
}  # fmt: skip
OTHER_PRECONDITIONERS = {
    "VPPrecond": {
        "beta_d": ["x", -1.0, float("nan"), None],
        "beta_min": ["x", -1.0, float("nan")],
        "M": [10**9, -1, 1.5, "x", None, 2**79],
    },
    "iDDPMPrecond": {
        "C_1": ["x", -1.0, [], 0.0, 2.0, float("inf")],
        "C_2": ["x", -1.0, float("nan"), float("inf"), 1e308],
        "M": [10**9, -1, "x", 0, 1, 100_000, 2**79],
    },
}

ARCHITECTURES = {
    **{
        f"{key} = {repr(value)[:30]}": partial(lambda key, value: snapshot(given={key: value}),
                                               key, value)
        for key, values in ARGUMENTS.items()
        for value in values
        if (key, repr(value)) not in {
            ("label_dim", "0"), ("dropout", "0"), ("out_channels", "True"),
        }
    },
    **{
        f"DhariwalUNet {key} = {repr(value)[:30]}": partial(
            lambda key, value: snapshot(inner="DhariwalUNet", given={key: value}), key, value
        )
        for key in ("num_blocks", "model_channels", "channel_mult", "channel_mult_emb")
        for value in ARGUMENTS[key]
    },
    **{
        f"{key} = {repr(value)[:30]}": partial(lambda key, value: snapshot(state={key: value}),
                                               key, value)
        for key, values in STATES.items()
        for value in values
    },
    **{
        f"{name} {key} = {repr(value)[:30]}": partial(
            lambda name, key, value: snapshot(name=name, state={key: value}), name, key, value
        )
        for name, states in OTHER_PRECONDITIONERS.items()
        for key, values in states.items()
        for value in values
    },
    "16 levels of 64 blocks": lambda: snapshot(given={"channel_mult": [1] * 16, "num_blocks": 64}),
    "1,024 blocks of a million channels": lambda: snapshot(
        given={"num_blocks": 1024, "model_channels": 1 << 20}
    ),
    "positional arguments": lambda: snapshot(inner_state={"_init_args": (8, 3, 3)}),
    "arguments that are a list": lambda: snapshot(inner_state={"_init_kwargs": [1]}),
    "arguments that are missing": lambda: snapshot(inner_state={"_init_kwargs": {}}),
    "network of another class": lambda: snapshot(inner="ResNet"),
    "network of a class that commands the terminal": lambda: snapshot(inner="\x1b]0;t\x07\x1b[2J"),
    "network of a class of two lines": lambda: snapshot(inner="x\nhint: run this"),
    "network of a class of half a character": lambda: snapshot(inner="\ud800"),
    "network of a class of a megabyte": lambda: snapshot(inner="x" * 1_000_000),
    "preconditioner of another class": lambda: snapshot(name="os.system"),
    "preconditioner that commands the terminal": lambda: snapshot(name="\x1b]0;t\x07\x1b[2J"),
    "argument that commands the terminal": lambda: unknown(x="\x1b]0;t\x07\x1b[2J\u202e"),
    "preconditioner without network": lambda: snapshot(state={"_modules": {}}),
    "preconditioner whose network is a text": lambda: snapshot(state={"_modules": {"model": "x"}}),
    "parameter that commands the terminal": lambda: snapshot(
        tensors={**song_code(), "\x1b]0;t\x07\x1b[2J": next(iter(song_code().values()))}
    ),
    "parameter of two lines": lambda: snapshot(
        tensors={**song_code(), "!\nhint: run this": next(iter(song_code().values()))}
    ),
    "parameter by two paths": lambda: snapshot(
        inner_state={"_parameters": dict([next(iter(song_code().items()))])}
    ),
    "parameter too many": lambda: snapshot(
        tensors={**song_code(), "more": next(iter(song_code().values()))}
    ),
    "parameter too few": lambda: snapshot(tensors=dict(list(song_code().items())[1:])),
    "no parameters": lambda: snapshot(tensors={}),
}  # fmt: skip


# ---- archives of torch.save ----------------------------------------------------------------------


def archive(content, records=None, *, method=zipfile.ZIP_STORED, name="archive", more=()):
    """Return a zip laid out as torch.save does, around any pickle."""
    out = io.BytesIO()
    data = (
        content
        if isinstance(content, bytes)
        else pickled(content).replace(b"\x80\x04", b"\x80\x02", 1)
    )
    with zipfile.ZipFile(out, "w", method, compresslevel=1) as opened:
        opened.writestr(f"{name}/data.pkl", data)
        opened.writestr(f"{name}/byteorder", b"little")
        for key, value in (records or {}).items():
            opened.writestr(f"{name}/data/{key}", value)
        opened.writestr(f"{name}/version", b"3\n")
        for key, value in more:
            opened.writestr(key, value)
    return out.getvalue()


def kept(key="0", count=2, kind="FloatStorage"):
    """Return a reference to a record of the archive."""
    return Raw(code(("storage", Name("torch", kind), key, "cpu", count)) + b"Q")


def saved(content, **kwargs):
    out = io.BytesIO()
    torch.save(content, out, **kwargs)
    return out.getvalue()


OPENAI = AdmOptions(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,),
                    head_channels=32)  # fmt: skip


@cache
def module_state():
    return Adm(OPENAI, 3).state_dict()


def adm_state():
    return dict(module_state())


@cache
def good_pt():
    return saved(module_state())


def openai(**changes):
    return saved(OrderedDict(adm_state() | changes))


def archived(records=None, **changes):
    """Return a good file written opcode by opcode, but for what is changed; names use __ for dots.

    The storages of the changes are "x0", "x1", ...
    """
    records = dict(records or {})
    entries = {}
    for number, (name, t) in enumerate(adm_state().items()):
        records[f"{number}"] = t.contiguous().numpy().tobytes()
        entries[name] = strided(kept(f"{number}", t.numel()), tuple(t.shape), t.stride())
    return archive(entries | {name.replace("__", "."): v for name, v in changes.items()}, records)


def strided(base, size, stride, offset=0):
    return rebuilt("_rebuild_tensor_v2", base, offset, size, stride, False, Call(ORDERED, ()))


def biased(base, size, stride, offset=0):
    """Return a file whose last bias of three numbers is another view; x0 is its storage."""
    return archived({"x0": bytes(12)}, out__2__bias=strided(base, size, stride, offset))


def layout(name):
    return Call(Name("torch.serialization", "_get_layout"), (f"torch.{name}",))


def hollow(blocks, width=0):
    """Return a state dict of tensors without numbers, whose names tell of many blocks."""
    state = {
        "time_embed.0.weight": torch.zeros(0, 32),
        "input_blocks.0.0.weight": torch.zeros(0, 3),
        "out.0.weight": torch.zeros(0),
        "out.2.weight": torch.zeros(3, 0),
        "input_blocks.1.0.out_layers.3.weight": torch.zeros(width or 32, 0),
        "input_blocks.1.0.emb_layers.1.weight": torch.zeros(64, 0),
    }
    for n in range(blocks):
        state[f"input_blocks.{n}.x"] = state[f"output_blocks.{n}.x"] = torch.zeros(0)
    return saved(state)


def bad_directory():
    content = bytearray(good_pt())
    at = content.rindex(b"PK\x01\x02")
    content[at : at + 4] = b"PK\x09\x09"
    return bytes(content)


def two_directories():
    """Return a zip in which readers of zip64 find one directory or the other.

    The one that is found just before the locator is that of a good file; the locator points to
    the other, whose pickle is compressed a thousand times.
    """
    size = 400_000_000
    piece = zlib.compressobj(1, zlib.DEFLATED, -15)
    blank = piece.compress(bytes(1 << 20)) + piece.flush(zlib.Z_FULL_FLUSH)
    rest = size % (1 << 20)
    end = zlib.compressobj(1, zlib.DEFLATED, -15)
    head = b"\x80\x02X" + struct.pack("<I", size)
    start = zlib.compressobj(0, zlib.DEFLATED, -15)
    squeezed = (
        start.compress(head) + start.flush(zlib.Z_FULL_FLUSH) + blank * (size >> 20)
        + end.compress(bytes(rest) + b".") + end.flush()
    )  # fmt: skip
    whole = zlib.crc32(head)
    for _ in range(size >> 20):
        whole = zlib.crc32(bytes(1 << 20), whole)
    whole = zlib.crc32(bytes(rest) + b".", whole)
    version = ("version", 0, b"3\n", 2, zlib.crc32(b"3\n"))
    out, directories = b"", []
    for folder, members in [
        ("a", [("data.pkl", 8, squeezed, size + len(head) + 1, whole), version]),
        ("b", [("data.pkl", 0, EMPTY, 4, zlib.crc32(EMPTY)), version]),
    ]:
        directory = b""
        for name, method, data, length, check in members:
            path = f"{folder}/{name}".encode()
            facts = struct.pack(
                "<HHHHHIIIHH", 20, 0, method, 0, 33, check, len(data), length, len(path), 0
            )
            directory += b"PK\x01\x02" + struct.pack("<H", 20) + facts
            directory += struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + path
            out += b"PK\x03\x04" + facts + path + data
        directories.append(directory)
    ends = []
    for directory in directories:
        ends.append(len(out) + len(directory))
        facts = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2, 2, len(directory), len(out))
        out += directory + b"PK\x06\x06" + facts
    out += b"PK\x06\x07" + struct.pack("<IQI", 0, ends[0], 1)
    full = 65535, 65535, 2**32 - 1, 2**32 - 1
    return out + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *full, 0)


def legacy(*parts, tail=b""):
    return b"".join(p if isinstance(p, bytes) else pickled(p).replace(b"\x04", b"\x02", 1)
                    for p in parts) + tail  # fmt: skip


def legacy_pt(content, keys=(), tail=b""):
    """Return a torch.save file from before the archives."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    return legacy(magic, 1001, SYSTEM_FACTS, content, list(keys), tail=tail)


def old_storage(count=2, key="0"):
    return Raw(code(("storage", Name("torch", "FloatStorage"), key, "cpu", count, None)) + b"Q")


def whole_module():
    return saved(nn.Sequential(nn.Linear(2, 2)))


def rebuilt(name, *args):
    return Call(Name("torch._utils", name), args)


ARCHIVES = {
    "code": lambda: archive(TOUCH),
    "code in a table": lambda: archive({"a": TOUCH}, {"0": bytes(8)}),
    "code by eval": lambda: archive(Call(Name("builtins", "eval"), (PYTHON,))),
    "code by getattr": lambda: archive(Call(Name("builtins", "getattr"), (SYSTEM, "__call__"))),
    "code by inst": lambda: archive(text(f"(S'{SHELL}'\niposix\nsystem\n.".encode())),
    "code by obj": lambda: archive(text(f"(cposix\nsystem\nS'{SHELL}'\no.".encode())),
    "code by newobj": lambda: archive(
        Raw(code(Name("subprocess", "Popen")) + code((SHELL,)) + b"\x81")
    ),
    "code in a nested load": lambda: archive(Call(LOAD, (pickled(TOUCH),))),
    "code by persistence": lambda: archive({"net": record("EDMPrecond", module(), PYTHON)}),
    "code in a storage's type": lambda: archive(
        {"a": Raw(code(("storage", TOUCH, "0", "cpu", 2)) + b"Q")}, {"0": bytes(8)}
    ),
    "code by dotted names": lambda: archive(
        Call(Name("torch", "serialization.os.system"), (SHELL,))
    ),
    "code of torch": lambda: archive(Call(Name("torch.serialization", "load"), (CANARY,))),
    "code in torchscript": lambda: archive(
        {}, more=[("archive/constants.pkl", pickled(())), ("archive/code/__torch__.py", PYTHON)]
    ),
    "code in a legacy file": lambda: legacy_pt(TOUCH),
    "code in a legacy file's facts": lambda: legacy(
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", 1001, TOUCH
    ),
    "code in a legacy file's keys": lambda: legacy(
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", 1001, SYSTEM_FACTS, {}, TOUCH
    ),
    "whole module": whole_module,
    "whole module, legacy": lambda: saved(
        nn.Linear(2, 2), _use_new_zipfile_serialization=False
    ),
    "training state": lambda: archive(
        {"net": record("EDMPrecond", module()), "optimizer_state": {"state": {}}}
    ),
    "optimizer state": lambda: saved({"state": {0: {"step": 1}}, "param_groups": [{"lr": 1.0}]}),
    "name that commands the terminal": lambda: archive(Name("o\x1b]0;t\x07", "\x1b[2J")),
    "tensor that commands the terminal": lambda: openai(**{"\x1b]0;t\x07\x1b[2J": torch.zeros(1)}),
    "entry that commands the terminal": lambda: saved({"\x1b]0;t\x07\x1b[2J": 1}),
    "entry of two lines": lambda: saved({"x\nhint: run this": 1}),
    "bytearray of 8 GB": lambda: archive({"a": Call(Name("builtins", "bytearray"), (8 * 10**9,))}),
    "bytearray of 1 GB": lambda: archive({"a": Call(Name("builtins", "bytearray"), (10**9,))}),
    "laughs": lambda: archive({"a": laughs()}),
    "laughs as a key": lambda: archive(table([(laughs(), 1)])),
    "laughs in a set": lambda: archive({"a": Call(Name("builtins", "set"), ([laughs()],))}),
    "laughs in a counter": lambda: archive(
        {"a": Call(Name("collections", "Counter"), ([laughs()],))}
    ),
    "laughs as a size": lambda: archive({"a": Call(Name("torch", "Size"), (laughs(),))}),
    "laughs as a storage": lambda: archive({"a": Raw(code(laughs()) + b"Q")}),
    "numbers of one hash": lambda: archive(colliding(60_000)),
    "list 200,000 deep": lambda: archive({"a": deep(200_000)}),
    "8,000,000 tables": lambda: archive(Raw(b"(" + b"}" * 8_000_000 + b"l")),
    "8,000,000 opcodes": lambda: archive(Raw(b"(" + b"N" * 8_000_000 + b"l")),
    "memo bomb": lambda: archive(Raw(b"}r\xff\xff\xff\x7f")),
    "binunicode that lies": lambda: archive(Raw(b"X\xff\xff\xff\x7fx")),
    "binbytes8 that lies": lambda: archive(Raw(b"\x8e" + struct.pack("<Q", 2**40) + b"x")),
    "long4": lambda: archive(Raw(b"\x8b\xff\xff\xff\x7fx")),
    "unknown opcode": lambda: archive(text(b"\xff.")),
    "pickle of nothing": lambda: archive(b""),
    "ordered dict that shadows its methods": lambda: archive(
        Raw(
            code(Call(ORDERED, ()))
            + code({"items": 1, "get": Name("builtins", "bytearray")}) + b"b"
        )
    ),
    "state dict whose versions shadow its methods": lambda: archive(
        Raw(code(Call(ORDERED, ())) + code({"_metadata": {}, "items": 1}) + b"b")
    ),
    "state dict whose versions run code": lambda: archive(
        Raw(code(Call(ORDERED, ())) + code({"_metadata": TOUCH}) + b"b")
    ),
    "state dict whose versions are its class": lambda: archive(
        Raw(code(Call(ORDERED, ())) + code((None, {"_metadata": {}})) + b"b")
    ),
    "tensors that shadow their methods": lambda: archived(
        {"x0": bytes(12)},
        out__2__bias=rebuilt(
            "_rebuild_from_type_v2", REBUILD, Name("torch", "Tensor"),
            (kept("x0", 3), 0, (3,), (1,), False, Call(ORDERED, ())),
            {"float": Name("builtins", "bytearray"), "is_floating_point": 1},
        ),
    ),
    "storage that lies": lambda: biased(kept("x0", 2**40), (3,), (1,)),
    "storage that takes what follows": lambda: biased(kept("x0", 300), (3,), (1,), offset=200),
    "storage beyond the file": lambda: biased(kept("x0", 10**6), (3,), (1,), offset=10**6 - 3),
    "storage of -1": lambda: biased(kept("x0", -1), (3,), (1,)),
    "storage of 2^62": lambda: biased(kept("x0", 2**62), (3,), (1,)),
    "storage of 2^70": lambda: biased(kept("x0", 2**70), (3,), (1,)),
    "storage that is missing": lambda: biased(kept("x7", 3), (3,), (1,)),
    "storage by another path": lambda: biased(kept("../../../x", 3), (3,), (1,)),
    "storage that is the pickle": lambda: biased(kept("../data.pkl", 3), (3,), (1,)),
    "tensor larger than its storage": lambda: biased(kept("x0", 3), (10**9,), (1,)),
    "tensor of negative size": lambda: biased(kept("x0", 3), (-3,), (1,)),
    "tensor of negative stride": lambda: biased(kept("x0", 3), (3,), (-1,), offset=2),
    "tensor beyond its storage": lambda: biased(kept("x0", 3), (3,), (1,), offset=2**62),
    "tensor at a negative place": lambda: biased(kept("x0", 3), (3,), (1,), offset=-1),
    "tensor of size 2^70": lambda: biased(kept("x0", 3), (2**70,), (1,)),
    "tensor of nine dimensions": lambda: biased(kept("x0", 3), (1,) * 9, (1,) * 9),
    "tensor of 200,000 dimensions": lambda: biased(kept("x0", 3), (1,) * 200_000, (1,) * 200_000),
    "tensor of stride 0": lambda: archived(
        {"x0": bytes(4)},
        time_embed__0__weight=strided(kept("x0", 1), (10**6, 10**6), (0, 0)),
    ),
    "tensor of stride 0 in place": lambda: archived(
        {"x0": bytes(4)}, label_emb__weight=strided(kept("x0", 1), (2**30, 128), (0, 0))
    ),
    "2,000 names of one tensor": lambda: saved(
        dict.fromkeys([f"w{n}" for n in range(2000)], torch.zeros(1 << 18))
    ),
    "sparse tensor": lambda: archived(
        {"x0": bytes(8), "x1": bytes(4)},
        out__2__bias=rebuilt(
            "_rebuild_sparse_tensor", layout("sparse_coo"),
            (strided(kept("x0", 1, "LongStorage"), (1, 1), (1, 1)),
             strided(kept("x1", 1), (1,), (1,)), (3,), True),
        ),
    ),
    "sparse tensor that lies": lambda: archived(
        {"x0": struct.pack("<qq", -5, 2**60), "x1": bytes(8)},
        out__2__bias=rebuilt(
            "_rebuild_sparse_tensor", layout("sparse_coo"),
            (strided(kept("x0", 2, "LongStorage"), (1, 2), (2, 1)),
             strided(kept("x1", 2), (2,), (1,)), (3,), True),
        ),
    ),
    "sparse tensor of 10^12": lambda: archived(
        {"x0": bytes(8), "x1": bytes(4)},
        out__2__bias=rebuilt(
            "_rebuild_sparse_tensor", layout("sparse_coo"),
            (strided(kept("x0", 1, "LongStorage"), (1, 1), (1, 1)),
             strided(kept("x1", 1), (1,), (1,)), (10**12,), True),
        ),
    ),
    "quantized tensor": lambda: archived(
        {"x0": bytes(3)},
        out__2__bias=rebuilt(
            "_rebuild_qtensor", kept("x0", 3, "QUInt8Storage"), 0, (3,), (1,),
            (Name("torch", "per_tensor_affine"), 1.0, 0), False, Call(ORDERED, ()),
        ),
    ),
    "nested tensor": lambda: archived(
        {"x0": bytes(12), "x1": struct.pack("<q", 3), "x2": struct.pack("<q", 1), "x3": bytes(8)},
        out__2__bias=rebuilt(
            "_rebuild_nested_tensor", strided(kept("x0", 3), (3,), (1,)),
            strided(kept("x1", 1, "LongStorage"), (1, 1), (1, 1)),
            strided(kept("x2", 1, "LongStorage"), (1, 1), (1, 1)),
            strided(kept("x3", 1, "LongStorage"), (1,), (1,)),
        ),
    ),
    "nested tensor that lies": lambda: archived(
        {"x0": bytes(12), "x1": struct.pack("<q", 2**40), "x2": struct.pack("<q", 1),
         "x3": struct.pack("<q", 2**40)},
        out__2__bias=rebuilt(
            "_rebuild_nested_tensor", strided(kept("x0", 3), (3,), (1,)),
            strided(kept("x1", 1, "LongStorage"), (1, 1), (1, 1)),
            strided(kept("x2", 1, "LongStorage"), (1, 1), (1, 1)),
            strided(kept("x3", 1, "LongStorage"), (1,), (1,)),
        ),
    ),
    "meta tensor": lambda: archived(
        out__2__bias=rebuilt(
            "_rebuild_meta_tensor_no_storage", Name("torch", "float32"), (3,), (1,), False
        )
    ),
    "meta tensor of 2^60": lambda: archived(
        out__2__bias=rebuilt(
            "_rebuild_meta_tensor_no_storage", Name("torch", "float32"), (2**60,), (1,), False
        )
    ),
    "meta tensors only": lambda: saved({k: v.to("meta") for k, v in adm_state().items()}),
    "wrapper tensor": lambda: archived(
        out__2__bias=rebuilt(
            "_rebuild_wrapper_subclass", Name("torch", "Tensor"), Name("torch", "float32"), (3,),
            (1,), 0, layout("strided"), Call(Name("torch", "device"), ("cpu",)), False,
        )
    ),
    "tensor for another device": lambda: archived(
        {"x0": bytes(12)},
        out__2__bias=rebuilt(
            "_rebuild_device_tensor_from_cpu_tensor", strided(kept("x0", 3), (3,), (1,)),
            Name("torch", "float32"), "cuda:7", False,
        ),
    ),
    "tensor by its class": lambda: archived(
        {"x0": bytes(12)},
        out__2__bias=Raw(
            code(Name("torch", "Tensor")) + b")\x81"
            + code((kept("x0", 3), 10**12, (10**12,), (1,))) + b"b"
        ),
    ),
    "tensor of 10^10 numbers by its class": lambda: archived(
        out__2__bias=Raw(code(Name("torch", "Tensor")) + code((10**10,)) + b"\x81")
    ),
    "parameter of 10^10 numbers by its class": lambda: archived(
        out__2__bias=Call(Name("torch", "Tensor"), (10**10,))
    ),
    "complex tensor": lambda: openai(**{"out.2.bias": torch.zeros(3, dtype=torch.complex64)}),
    "tensor of nan": lambda: openai(**{"out.2.bias": torch.full((3,), float("nan"))}),
    "tensor of another shape": lambda: openai(**{"out.2.bias": torch.zeros(3, 1, 1)}),
    "tensor of no dimensions": lambda: openai(**{"out.2.weight": torch.zeros(())}),
    "tensor of one dimension": lambda: openai(**{"time_embed.0.weight": torch.zeros(128)}),
    "norm of no channels": lambda: openai(
        **{"input_blocks.1.0.out_layers.3.weight": torch.zeros(0)}
    ),
    "table of tables": lambda: saved({"model": {"a": {"b": adm_state()}}}),
    "state_dict of state_dict": lambda: saved({"state_dict": {"state_dict": adm_state()}}),
    "list of tensors": lambda: saved([torch.zeros(2)]),
    "tensor alone": lambda: saved(torch.zeros(2)),
    "number alone": lambda: saved(7),
    "numbers for names": lambda: saved({7: torch.zeros(2)}),
    "empty table": lambda: saved({}),
    "table of texts": lambda: saved({"a": "b"}),
    "500 blocks of nothing": lambda: hollow(501),
    "1,024 blocks of nothing": lambda: hollow(1025),
    "3,000 blocks of nothing": lambda: hollow(3000),
    "blocks of 2^40 channels": lambda: hollow(2, width=2**40),
    "2^60 classes": lambda: openai(**{"label_emb.weight": torch.zeros(2**60, 0)}),
    "compressed": lambda: archive(adm_pickle()[0], adm_pickle()[1], method=zipfile.ZIP_DEFLATED),
    "compressed bomb": lambda: archive(
        b"\x80\x02X" + struct.pack("<I", 300_000_000) + bytes(300_000_000) + b".",
        method=zipfile.ZIP_DEFLATED,
    ),
    "compressed bomb behind a comment that lies": lambda: (
        ARCHIVES["compressed bomb"]()[:-2] + b"\xff\xff"
    ),
    "compressed by bzip2": lambda: archive(EMPTY, method=zipfile.ZIP_BZIP2),
    "compressed by lzma": lambda: archive(EMPTY, method=zipfile.ZIP_LZMA),
    "two directories": two_directories,
    "bad directory": bad_directory,
    "directory of 2^32": lambda: good_pt()[:-10] + b"\xff" * 8 + b"\x00\x00",
    "comment that lies": lambda: good_pt()[:-2] + b"\xff\xff",
    "comment": lambda: good_pt()[:-2] + b"\x04\x00" + b"PK\x05\x06",
    "no directory": lambda: b"PK\x03\x04" + bytes(100),
    "directory alone": lambda: b"PK\x05\x06" + bytes(18),
    "empty directory after a header": lambda: b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18),
    "one name twice": lambda: quiet(
        lambda: archive(EMPTY, more=[("archive/data.pkl", pickled(TOUCH))])
    ),
    "one storage twice": lambda: quiet(
        lambda: archive(EMPTY, {"0": b"x"}, more=[("archive/data/0", b"y")])
    ),
    "5,000 storages in one place": lambda: overlapping(5000, 4 << 20),
    "two pickles": lambda: archive(EMPTY, more=[("other/data.pkl", pickled(TOUCH))]),
    "pickle in capitals": lambda: archive(EMPTY, more=[("archive/DATA.PKL", pickled(TOUCH))]),
    "no pickle": lambda: zipped({"archive/version": b"3\n"}),
    "pickle without folder": lambda: zipped({"data.pkl": pickled(TOUCH), "version": b"3\n"}),
    "path out of the archive": lambda: archive(EMPTY, more=[("../../x", b""), ("/etc/x", b"")]),
    "version of text": lambda: zipped({"archive/data.pkl": EMPTY, "archive/version": b"x"}),
    "version of 10^30": lambda: zipped(
        {"archive/data.pkl": EMPTY, "archive/version": b"9" * 30}
    ),
    "byte order of text": lambda: zipped({"archive/data.pkl": EMPTY, "archive/version": b"3\n",
                                          "archive/byteorder": b"middle"}),
    "byte order that lies": lambda: archived().replace(b"little", b"big\0\0\0"),
    "names that are not text": lambda: zipped({"archive/data.pkl": EMPTY, "archive/x": b""}
                                              ).replace(b"archive/x", b"archive/\xff"),
    "sizes that lie": lambda: lying_sizes(2**31),
    "sizes of zip64 that lie": lambda: lying_sizes(2**32 - 1),
    "local header that lies": lambda: lying_local_header(),
    "encrypted": lambda: flagged(1),
    "50,000 members": lambda: archive(EMPTY, {f"{n}": b"" for n in range(50_000)}),
    "pickle of 70 MB": lambda: archive(
        b"\x80\x02X" + struct.pack("<I", 70 << 20) + bytes(70 << 20) + b"."
    ),
    "other zip": lambda: zipped({"word/document.xml": b"<xml/>"}),
    "numpy archive": lambda: zipped({"arr_0.npy": b"\x93NUMPY\x01\x00"}),
    "bytes follow": lambda: good_pt() + bytes(70_000),
    "another file first": lambda: b"PK\x03\x04" + bytes(60) + good_pt(),
    **{f"cut at {n}/16": partial(cut, good_pt, n / 16) for n in range(1, 16)},
    "legacy cut": lambda: saved(adm_state(), _use_new_zipfile_serialization=False)[:5000],
    "legacy storage of 2^40": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2**40), 0, (2,), (1,), False, {})}, ["0"],
        struct.pack("<q", 2**40),
    ),
    "legacy storage of 2^30": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2**29), 0, (2,), (1,), False, {})}, ["0"],
        struct.pack("<q", 2**29),
    ),
    "legacy storage of two lengths": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2), 0, (2,), (1,), False, {})}, ["0"],
        struct.pack("<q", 2**28) + bytes(8),
    ),
    "legacy storage that is missing": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2), 0, (2,), (1,), False, {})}
    ),
    "legacy tensor larger than its storage": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2), 0, (10**9,), (1,), False, {})}, ["0"],
        struct.pack("<q", 2) + bytes(8),
    ),
    "legacy tensor of stride 0": lambda: legacy_pt(
        {"a": rebuilt("_rebuild_tensor_v2", old_storage(2), 0, (10**12,), (0,), False, {})}, ["0"],
        struct.pack("<q", 2) + bytes(8),
    ),
    "legacy keys that lie": lambda: legacy_pt({}, [["x"], 7], bytes(8)),
}  # fmt: skip


def overlapping(count, size):
    """Return an archive in which so many members are the same bytes."""
    entries = {f"w{n}": strided(kept(f"{n}", size // 4), (size // 4,), (1,)) for n in range(count)}
    whole = archive(entries, {"0": bytes(size)})
    end = whole.rindex(b"PK\x05\x06")
    (start,) = struct.unpack_from("<I", whole, end + 16)
    directory = whole[start:end]
    at = directory.index(b"archive/data/0") - 46
    one = directory[at : at + 46]
    rest = directory[:at] + directory[at + 46 + len(b"archive/data/0") :]
    for n in range(count):
        name = f"archive/data/{n}".encode()
        rest += one[:28] + struct.pack("<H", len(name)) + one[30:] + name
    facts = struct.pack("<HHHHIIH", 0, 0, count + 3, count + 3, len(rest), start, 0)
    return whole[:start] + rest + b"PK\x05\x06" + facts


def quiet(make):
    """Return what `make` does; zipfile warns of one name twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def adm_pickle():
    """Return the pickle and the storages of a good file."""
    with zipfile.ZipFile(io.BytesIO(good_pt())) as opened:
        names = opened.namelist()
        pickle_name = next(n for n in names if n.endswith("data.pkl"))
        data = {n.rpartition("/")[2]: opened.read(n) for n in names if "/data/" in n}
        return opened.read(pickle_name), data


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return out.getvalue()


def lying_sizes(size):
    content = bytearray(archive(EMPTY))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", size, size)
    return bytes(content)


def lying_local_header():
    content = bytearray(archived())
    at = content.index(b"archive/data/0") - 30
    content[at + 28 : at + 30] = b"\xff\xff"
    return bytes(content)


def flagged(flag):
    content = bytearray(archive(EMPTY))
    for start, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(start) + place] |= flag
    return bytes(content)


# ---- safetensors ---------------------------------------------------------------------------------

MLP = MlpOptions(width=8, depth=2)
CARD = {
    "model": {
        "network": {"name": "mlp", "width": 8, "depth": 2}, "image_size": [8, 8], "channels": 1,
    },
    "sample": {"sampler": {"name": "heun"}, "steps": 18},
}  # fmt: skip


@cache
def mlp_state():
    return {name: t.detach().numpy() for name, t in Mlp(MLP, 1).state_dict().items()}


def laid_out(arrays=None):
    """Return the table of tensors and their bytes."""
    arrays = mlp_state() if arrays is None else arrays
    header, content = {}, b""
    for name, array in arrays.items():
        data = array.tobytes()
        place = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
        content += data
    return header, content


def tensors_file(header, content=b"", length=None):
    """Return a safetensors file with any header, of any claimed length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + content


def native(card=None, *, raw=None, **about):
    """Return a model of ours, but for what is changed; `raw` is the text of its metadata."""
    header, content = laid_out()
    said = {
        "kind": "teacher",
        "weights": "model",
        "step": 1,
        "preset": CARD if card is None else card,
    }
    said = raw if raw is not None else json.dumps({**said, **about})
    return tensors_file({"__metadata__": {"cmtool": said}, **header}, content)


def network(**options):
    """Return a model of ours whose network has other options."""
    return native({**CARD, "model": {**CARD["model"], "network": {"name": "mlp", **options}}})


def adm(**options):
    return native({**CARD, "model": {**CARD["model"], "network": {"name": "adm", **options}}})


def song(**options):
    return native({**CARD, "model": {**CARD["model"], "network": {"name": "song", **options}}})


def model(**values):
    return native({**CARD, "model": {**CARD["model"], **values}})


def one(**changes):
    """Return a file of one tensor, described otherwise."""
    facts = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return tensors_file({"a": facts}, bytes(8))


def typed(dtype, width):
    """Return a model of ours in which every number is of another type."""
    header, at = {}, 0
    for name, array in mlp_state().items():
        end = at + width * array.size
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    said = json.dumps({"kind": "teacher", "weights": "model", "step": 1, "preset": CARD})
    return tensors_file({"__metadata__": {"cmtool": said}, **header}, bytes(at))


def both_kinds(length):
    """Return a safetensors file whose first bytes, its header's length, are another's magic."""
    inner = archive(TOUCH) if length > 1 << 20 else pickled(TOUCH)
    facts = {"dtype": "U8", "shape": [len(inner)], "data_offsets": [0, len(inner)]}
    return tensors_file(json.dumps({"a": facts}).encode().ljust(min(length, 2000)), inner, length)


def nested(levels, opening="[", closing="]"):
    return opening * levels + closing * levels


def twice(inner):
    """Return a file of ours in which a tensor is described twice."""
    header, content = laid_out()
    said = json.dumps({"kind": "teacher", "weights": "model", "step": 1, "preset": CARD})
    whole = json.dumps({"__metadata__": {"cmtool": said}, **header})
    name = next(iter(header))
    facts = json.dumps(header[name] | inner)
    return tensors_file((whole[:-1] + f", {json.dumps(name)}: {facts}}}").encode(), content)


SAFETENSORS = {
    **{
        f"header of {length} bytes": partial(
            lambda length: tensors_file(b'{"a":1}', bytes(64), length), length
        )
        for length in (0, 1, 2, 72, 10_000, 100_000_001, 2**31, 2**40, 2**63, 2**64 - 1)
    },
    "header cut": lambda: native()[:100],
    "data cut": lambda: native()[:-1],
    "data follow": lambda: native() + b"x",
    **{f"cut to {size} bytes": partial(lambda size: native()[:size], size)
       for size in (1, 7, 8, 9, 10, 64, 200)},
    "header 10,000 deep": lambda: tensors_file(f'{{"a": {nested(10_000)}}}'.encode()),
    "header of tables 10,000 deep": lambda: tensors_file(nested(10_000, '{"a":', "}").encode()),
    "header 100 deep": lambda: tensors_file(f'{{"a": {nested(100)}}}'.encode()),
    "header of a list": lambda: tensors_file(b"[1, 2, 3]     "),
    "header that is not JSON": lambda: tensors_file(b"{'a': 1}"),
    "header that is not text": lambda: tensors_file(b'{"\xff\xfe": 1}'),
    "header of spaces": lambda: tensors_file(b"{" + b" " * 1000),
    "header of nothing": lambda: tensors_file(b"{}"),
    "metadata that is a list": lambda: tensors_file({"__metadata__": [1]}),
    "metadata of numbers": lambda: tensors_file({"__metadata__": {"cmtool": 1}}),
    "offsets out of range": lambda: one(data_offsets=[0, 1000], shape=[250]),
    "offsets far out of range": lambda: one(data_offsets=[2**62, 2**62 + 8]),
    "offsets that are negative": lambda: one(data_offsets=[-8, 0]),
    "offsets that descend": lambda: one(data_offsets=[8, 0]),
    "offsets of text": lambda: one(data_offsets=["0", "8"]),
    "offsets that leave a hole": lambda: one(data_offsets=[4, 8], shape=[1]),
    "offsets that overlap": lambda: tensors_file(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)
    ),
    "shape that lies": lambda: one(shape=[3]),
    "shape of 2^64": lambda: one(shape=[2**32, 2**32]),
    "shape of 2^70": lambda: one(shape=[2**70]),
    "shape that is negative": lambda: one(shape=[-2]),
    "shape of no number, 2^63": lambda: one(shape=[0, 2**63], data_offsets=[0, 0]),
    "type unknown": lambda: one(dtype="F33"),
    "type of text": lambda: one(dtype=7),
    "type of four bits": lambda: one(dtype="F4"),
    "tensor described twice": lambda: twice({}),
    "tensor described twice, of two shapes": lambda: twice({"shape": [16, 1, 1]}),
    "metadata twice": lambda: tensors_file(b'{"__metadata__":{},"__metadata__":{"cmtool":"{}"}}'),
    "metadata key twice": lambda: tensors_file(b'{"__metadata__":{"cmtool":"{}","cmtool":"[]"}}'),
    "100,000 empty tensors": lambda: tensors_file(
        {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    ),
    "100,000 empty tensors of ours": lambda: tensors_file({
        "__metadata__": {"cmtool": json.dumps({"kind": "teacher", "weights": "m", "preset": CARD})},
        **{f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)},
    }),
    "state dict without a network": lambda: one(),
    "pickle in a tensor of a file that starts as a pickle": lambda: both_kinds(0x0480),
    "archive in a tensor of a file that starts as an archive": lambda: both_kinds(0x04034B50),
    **{
        f"tensors of type {dtype}": partial(lambda dtype, width: typed(dtype, width), dtype, width)
        for dtype, width in [("C64", 8), ("I64", 8), ("U8", 1), ("BOOL", 1)]
    },
    "state dict of hollow blocks": lambda: tensors_file({
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, 0]}
        for name, t in torch.load(io.BytesIO(hollow(1025)), weights_only=True).items()
        if t.numel() == 0
    }),
    "about 10,000 deep": lambda: native(raw=nested(10_000)),
    "about tables 10,000 deep": lambda: native(raw=nested(10_000, '{"a":', "}")),
    "about 900 deep": lambda: native(raw='{"preset":' + nested(900, '{"loss":', "}") + "}"),
    "about a list": lambda: native(raw="[]"),
    "about a number": lambda: native(raw="7"),
    "about nothing": lambda: native(raw=""),
    "about not a number": lambda: native(raw="NaN"),
    "about 10^5000": lambda: native(raw="1" * 5001),
    "about without a preset": lambda: native(raw="{}"),
    "about with a list for preset": lambda: native(["loss"]),
    "about with a text for preset": lambda: native("loss"),
    "about with a number for preset": lambda: native(7),
    "about with a preset 500 deep": lambda: native(
        raw='{"kind":"teacher","weights":"model","preset":' + nested(500, '{"model":', "}") + "}"
    ),
    "about with options 500 deep": lambda: native(
        raw=json.dumps({"kind": "teacher", "weights": "model", "preset": CARD}).replace(
            '"depth": 2', '"depth": ' + nested(500)
        )
    ),
    "about 3,000,000 lists": lambda: native(raw="[" + "[]," * 3_000_000 + "[]]"),
    "about with 3,000,000 lists": lambda: native(x=[[]] * 3_000_000),
    "kind unknown": lambda: native(kind="x"),
    "kind that is a list": lambda: native(kind=[]),
    "kind that is a table": lambda: native(kind={}),
    "weights that are a number": lambda: native(weights=7),
    "preset of a recipe without its parts": lambda: native({**CARD, "loss": {}}),
    "preset of unknown keys": lambda: native({**CARD, "x": 1}),
    **{
        f"{key} = {repr(value)[:30]}": partial(
            lambda key, value: network(**{key: value}), key, value
        )
        for key in ("depth", "width")
        for value in (10**9, 10**12, 10**30, -1, 0, 1.5, "x", None, [], {}, float("nan"), 1025,
                      1 << 31, 2**62, 2**63)
    },
    **{
        f"adm {key} = {repr(value)[:30]}": partial(
            lambda key, value: adm(**{key: value}), key, value
        )
        for key, values in {
            "num_res_blocks": [10**9, -1, 0, 2**70, "x", 1024, 256],
            "model_channels": [10**9, 10**12, 2**70, -1, 0, 1, "x"],
            "channel_mult": [[], [0], [-1], [10**9], "abc", 7, [1.5], [[1]], [1] * 1025,
                             [1] * 1024],
            "attention_levels": [[10**9], [-1], "x"],
            "head_channels": [0, -1, 10**9, 2**70],
            "norm_groups": [0, -1, 10**9, 7],
            "min_group_channels": [0, -1, 10**9],
            "augment_dim": [-1, 10**12, 2**70],
            "dropout": [-1.0, 2.0, float("nan"), "x"],
            "unknown": [1],
        }.items()
        for value in values
    },
    **{
        f"song {key} = {repr(value)[:30]}": partial(
            lambda key, value: song(**{key: value}), key, value
        )
        for key, values in {
            "num_blocks": [10**9, -1, 0, 2**70, "x", 300],
            "model_channels": [10**9, 10**12, 2**70, -1, 0, 1, 2, 3],
            "channel_mult_emb": [0, -1, 10**12, 2**70],
            "channel_mult_noise": [0, -1, 10**12, 2**70],
            "fourier_scale": [float("inf"), float("nan"), "x"],
            "embedding": ["x", 7],
            "resample_filter": [[], [1], [0, 0], [10**30, 1], "x"],
            "augment_dim": [-1, 10**12, 2**70],
        }.items()
        for value in values
    },
    "song fourier of 10^12 channels": lambda: song(embedding="fourier", model_channels=10**12),
    "song fourier of 10^9 channels": lambda: song(embedding="fourier", model_channels=10**9),
    "song of 1,024 attended blocks": lambda: song(num_blocks=1024, channel_mult=[1],
                                                  attention_levels=[0]),
    "network unknown": lambda: network(name="x"),
    "network that is a number": lambda: model(network=7),
    "network that is a list": lambda: model(network=[]),
    "network without a name": lambda: model(network={"width": 8}),
    **{
        f"{key} = {repr(value)[:30]}": partial(lambda key, value: model(**{key: value}), key, value)
        for key, values in {
            "image_size": [[10**9, 10**9], [0, 0], [-8, -8], [8], [8, 8, 8], "8", [8.5, 8],
                           [2**70, 8]],
            "channels": [0, -1, 10**12, 2**70, "x", 1.5],
            "num_classes": [-1, 10**9, 10**12, 2**70, "10^9", "x"],
            "sigma_data": [0, -1, float("nan"), float("inf"), "x", 1e400],
            "noise_label": ["x", 7, {"name": "log", "x": 1}, {"name": "vp", "beta_d": "x"}, {}],
            "scalings": ["x", 7, {"name": "edm", "x": 1}],
        }.items()
        for value in values
    },
    **{
        f"noise {key} = {value}": partial(
            lambda key, value: native({**CARD, "noise": {key: value}}), key, value
        )
        for key in ("sigma_min", "sigma_max", "rho")
        for value in (0, -1, float("nan"), float("inf"), 1e400, "x")
        if (key, value) != ("sigma_max", "y")
    },
    "2,000,000 attended levels": lambda: adm(attention_levels=[9] * 2_000_000, num_res_blocks=200),
    "300,000 wrong widths": lambda: adm(channel_mult=["x"] * 300_000),
    "a description of 3 MB": lambda: native({**CARD, "description": ["x" * 3_000_000]}),
    "an option of 3 MB": lambda: network(depth="x" * 3_000_000),
    "a name of 3 MB": lambda: network(name="x" * 3_000_000),
    "300,000 wrong tuned levels": lambda: native(
        {**CARD, "sample": {"sampler": "heun", "levels": {"1": ["x"] * 300_000}}}
    ),
    "tensor that commands the terminal": lambda: tensors_file({
        "__metadata__": {"cmtool": json.dumps({"kind": "teacher", "weights": "m", "preset": CARD})},
        "\x1b]0;t\x07\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }),
    "weights that command the terminal": lambda: native(weights="\x1b]0;t\x07\x1b[2J"),
    "weights of half a character": lambda: native(weights="\ud800"),
    "weights of two lines": lambda: native(weights="ema\nsha256         0"),
    "option that commands the terminal": lambda: network(**{"\x1b]0;t\x07\x1b[2J": 1}),
    "option of half a character": lambda: network(**{"\ud800": 1}),
}  # fmt: skip


# ---- msgpack -------------------------------------------------------------------------------------

JCM = SongOptions(
    model_channels=8, channel_mult=(1,), num_blocks=1, attention_levels=(), embedding="fourier",
    channel_mult_noise=2, encoder="residual", resample_filter=(1, 3, 3, 1),
)  # fmt: skip


def array(shape, dtype="float32", raw=None, ext=1):
    raw = bytes(4 * shape_count(shape)) if raw is None else raw
    return extension([shape, dtype, raw], ext)


def extension(content, number=1):
    return msgpack.ExtType(number, msgpack.packb(content))


def shape_count(shape):
    count = 1
    for n in shape:
        count *= n
    return count


@cache
def jcm_tree():
    ours = Song(JCM, 3).state_dict()
    theirs = translate_back(jcm_msgpack.rules(JCM, list(ours)), ours)
    out = {}
    for name, t in theirs.items():
        *parents, leaf = name.split("/")
        at = out
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = array(list(t.shape), raw=t.contiguous().numpy().tobytes())
    return out


def jcm(**changes):
    return msgpack.packb({"params_ema": jcm_tree() | changes})


def jcm_hollow(blocks, width=8):
    """Return a tree of arrays without numbers, whose names tell of many blocks."""
    out = {f"ResnetBlockBigGANpp_{n}": {"x": array([0])} for n in range(2 * blocks + 3)}
    out["ResnetBlockBigGANpp_0"] = {"Conv_1": {"kernel": array([0, 0, 0, width])}}
    out["Conv_0"] = {"kernel": array([0, 0, 3, 8])}
    out["AttnBlockpp_0"] = {"x": array([0])}
    return msgpack.packb({"params_ema": out})


def mapped(*pairs):
    """Return a map of raw pairs."""
    return bytes([0x80 + len(pairs)]) + b"".join(k + v for k, v in pairs)


def around(value):
    """Return a train state around a value in msgpack."""
    return mapped((msgpack.packb("params_ema"), value))


def in_state(**kwargs):
    return msgpack.packb({"params_ema": kwargs})


MSGPACKS = {
    "lists 10,000 deep": lambda: around(b"\x91" * 10_000 + b"\xc0"),
    "maps 10,000 deep": lambda: around(b"\x81\xa1a" * 10_000 + b"\xc0"),
    "maps 500 deep": lambda: around(b"\x81\xa1a" * 500 + b"\xc0"),
    "lists 1,000,000 deep": lambda: around(b"\x91" * 1_000_000 + b"\xc0"),
    "list of 2^32": lambda: around(b"\xdd\xff\xff\xff\xff"),
    "map of 2^32": lambda: around(b"\xdf\xff\xff\xff\xff"),
    "map of 2^32 itself": lambda: b"\xdf\xff\xff\xff\xff",
    "text of 2^32": lambda: around(b"\xdb\xff\xff\xff\xffx"),
    "bytes of 2^32": lambda: around(b"\xc6\xff\xff\xff\xffx"),
    "extension of 2^32": lambda: around(b"\xc9\xff\xff\xff\xff\x01x"),
    "extension of nothing": lambda: around(b"\xc7\x00\x01"),
    "list of 2^31, 900 deep": lambda: around(b"\xdd\x7f\xff\xff\xff" * 900),
    "lists as long as the file, 900 deep": lambda: around(
        (b"\xdd" + struct.pack(">I", 4_000_000)) * 900 + b"\xc0" * 4_000_000
    ),
    "maps as long as the file, 900 deep": lambda: around(
        (b"\xdf" + struct.pack(">I", 2_000_000) + b"\xa1a") * 900 + b"\xc0" * 4_000_000
    ),
    "8,000,000 empty maps": lambda: around(
        b"\xdd" + struct.pack(">I", 8_000_000) + b"\x80" * 8_000_000
    ),
    "8,000,000 empty lists": lambda: around(
        b"\xdd" + struct.pack(">I", 8_000_000) + b"\x90" * 8_000_000
    ),
    "8,000,000 empty lists in an array": lambda: around(
        msgpack.packb(msgpack.ExtType(
            1, b"\xdd" + struct.pack(">I", 8_000_000) + b"\x90" * 8_000_000
        ))
    ),
    "200,000 small arrays": lambda: in_state(**{f"{n}": array([0]) for n in range(200_000)}),
    "never used opcode": lambda: around(b"\xc1"),
    "bytes follow": lambda: jcm() + b"\xc0",
    "nothing": lambda: msgpack.packb({}),
    "list": lambda: around(b"\xc0")[:0] + b"\xde\x00\x01\xa1a\x91\xc0",
    "not a table": lambda: mapped((msgpack.packb("params_ema"), b"\x07")),
    "tree is an array": lambda: msgpack.packb({"params_ema": array([2])}),
    **{
        f"array of shape {shape}": partial(
            lambda shape: in_state(a=array(shape, raw=bytes(8))), shape
        )
        for shape in ([10**9], [3], [-2], [-1, -2], [2.0], ["2"], [None], [True, 2], [[2]], [1] * 9,
                      [2**63], [2**64 - 1, 2], [], [2, 0])
    },
    "array of shape [0, 2^63]": lambda: in_state(a=array([0, 2**63], raw=b"")),
    "array of shape [2^40, 2^40, 0]": lambda: in_state(a=array([2**40, 2**40, 0], raw=b"")),
    "array of 200,000 dimensions": lambda: in_state(a=array([1] * 200_000, raw=bytes(4))),
    "array of text": lambda: in_state(a=array([2], raw="12345678")),
    "array of a list": lambda: in_state(a=array([2], raw=[1, 2])),
    **{
        f"array of type {dtype}": partial(
            lambda dtype: in_state(a=array([2], dtype, raw=bytes(8))), dtype
        )
        for dtype in ("object", "O", "V8", "|S4", "int32", "complex64", "float128", "", 7, None, [])
    },
    "array of two parts": lambda: in_state(a=extension([[2], "float32"])),
    "array of four parts": lambda: in_state(a=extension([[2], "float32", b"", 1])),
    "array of a map": lambda: in_state(a=extension({})),
    "array of rubbish": lambda: in_state(a=msgpack.ExtType(1, b"\xc1\xc1")),
    "array cut": lambda: in_state(
        a=msgpack.ExtType(1, msgpack.packb([[2], "float32", bytes(8)])[:-3])
    ),
    "array in an array": lambda: in_state(a=extension(array([2]))),
    "array 10,000 deep": lambda: in_state(a=msgpack.ExtType(1, b"\x91" * 10_000 + b"\xc0")),
    **{
        f"extension {n}": partial(lambda n: in_state(a=array([2], ext=n)), n)
        for n in (0, 2, 3, 42, 127)
    },
    "extension -1": lambda: around(b"\x81\xa1a\xd6\xff\xff\xff\xff\xff"),
    "time of five bytes": lambda: around(b"\x81\xa1a\xc7\x05\xff12345"),
    "time of 10^18 seconds": lambda: around(b"\x81\xa1a\xc7\x0c\xff" + b"\x7f" * 12),
    "twice the same key": lambda: around(mapped((b"\xa1a", b"\xc0"), (b"\xa1a", b"\xc0"))),
    "twice params_ema": lambda: mapped(
        (msgpack.packb("params_ema"), b"\x80"), (msgpack.packb("params_ema"), b"\x80")
    ),
    **{
        f"key {key!r}": partial(lambda key: around(mapped((msgpack.packb(key), b"\xc0"))), key)
        for key in (7, -1, None, True, 1.5, b"a")
    },
    "key that is a list": lambda: around(mapped((b"\x91\xc0", b"\xc0"))),
    "key that is a map": lambda: around(mapped((b"\x80", b"\xc0"))),
    "key that is not text": lambda: around(mapped((b"\xa2\xff\xfe", b"\xc0"))),
    "name that commands the terminal": lambda: in_state(**{"\x1b]0;t\x07\x1b[2J": 1}),
    "array that commands the terminal": lambda: jcm(**{"\x1b]0;t\x07\x1b[2J": array([2])}),
    "name of a megabyte": lambda: in_state(**{"x" * 1_000_000: 1}),
    "array by two paths": lambda: jcm(**{"Conv_0/kernel": array([3, 3, 3, 8])}),
    "array more": lambda: jcm(more=array([2])),
    "array less": lambda: jcm(Conv_0={}),
    "array of nan": lambda: jcm(Dense_0={"kernel": array([16, 32], raw=b"\xff" * 2048),
                                         "bias": array([32])}),
    "array of another shape": lambda: jcm(Dense_0={"kernel": array([2]), "bias": array([32])}),
    "kernel of two dimensions": lambda: jcm(Conv_0={"kernel": array([3, 8]), "bias": array([8])}),
    "kernel of no channels": lambda: jcm(
        Conv_0={"kernel": array([3, 3, 0, 8]), "bias": array([8])}
    ),
    "kernel of width 0": lambda: jcm(Conv_0={"kernel": array([3, 3, 3, 0]), "bias": array([8])}),
    "block of two dimensions": lambda: jcm(
        ResnetBlockBigGANpp_0={"Conv_1": {"kernel": array([2, 2])}}
    ),
    "500 blocks of nothing": lambda: jcm_hollow(500),
    "1,024 blocks of nothing": lambda: jcm_hollow(1024),
    "3,000 blocks of nothing": lambda: jcm_hollow(3000),
    "blocks of 2^40 channels": lambda: jcm_hollow(1, 2**40),
    "blocks of no channels": lambda: jcm_hollow(1, 0),
    "pieces without shape": lambda: in_state(a={"__msgpack_chunked_array__": True}),
    "pieces that lie": lambda: in_state(
        a={"__msgpack_chunked_array__": True, "shape": {"0": 10**9}, "chunks": {"0": array([2])}}
    ),
    "pieces of negative shape": lambda: in_state(
        a={"__msgpack_chunked_array__": True, "shape": {"0": -1, "1": -2},
           "chunks": {"0": array([2])}}
    ),
    "pieces of text": lambda: in_state(
        a={"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": "x"}}
    ),
    "pieces that are missing": lambda: in_state(
        a={"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": array([2])}}
    ),
    "pieces of shape 2^70": lambda: in_state(
        a={"__msgpack_chunked_array__": True, "shape": {"0": 2**63, "1": 0},
           "chunks": {"0": array([0])}}
    ),
    "pieces in pieces": lambda: in_state(a={
        "__msgpack_chunked_array__": True, "shape": {"0": 2},
        "chunks": {"0": {"__msgpack_chunked_array__": True, "shape": {"0": 2},
                         "chunks": {"0": "x"}}},
    }),
    "the state is pieces": lambda: msgpack.packb(
        {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": array([2])}}
    ),
    **{f"cut at {n}/16": partial(cut, jcm, n / 16) for n in range(1, 16)},
}  # fmt: skip


# ---- folders and things that are no files --------------------------------------------------------

PIPE = AdmOptions(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,), head_channels=16,
    norm_groups=8,
)  # fmt: skip


def pipeline(path, config=None, index=None, scheduler=None, weights=None, name=None):
    """Write a diffusers folder that loads, but for what is changed; texts replace whole files."""
    path.mkdir()
    steps = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    diffusers_dir.write(
        path, PIPE, dict(pipe_state()), channels=3, num_classes=0, image_size=8,
        scheduler={**steps, "rho": 7.0},
    )  # fmt: skip
    for file, change in [
        ("unet/config.json", config), (diffusers_dir.INDEX, index),
        ("scheduler/scheduler_config.json", scheduler),
    ]:  # fmt: skip
        if isinstance(change, dict):
            change = json.dumps({**json.loads((path / file).read_text()), **change})
        if isinstance(change, str):
            (path / file).write_text(change)
    good = path / "unet" / diffusers_dir.WEIGHTS[0]
    if weights is not None:
        good.unlink()
        target = good.with_name(name or diffusers_dir.WEIGHTS[1])
        target.write_bytes(weights()) if callable(weights) else target.write_bytes(weights)
    return path


@cache
def pipe_state():
    return Adm(PIPE, 3).state_dict()


def without(*names):
    def make(path):
        pipeline(path)
        for name in names:
            (path / name).unlink()

    return make


def instead(name, make):
    """Return a maker of a folder in which one file is something else."""

    def write(path):
        pipeline(path)
        (path / name).unlink()
        make(path / name)

    return write


def tarred():
    """Return a legacy tar archive of torch whose pickle runs code."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as opened:
        for name in ("storages", "tensors", "pickle"):
            content = pickled(TOUCH).replace(b"\x04", b"\x02", 1)
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            opened.addfile(facts, io.BytesIO(content))
    return out.getvalue()


CONFIG = {
    "layers_per_block": [10**9, 2**70, 0, -1, 1.5, "2", None, [2], 1024, 1000, 2000, True],
    "block_out_channels": [[10**9], [2**70], [], [0], [-32], "32", 32, [32.0], [[32]],
                           [32] * 100_000,
                           [1 << 20], {}],
    "down_block_types": [[], [7], "AttnDownBlock2D", None, [[]], ["x" * 1_000_000], 7],
    "up_block_types": [[], [7], None, [[]], 7],
    "in_channels": [0, -1, 10**9, 2**70, "3", None, 3.0],
    "out_channels": [4, "3", None],
    "norm_num_groups": [0, -1, 7, 10**9, "8", None],
    "attn_norm_num_groups": [0, 7, "8", [8]],
    "attention_head_dim": [0, -1, 7, 10**9, "16"],
    "num_class_embeds": [0, -1, 10**9, 1 << 20, "10", 1.5, []],
    "sample_size": [10**9, 2**70, 0, -1, "8", "ab", [8], [8, 8, 8], [8.5, 8], {}, {"a": 1}, 1.5,
                    None,
                    [[8], [8]], [0, 0], [10**9, 10**9], "../../x"],
    "act_fn": ["relu", 7, [], {}, "\x1b]0;t\x07\x1b[2J", "x\ny", "../../x", "x" * 500_000,
               "\ud800"],
    "norm_eps": [1, "x", float("nan")],
    "resnet_time_scale_shift": [7, []],
    "downsample_type": [7, [], "conv"],
}  # fmt: skip
SCHEDULER = {
    "sigma_min": [0, -1, 100.0, "x", None, [], float("nan"), float("inf"), 80.0],
    "sigma_max": [0, -1, 0.001, "x", float("inf"), 1e7, 0.002],
    "sigma_data": [0, -1, "x", float("nan"), True],
    "rho": [0, -1, "x", float("nan")],
    "num_train_timesteps": [0, 1, 0.5, -1, "40", 1e9, None],
}
INERT_CONFIG = {"downsample_type = 7", "downsample_type = []", "downsample_type = 'conv'",
                "resnet_time_scale_shift = 7"}  # fmt: skip

FOLDERS = {
    "config 10,000 deep": partial(pipeline, config=nested(10_000)),
    "config of tables 10,000 deep": partial(pipeline, config=nested(10_000, '{"a":', "}")),
    "config 900 deep": partial(pipeline, config='{"act_fn":' + nested(900) + "}"),
    "config of a list": partial(pipeline, config="[]"),
    "config of nothing": partial(pipeline, config=""),
    "config of an empty table": partial(pipeline, config="{}"),
    "config that is not JSON": partial(pipeline, config="import os"),
    "config of a number of 5,000 digits": partial(
        pipeline, config='{"in_channels": ' + "9" * 5000 + "}"
    ),
    "config of 2 MB": partial(pipeline, config='{"a": "' + "x" * 2_000_000 + '"}'),
    "config of 300,000 lists": partial(pipeline, config='{"act_fn": [' + "[]," * 300_000 + "[]]}"),
    "config that is not text": instead(
        "unet/config.json", lambda path: path.write_bytes(b'{"a": "\xff\xfe"}')
    ),
    "config that is a folder": instead("unet/config.json", Path.mkdir),
    "config that is a fifo": instead("unet/config.json", os.mkfifo),
    "config that is a loop": instead("unet/config.json", lambda path: path.symlink_to(path.name)),
    "config that has no end": instead(
        "unet/config.json", lambda path: path.symlink_to("/dev/zero")
    ),
    "config of 10 GiB": instead("unet/config.json", lambda path: sparse(path, 10 << 30)),
    "index 10,000 deep": partial(pipeline, index=nested(10_000)),
    "index of a list": partial(pipeline, index="[]"),
    "index of nothing": partial(pipeline, index=""),
    "index of 10 GiB": instead(diffusers_dir.INDEX, lambda path: sparse(path, 10 << 30)),
    "index of a class that commands the terminal": partial(
        pipeline, index={"_class_name": "\x1b]0;t\x07\x1b[2J"}
    ),
    "index of a class of two lines": partial(pipeline, index={"_class_name": "x\nerror: y"}),
    "index of a class of half a character": partial(pipeline, index={"_class_name": "\ud800"}),
    "index of a class that is a list": partial(pipeline, index={"_class_name": [[]]}),
    "index of code elsewhere": partial(
        pipeline, index={"_class_name": ["evil", "Pipeline"], "unet": ["../../evil", "UNet"]}
    ),
    "scheduler 10,000 deep": partial(pipeline, scheduler=nested(10_000)),
    "scheduler of a list": partial(pipeline, scheduler="[7]"),
    **{
        f"{key} = {repr(value)[:30]}": partial(pipeline, config={key: value})
        for key, values in CONFIG.items()
        for value in values
    },
    **{
        f"scheduler {key} = {value!r}": partial(pipeline, scheduler={key: value})
        for key, values in SCHEDULER.items()
        for value in values
    },
    "1,000 layers of a million channels": partial(
        pipeline, config={"layers_per_block": 1000, "block_out_channels": [1 << 20]}
    ),
    "500 levels of 2 layers": partial(pipeline, config={
        "layers_per_block": 2, "block_out_channels": [32] * 500,
        "down_block_types": ["AttnDownBlock2D"] * 500, "up_block_types": ["AttnUpBlock2D"] * 500,
    }),
    "without config": without("unet/config.json"),
    "without scheduler": without("scheduler/scheduler_config.json"),
    "without index": without(diffusers_dir.INDEX),
    "without weights": without(f"unet/{diffusers_dir.WEIGHTS[0]}"),
    "beside 100 GiB": lambda path: sparse(pipeline(path) / "more.bin", 100 << 30),
    "weights of 17 GiB": lambda path: sparse(
        pipeline(path) / "unet" / diffusers_dir.WEIGHTS[0], 17 << 30
    ),
    "weights are a folder": instead(f"unet/{diffusers_dir.WEIGHTS[0]}", Path.mkdir),
    "weights are a fifo": instead(f"unet/{diffusers_dir.WEIGHTS[0]}", os.mkfifo),
    "weights are a loop": instead(
        f"unet/{diffusers_dir.WEIGHTS[0]}", lambda path: path.symlink_to(path.name)
    ),
    "weights are empty": partial(pipeline, weights=b"", name=diffusers_dir.WEIGHTS[0]),
    "weights are a page": partial(pipeline, weights=b"<html></html>"),
    "weights are a pointer": partial(
        pipeline, weights=b"version https://git-lfs.github.com/spec/v1\noid",
        name=diffusers_dir.WEIGHTS[0],
    ),
    "weights are zeros": partial(pipeline, weights=bytes(4096)),
    "weights are rubbish": partial(pipeline, weights=bytes(range(256)) * 16),
    "weights are a safetensors file cut": partial(
        pipeline, weights=lambda: native()[:-9], name=diffusers_dir.WEIGHTS[0]
    ),
    "weights of another network": partial(pipeline, weights=good_pt),
    "weights run code": partial(pipeline, weights=lambda: archive(TOUCH)),
    "weights run code as a pickle": partial(pipeline, weights=lambda: pickled(TOUCH)),
    "weights run code as text": partial(
        pipeline, weights=f"cposix\nsystem\n(S'{SHELL}'\ntR.".encode()
    ),
    "weights run code as a legacy file": partial(pipeline, weights=lambda: legacy_pt(TOUCH)),
    "weights run code as a tar": partial(pipeline, weights=tarred),
    "weights run code as persistence": partial(
        pipeline, weights=lambda: pickled({"a": record("X", {}, PYTHON)})
    ),
    "weights of a bytearray of 1 GB": partial(pipeline, weights=ARCHIVES["bytearray of 1 GB"]),
    "weights with laughs as a key": partial(pipeline, weights=ARCHIVES["laughs as a key"]),
    "weights of a bad directory": partial(pipeline, weights=bad_directory),
}  # fmt: skip


def sparse(path, size):
    path.touch()
    os.truncate(path, size)


def long_sparse(path, start, size):
    path.write_bytes(start)
    os.truncate(path, size)


def bound(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


def run_folder(manifest, name="step-0000001"):
    """Return a maker of a run whose checkpoint has this manifest."""

    def make(path):
        checkpoint = path / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(native())
        (checkpoint / "manifest.json").write_text(manifest)

    return make


def run_with(make):
    """Return a maker of a run whose checkpoint's manifest is something else."""

    def write(path):
        run_folder("{}")(path)
        manifest = next(path.rglob("manifest.json"))
        manifest.unlink()
        make(manifest)

    return write


PLAIN = {
    "page": b"<!DOCTYPE html><html>404</html>",
    "page after spaces": b"\n\n  <html>404</html>",
    "page after a byte order mark": b"\xef\xbb\xbf<html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "empty": b"",
    "one byte": b"\x80",
    "two bytes": b"\x80\x04",
    "rubbish": random.Random(0).randbytes(4096),
    "zeros": bytes(100_000),
    "ones": b"\xff" * 4096,
    "text": b"import os\nos.system('touch canary')\n",
    "json": b'{"error": "not found"}',
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "compressed": lzma.compress(b"x" * 10_000),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
}
PLAIN_FILES = {
    f"{name}{suffix}": partial(lambda content, path: path.write_bytes(content), content)
    for name, content in PLAIN.items()
    for suffix in (".pkl", ".pt", ".safetensors")
}
ODD = {
    **PLAIN_FILES,
    "fifo": os.mkfifo,
    "fifo.pkl": os.mkfifo,
    "socket.pt": bound,
    "folder": Path.mkdir,
    "folder.pkl": Path.mkdir,
    "folder.safetensors": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "loop.pkl": lambda path: path.symlink_to(path.name),
    "loop of two": lambda path: (
        path.symlink_to("loop of two b"),
        path.with_name("loop of two b").symlink_to(path.name),
    ),
    "nowhere.pt": lambda path: path.symlink_to("nowhere to be found"),
    "zero.pkl": lambda path: path.symlink_to("/dev/zero"),
    "null.safetensors": lambda path: path.symlink_to("/dev/null"),
    "random": lambda path: path.symlink_to("/dev/urandom"),
    "17 GiB.pkl": lambda path: long_sparse(path, snapshot(), 17 << 30),
    "17 GiB.pt": lambda path: long_sparse(path, good_pt(), 17 << 30),
    "17 GiB.safetensors": lambda path: long_sparse(path, native(), 17 << 30),
    "17 GiB of msgpack": lambda path: long_sparse(path, jcm(), 17 << 30),
    "10 GiB.pkl": lambda path: long_sparse(path, snapshot(), 10 << 30),
    "1 GiB name.pkl": lambda path: long_sparse(path, text(b"c"), 1 << 30),
    "run with a manifest 10,000 deep": run_folder(nested(10_000)),
    "run with a manifest of a list": run_folder("[]"),
    "run with a manifest of a number": run_folder("7"),
    "run with a manifest of 10 GiB": run_with(lambda path: sparse(path, 10 << 30)),
    "run with a manifest that has no end": run_with(lambda path: path.symlink_to("/dev/zero")),
    "run with a manifest that is a fifo": run_with(os.mkfifo),
    "run with a manifest without files": run_folder('{"files": null}'),
    "run with files in a list": run_folder('{"files": ["model.safetensors"]}'),
    "run with a file elsewhere": run_folder('{"files": {"../../../../x": {}, "/dev/zero": {}}}'),
    "run with a file of a strange name": run_folder('{"files": {"a\\u0000b": {}, "\\ud800": {}}}'),
    "run with a file that commands the terminal": run_folder(
        '{"files": {"\\u001b]0;t\\u0007\\u001b[2J": {}}}'
    ),
    "run with the folder as a file": run_folder('{"files": {".": {}, "": {}}}'),
    "run of a strange step": run_folder('{"files": {}}', "step-²"),
    "run without checkpoints": lambda path: (path / "checkpoints").mkdir(parents=True),
}

GROUPS = {
    "code": (CODE_IN_PICKLES, ".pkl"),
    "lies": (LYING_PICKLES, ".pkl"),
    "storages": (STORAGES, ".pkl"),
    "bombs": (BOMBS, ".pkl"),
    "architectures": (ARCHITECTURES, ".pkl"),
    "pt": (ARCHIVES, ".pt"),
    "safetensors": (SAFETENSORS, ".safetensors"),
    "msgpack": (MSGPACKS, ""),
}

MAY_LOAD = {
    "code: persistent source runs code",
    "bombs: laughs", "bombs: laughs as a note", "bombs: laughs as label_dropout of a list",
    "bombs: laughs as a buffer set", "bombs: numbers of one hash", "bombs: list 200,000 deep",
    "bombs: list 200,000 deep as a note", "bombs: tuple 200,000 deep", "bombs: table 90,000 deep",
    "bombs: boxes 40,000 deep", "bombs: list in itself",
    f"architectures: resample_filter = {repr([1] * 16)[:30]}",
    "architectures: label_dropout = '\\x1b[2Jx'",
    "architectures: label_dropout = 'x\\nhint: run this'",
    f"architectures: sigma_data = {repr(10**70)[:30]}",
    "pt: tensor for another device", "pt: comment", "pt: comment that lies",
    "pt: directory of 2^32", "pt: state_dict of state_dict",
    "pt: bytes follow", "pt: another file first",
    "safetensors: about with 3,000,000 lists",
    "safetensors: weights that command the terminal",
    "safetensors: weights of half a character", "safetensors: weights of two lines",
    "folders: index of a class that commands the terminal",
    "folders: index of a class of two lines", "folders: index of a class of half a character",
    "folders: beside 100 GiB",
    "folders: index of a class that is a list", "folders: index of code elsewhere",
    *(f"folders: {key}" for key in INERT_CONFIG),
}  # fmt: skip
"""Attacks that are of no effect on a model that is otherwise whole: it may load, in time."""
ASKS = {"folders: sample_size = None"}
"""What the user can say instead (exit code 2)."""
ARGUMENT = {
    "a name of 300 letters": "x" * 300,
    "a device": "/dev/zero",
    "no name": "",
}
NAMES = [
    *(f"{group}: {name}" for group, (attacks, _) in GROUPS.items() for name in attacks),
    *(f"folders: {name}" for name in FOLDERS),
    *(f"odd: {name}" for name in ODD),
    *(f"argument: {name}" for name in ARGUMENT),
]
CONTROLS = {
    "song.pkl": snapshot,
    "fourier.pkl": lambda: fourier_snapshot(),
    "dhariwal.pkl": lambda: snapshot(inner="DhariwalUNet"),
    "vp.pkl": lambda: snapshot(name="VPPrecond"),
    "adm.pt": good_pt,
    "archive.pt": lambda: archive(*adm_pickle()),
    "archived.pt": archived,
    "legacy.pt": lambda: saved(module_state(), _use_new_zipfile_serialization=False),
    "ours.safetensors": native,
    "jcm": jcm,
}
"""What the attacks are made of, unharmed."""


def fourier_snapshot():
    options = replace(SONG, embedding="fourier")
    return snapshot(given={"embedding_type": "fourier"}, tensors=song_code(options))


def write_attacks(folder):
    """Write all files and return {name: path}."""
    out = {}
    for group, (attacks, suffix) in GROUPS.items():
        for number, (name, make) in enumerate(attacks.items()):
            path = folder / f"{group}-{number}{suffix}"
            path.write_bytes(make())
            out[f"{group}: {name}"] = str(path)
    for group, attacks in [("folders", FOLDERS), ("odd", ODD)]:
        for number, (name, write) in enumerate(attacks.items()):
            path = folder / f"{group}-{number}" / (name if group == "odd" else "pipe")
            path.parent.mkdir()
            write(path)
            out[f"{group}: {name}"] = str(path)
    return out | {f"argument: {name}": path for name, path in ARGUMENT.items()}


# ---- the child -----------------------------------------------------------------------------------


def peak():
    """Return the highest memory this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def attempt(path):
    """Return what `cmtool checkpoint info` makes of a path."""
    from cmtool.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in
                ("strict", "backslashreplace"))  # fmt: skip
    start, raised, exit_code = time.process_time(), None, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(["checkpoint", "info", path])
    except SystemExit as end:
        exit_code = end.code or 0
    except BaseException:
        raised = traceback.format_exc(limit=-3)[-1500:]
    seconds = time.process_time() - start
    out.flush()
    err.flush()
    return {
        "raised": raised, "code": exit_code, "seconds": round(seconds, 3),
        "out": out.buffer.getvalue().decode()[:5000], "err": err.buffer.getvalue().decode()[:5000],
    }  # fmt: skip


def child(wanted):
    """Attempt each file of a JSON list on stdin, and say so in JSON lines."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    voice = os.fdopen(os.dup(1), "w")

    def tell(**facts):
        print(json.dumps(facts), file=voice, flush=True)

    for name, path in wanted["controls"].items():
        tell(loaded=name, **attempt(path))
    gc.freeze()  # as `checkpoint info` does with what it imports (`importing_torch`)
    for name, path in wanted["attacks"].items():
        tell(start=name)
        before = peak()
        result = attempt(path)
        ran = Path(CANARY).exists()
        Path(CANARY).unlink(missing_ok=True)
        growth = peak() - before
        tell(done=name, **result, ran=ran, growth=growth)
        if growth > MAX_GROWTH // 2:
            return  # the next process starts with a low peak


def heard(process, patience):
    """Yield what a child says, as it says it. Raises TimeoutError when it falls silent."""
    said = b""
    while True:
        if not select.select([process.stdout], [], [], patience())[0]:
            raise TimeoutError(f"no answer in {patience():.0f} s")
        more = os.read(process.stdout.fileno(), 1 << 20)
        if not more:
            return
        *lines, said = (said + more).split(b"\n")
        yield from map(json.loads, lines)


def attack_all(folder, attacks, controls):
    """Return what the children say of every attack and every control, {name: facts} each."""
    results, loaded = {}, {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.formats.test_hostile"]
    while left := {name: path for name, path in attacks.items() if name not in results}:
        running, failed = None, None
        (folder / "wanted.json").write_text(json.dumps({"attacks": left, "controls": controls}))
        with (
            open(folder / "wanted.json") as wanted,
            open(folder / "stderr.txt", "w") as noise,
            subprocess.Popen(
                command, stdin=wanted, stdout=subprocess.PIPE, stderr=noise, cwd=folder,
                env=environment,
            ) as process,
        ):  # fmt: skip
            try:
                for facts in heard(process, lambda: PATIENCE if running else 60):  # noqa: B023
                    running = facts.get("start")
                    if "loaded" in facts:
                        loaded[facts["loaded"]] = facts
                    if "done" in facts:
                        results[facts["done"]] = facts
            except TimeoutError as error:
                failed = str(error)
                process.kill()
            ended = process.wait()
        if running:
            results[running] = {"failed": failed or f"the process died with {ended}"}
        assert left.keys() & results.keys(), (folder / "stderr.txt").read_text()[-3000:]
    return results, loaded


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    controls = {}
    for name, make in CONTROLS.items():
        controls[name] = str(folder / name)
        (folder / name).write_bytes(make())
    controls["pipe"] = str(pipeline(folder / "pipe"))
    return attack_all(folder, write_attacks(folder), controls)


def test_the_payload_works_where_pickles_are_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (CODE_IN_PICKLES["reduce"], CODE_IN_PICKLES["inst"], CODE_IN_PICKLES["eval"]):
        opened = pickle.loads(make())
        getattr(opened, "close", int)()
        assert Path(CANARY).exists()
        Path(CANARY).unlink()


@pytest.mark.parametrize("name", [*CONTROLS, "pipe"])
def test_what_the_attacks_are_made_of_loads(results, name):
    facts = results[1][name]
    assert facts["raised"] is None
    assert facts["code"] == 0, facts["err"]
    assert "parameters" in facts["out"]


@pytest.mark.parametrize("name", NAMES)
def test_is_refused_in_time_with_a_reason(results, name):
    facts = results[0][name]
    assert "failed" not in facts, facts["failed"]
    assert not facts["ran"], "its code ran"
    assert facts["raised"] is None, facts["raised"]
    lines = facts["err"].splitlines()
    if facts["code"] == 0:
        assert name in MAY_LOAD, facts["out"]
        assert "sha256         0" not in facts["out"].splitlines()
        assert all(line.startswith("note: ") for line in lines)
    else:
        assert facts["code"] == (2 if name in ASKS else 3), facts["err"]
        assert facts["out"] == ""
        assert [line.partition(": ")[0] for line in lines] == ["error", "hint"], facts["err"]
        error = lines[0].removeprefix("error: ")
        assert 0 < len(error) < LONGEST, error
        assert not re.search(r"(^|: )(\w+Error)?$", error), error
        assert "weights_only" not in error, "torch's advice is bad"
    for line in [*lines, *facts["out"].splitlines()]:
        assert line.isprintable(), repr(line)
    assert facts["seconds"] < MAX_SECONDS
    assert facts["growth"] < MAX_GROWTH, f"{facts['growth'] >> 20} MB"


if __name__ == "__main__":
    child(json.load(sys.stdin))
