"""Inert stand-ins for what torch puts into pickles: tensors, storages, and EDM's records.

`torch.storage._load_from_bytes` holds a pickle within the pickle, which torch itself would run.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmtool.formats import safe_pickle
from cmtool.formats.safe_pickle import Dtype, Global, Machine, Refused, expect, strings

MAGIC = 0x1950A86A20F9469CFC6C
"""Of torch's legacy layout."""


@dataclass(eq=False)
class Record:
    """An object of EDM's `torch_utils.persistence`: its class by name, its state as plain data."""

    class_name: str
    state: dict[Any, Any]


@dataclass(eq=False)
class Storage:
    """A tensor's storage, writable, of `count` elements; many tensors may be views of it."""

    dtype: torch.dtype
    count: int
    content: memoryview = field(default=memoryview(b""), repr=False)  # legacy: it comes later


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A strided view of a storage, checked to lie inside it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of bytes a copy of the tensor has."""
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """Return the tensor, a view of the storage's memory."""
        if not len(self):
            return torch.zeros(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(self.storage.content, dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


def as_tensors(stored: Mapping[str, StoredTensor], size: int) -> dict[str, Tensor]:
    """Return the tensors of a file of `size` bytes. Raises Refused if they claim more bytes."""
    if sum(map(len, stored.values())) > size:
        raise Refused(f"its tensors claim more bytes than the file's {size:,}")
    return {name: tensor.tensor() for name, tensor in stored.items()}


def load(content: BinaryIO, size: int) -> Any:
    """Return what the one pickle in `content`, of `size` bytes, describes. Raises ValueError."""
    machine = Machine(size, TABLE, STORAGES)
    result = machine.run(content, size)
    if content.tell() != size:
        raise Refused(f"{size - content.tell()} bytes follow the end of the pickle")
    return result


def load_archive(pickle: bytes, storage: Callable[[str], memoryview]) -> Any:
    """Return what the data.pkl of a torch.save archive describes; `storage` gives bytes by key.

    Raises Refused for anything outside ARCHIVE_TABLE, ValueError and its kin for a damaged one.
    """
    storages: dict[str, Storage] = {}

    def persistent(key: Any) -> Storage:
        dtype, name, count = _identity(key, [])
        if name not in storages:
            storages[name] = Storage(dtype, count, storage(name))
        found = storages[name]
        if found.dtype != dtype or len(found.content) != count * dtype.itemsize:
            raise Refused(f"a storage says {count} elements and has {len(found.content)} bytes")
        return found

    machine = Machine(len(pickle), ARCHIVE_TABLE, STORAGES)
    return machine.run(io.BytesIO(pickle), len(pickle), persistent)


def load_legacy(stream: BinaryIO, size: int) -> Any:
    """Return what a torch.save file of torch before 1.6 describes, `size` bytes in all.

    Four pickles (magic number, version, machine, the object), the storages' keys in order, and
    for each the number of elements and the elements. Raises Refused and its kin.
    """
    storages: dict[str, Storage] = {}

    def persistent(key: Any) -> Storage:
        dtype, name, count = _identity(key, [None])
        if count > size:
            raise Refused(f"a storage says {count} elements, more than the file has bytes")
        found = storages.setdefault(name, Storage(dtype, count))
        if (found.dtype, found.count) != (dtype, count):
            raise Refused("a storage is described in two ways")
        return found

    machine = Machine(size, ARCHIVE_TABLE, STORAGES)
    _check_layout("it", *(machine.run(stream, size) for _ in range(3)))
    described = machine.run(stream, size, persistent)
    keys = expect(machine.run(stream, size), list)
    if sorted(strings(keys)) != sorted(storages):
        raise Refused("its storages are not the ones it names")
    for key in keys:
        found = storages[key]
        count = int.from_bytes(stream.read(8), "little", signed=True)
        if count != found.count:
            raise Refused(f"a storage says {found.count} elements, and {count}")
        content = bytearray(min(count * found.dtype.itemsize, size - stream.tell()))
        stream.readinto(content)  # type: ignore[attr-defined]  # a file, or BytesIO: both have it
        if len(content) != count * found.dtype.itemsize:
            raise Refused("a storage is cut short")
        found.content = memoryview(content)
    if stream.tell() != size:
        raise Refused(f"{size - stream.tell()} bytes follow the end of the storages")
    return described


def _check_layout(what: str, magic: Any, version: Any, system: Any) -> None:
    """Raise Refused unless these are the first three pickles of torch's legacy layout."""
    if magic != MAGIC or version != 1001 or type(system) is not dict:
        raise Refused(f"{what} is not in torch's legacy layout")
    if system.get("little_endian") is not True:
        raise Refused(f"{what} is big-endian")


def _identity(key: Any, end: list[None]) -> tuple[torch.dtype, str, int]:
    """Return type, name and number of elements of a storage, by its persistent identity."""
    match key:
        case ("storage", Global() as kind, str() as name, str(), int() as count, *rest):
            if kind in STORAGES and count >= 0 and rest == end:
                return STORAGES[kind], name, count
    raise Refused("a storage is described in an unknown way")


def _record(machine: Machine, meta: Any) -> Record:
    """Stand in for EDM's `_reconstruct_persistent_obj`, which runs the source in the file."""
    expect(meta, dict)
    name, state, source = meta.get("class_name"), meta.get("state"), meta.get("module_src", "")
    if meta.get("type") != "class" or type(name) is not str or type(state) is not dict:
        raise Refused("a persistent object is not a class with a name and a state")
    if id(source) not in machine.sources:  # one text, shared by all objects of a module
        machine.spend(len(expect(source, str)))
        machine.sources[id(source)] = source
    return Record(name, state)


def _tensor(
    _: Machine, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = 0, hooks: Any = None
) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_tensor_v2`: a view that must lie inside its storage."""
    if not isinstance(storage, Storage) or hooks:
        raise Refused("a tensor has no storage, or has hooks")
    numbers = (offset, *expect(size, tuple), *expect(stride, tuple))
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise Refused("a tensor's shape is not made of whole numbers")
    if len(size) > 8:
        raise Refused("a tensor has more than 8 dimensions")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > storage.count or (count and last >= storage.count):
        raise Refused("a tensor is larger than its storage")
    return StoredTensor(storage, offset, size, stride)


def _parameter(machine: Machine, data: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_parameter`."""
    if not isinstance(data, StoredTensor) or hooks:
        raise Refused("a parameter is not a tensor, or has hooks")
    return data


def _storage(machine: Machine, content: Any) -> Storage:
    """Stand in for `torch.storage._load_from_bytes`: torch's legacy layout, one storage in it."""
    stream = io.BytesIO(expect(content, bytes))
    found: list[tuple[torch.dtype, str, int]] = []

    def persistent(key: Any) -> str:
        found.append(_identity(key, [None]))
        return found[-1][1]

    inner = Machine(len(content), {}, STORAGES, machine.opcodes)  # nothing may be called in it
    machine.spend(len(content))
    pickle = partial(inner.run, stream, len(content))
    _check_layout("a storage", pickle(), pickle(), pickle())
    identity, keys = pickle(persistent), pickle()
    machine.opcodes = inner.opcodes
    if len(found) != 1 or identity != found[0][1]:
        raise Refused("a storage is described in an unknown way")
    dtype, name, count = found[0]
    start = stream.tell() + 8
    if keys != [name] or len(content) - start != count * dtype.itemsize:
        raise Refused(f"a storage says {count} elements and has another number of bytes")
    if struct.unpack_from("<q", content, start - 8)[0] != count:
        raise Refused("a storage gives two lengths")
    return Storage(dtype, count, memoryview(bytearray(memoryview(content)[start:])))


NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}


def _dtype(machine: Machine, code: Any, align: Any = False, copy: Any = True) -> Dtype:
    """Stand in for `numpy.dtype`: plain numbers only."""
    if code not in list(NUMBERS):
        raise Refused("a numpy value that is not a plain number")
    return Dtype(code)


def _scalar(machine: Machine, dtype: Any, content: Any) -> Any:
    """Stand in for numpy's `scalar`: a Python number."""
    return struct.unpack(NUMBERS[expect(dtype, Dtype).code], expect(content, bytes))[0]


def _set(machine: Machine, items: Any = ()) -> set[str]:
    machine.spend(len(expect(items, list)) if items else 0)
    return set(strings(items or []))


TABLE: dict[Global, Callable[..., Any]] = {
    Global("torch_utils.persistence", "_reconstruct_persistent_obj"): _record,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch.storage", "_load_from_bytes"): _storage,
    Global("collections", "OrderedDict"): safe_pickle.new_dict,
    Global("dnnlib.util", "EasyDict"): safe_pickle.new_dict,
    Global("torch.nn.modules.container", "ModuleDict"): safe_pickle.new_box,
    Global("torch.nn.modules.container", "ModuleList"): safe_pickle.new_box,
    Global("torch.nn.modules.container", "Sequential"): safe_pickle.new_box,
    Global("numpy.core.multiarray", "scalar"): _scalar,
    Global("numpy._core.multiarray", "scalar"): _scalar,
    Global("numpy", "dtype"): _dtype,
    # ECT's loss needs getattr: here it gives a name, never an attribute
    Global("builtins", "getattr"): lambda _, owner, name: ("attribute", expect(name, str)),
    Global("builtins", "set"): _set,
    Global("__builtin__", "set"): _set,
}
IN_ARCHIVES = ("_rebuild_tensor_v2", "_rebuild_parameter", "OrderedDict")
ARCHIVE_TABLE = {function: made for function, made in TABLE.items() if function.name in IN_ARCHIVES}
STORAGES = {
    Global("torch", "FloatStorage"): torch.float32,
    Global("torch", "HalfStorage"): torch.float16,
    Global("torch", "BFloat16Storage"): torch.bfloat16,
    Global("torch", "DoubleStorage"): torch.float64,
    Global("torch", "LongStorage"): torch.int64,
    Global("torch", "IntStorage"): torch.int32,
    Global("torch", "ByteStorage"): torch.uint8,
    Global("torch", "BoolStorage"): torch.bool,
}
