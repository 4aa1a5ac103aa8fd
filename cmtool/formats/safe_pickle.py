"""A reader of pickles that executes nothing: its own small stack machine over plain data.

Python's own unpickling runs any code that the file names. Here `pickletools` of the standard
library decodes the opcodes, and a small machine plays them. It knows literals, containers and a
fixed table of names. Each name has an inert stand-in; the real object is never imported. The
result is made of Python's plain types and of inert records.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

MAX_OPCODES = 200_000
MAX_LINE = 1024
MAX_KEY = 2**31
LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING",
)  # fmt: skip


class Refused(ValueError):
    """The pickle holds something that weights do not need."""


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to; only those of the machine's table may be called."""

    module: str
    name: str


@dataclass(eq=False)
class Box:
    """A container module: ModuleDict, ModuleList or Sequential."""

    state: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Dtype:
    """A numpy dtype: one letter of kind and one digit of size."""

    code: str


@dataclass(eq=False)
class Array:
    """A numpy array: the state it is built from."""

    state: tuple[Any, ...] = ()


@dataclass(eq=False)
class Bounded:
    """A stream of so many bytes, in which no length can ask for more than there is."""

    content: BinaryIO
    size: int

    def read(self, count: int) -> bytes:
        """Return exactly `count` bytes; fewer than asked for only one by one, at the end."""
        if count > 1 and count > self.size - self.content.tell():
            raise Refused("a length points beyond the end of the pickle")
        return self.content.read(count)

    def readline(self) -> bytes:
        """Return a line. Names are short."""
        line = self.content.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise Refused("a name is too long")
        return line

    def tell(self) -> int:
        """Return the position."""
        return self.content.tell()


@dataclass(eq=False)
class Machine:
    """Plays pickles; `budget` bounds the bytes that all storages together may have.

    `table` are the names that may be called, with their stand-ins; `names` those that may only be
    referred to. `sources` are the texts of source code met, by their id.
    """

    budget: int
    table: Mapping[Global, Callable[..., Any]]
    names: Collection[Global] = ()
    opcodes: int = 0
    sources: dict[int, str] = field(default_factory=dict)

    def known(self, module: Any, name: Any) -> Global:
        """Return the name, if it is one of the table's. Nothing is imported."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name is not text")
        wanted = Global(module, name)
        if wanted not in self.table and wanted not in self.names:
            raise Refused(f"it refers to {module}.{name}, which weights do not need")
        return wanted

    def spend(self, count: int) -> None:
        """Take so many bytes from the budget. Raises Refused when it is spent."""
        self.budget -= count
        if self.budget < 0:
            raise Refused("it asks for more memory than the file is large")

    def run(
        self, content: BinaryIO, size: int, persistent: Callable[[Any], Any] | None = None
    ) -> Any:
        """Return what the pickle at the position of `content`, `size` bytes in all, describes."""
        pickle, action_of = Pickle(self, persistent), OPCODES.get
        opcodes = pickletools.genops(cast(BinaryIO, Bounded(content, size)))
        for opcode, arg, _ in opcodes:
            self.opcodes += 1  # of all pickles together: an action may play one inside of this
            if self.opcodes > MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES:,} opcodes: too many for weights")
            action = action_of(opcode.name)
            if action is None:
                raise Refused(f"opcode {opcode.name} has no place among weights")
            action(pickle, arg)
        (value,) = pickle.pop(1)  # genops has raised ValueError where there is no STOP
        if pickle.stack or pickle.marks:
            raise Refused("the pickle leaves things behind")
        return value

    def call(self, function: Any, args: Any) -> Any:
        """Return what the stand-in of `function` makes of `args`."""
        if not isinstance(function, Global) or function not in self.table:
            raise Refused(f"the pickle calls {shown(function)}, which is not a function")
        if not isinstance(args, tuple):
            raise Refused("a call's arguments are not a tuple")
        try:
            return self.table[function](self, *args)
        except TypeError:
            raise Refused(f"the pickle calls {shown(function)} with other arguments") from None


class Pickle:
    """A pickle while it is played: its stack, marks and memo."""

    def __init__(self, machine: Machine, persistent: Callable[[Any], Any] | None) -> None:
        self.machine = machine
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.push = self.stack.append

    def pop(self, count: int) -> list[Any]:
        """Take so many values, all above the last mark, from the stack."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise Refused("the pickle's stack runs empty")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def pop_mark(self) -> list[Any]:
        """Take the last mark, and all above it, from the stack."""
        if not self.marks:
            raise Refused("the pickle's stack runs empty")
        return self.pop(len(self.stack) - self.marks.pop())

    def top(self) -> Any:
        """Return the value on top of the stack, which stays there."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("the pickle's stack runs empty")
        return self.stack[-1]


def _literal(pickle: Pickle, arg: Any) -> None:
    if isinstance(arg, int) and abs(arg) >= 2**80:  # torch's magic number has 80 bits
        raise Refused("an integer of more than 80 bits")
    pickle.push(arg)


def _get(pickle: Pickle, index: int) -> None:
    if index not in pickle.memo:
        raise Refused("the pickle refers to what it has not stored")
    pickle.push(pickle.memo[index])


def _put(pickle: Pickle, index: int) -> None:
    if index > len(pickle.memo) + 8:
        raise Refused(f"memo index {index} is far beyond the {len(pickle.memo)} in use")
    pickle.memo[index] = pickle.top()


def _extend(items: list[Any], target: Any) -> None:
    expect(target, list).extend(items)


def _new_object(pickle: Pickle, arg: None) -> None:
    cls, args = pickle.pop(2)
    container = isinstance(cls, Global) and pickle.machine.table.get(cls) in (new_box, new_dict)
    if not container or args != ():
        raise Refused("the pickle makes an object of another class than containers")
    pickle.push(pickle.machine.call(cls, args))


def _add_items(pickle: Pickle, arg: None) -> None:
    items = pickle.pop_mark()
    expect(pickle.top(), set).update(strings(items))


def _build(pickle: Pickle, arg: None) -> None:
    (state,) = pickle.pop(1)
    target = pickle.top()
    if isinstance(target, Box | Array) and not target.state:
        target.state = expect(state, dict if isinstance(target, Box) else tuple)
    elif isinstance(target, Dtype) and type(state) is tuple and state[1:2] in (("<",), ("|",)):
        return  # the byte order, which is ours
    elif type(target) is dict and type(state) is dict and list(state) == ["_metadata"]:
        return  # an attribute of every state dict: the versions of its layers
    else:
        raise Refused(f"the pickle sets the state of {shown(target)}")


def _persistent(pickle: Pickle, arg: None) -> None:
    if pickle.persistent is None:
        raise Refused("opcode BINPERSID has no place among weights")
    pickle.push(pickle.persistent(pickle.pop(1)[0]))


def shown(value: Any) -> str:
    """Return how to call a value in a message: a name, or its type."""
    return f"{value.module}.{value.name}" if isinstance(value, Global) else type(value).__name__


def expect(value: Any, kind: type) -> Any:
    """Return the value. Raises Refused unless it is of that very type."""
    if type(value) is not kind:
        raise Refused(f"{shown(value)} stands where {kind.__name__} belongs")
    return value


def strings(items: list[Any]) -> list[str]:
    """Return the items. Only strings: the hash of nested tuples takes exponential time."""
    return [expect(item, str) for item in items]


def _update(items: list[Any], target: Any) -> dict[Any, Any]:
    """Return the dict `target` with alternating keys and values added; no key comes twice."""
    expect(target, dict)
    if len(items) % 2:
        raise Refused("a dictionary has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int) or (type(key) is int and abs(key) > MAX_KEY):
            raise Refused("a dictionary's key is neither text nor a small number")
        if key in target:
            raise Refused("a dictionary's key comes twice")
        target[key] = value
    return target


def new_box(machine: Machine) -> Box:
    """Stand in for a container module."""
    return Box()


def new_dict(machine: Machine, items: Any = ()) -> dict[Any, Any]:
    """Stand in for OrderedDict and EasyDict."""
    if items not in ((), []):
        raise Refused("a dictionary is made from more than nothing")
    return {}


NUMPY_TABLE: dict[Global, Callable[..., Any]] = {
    Global("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),  # its state will fill it
    Global("numpy._core.multiarray", "_reconstruct"): lambda *_: Array(),
    Global("numpy", "ndarray"): lambda *_: Array(),
    Global("numpy", "dtype"): lambda _, code, align=0, copy=1: Dtype(expect(code, str)),
}
"""The names in a pickle of numpy arrays, under numpy 1 and 2."""

OPCODES: dict[str, Callable[[Pickle, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda p, arg: None),
    **dict.fromkeys(LITERALS, _literal),
    "NONE": lambda p, arg: p.push(None),
    "NEWTRUE": lambda p, arg: p.push(True),
    "NEWFALSE": lambda p, arg: p.push(False),
    "EMPTY_DICT": lambda p, arg: p.push({}),
    "EMPTY_LIST": lambda p, arg: p.push([]),
    "EMPTY_TUPLE": lambda p, arg: p.push(()),
    "EMPTY_SET": lambda p, arg: p.push(set()),
    "TUPLE1": lambda p, arg: p.push(tuple(p.pop(1))),
    "TUPLE2": lambda p, arg: p.push(tuple(p.pop(2))),
    "TUPLE3": lambda p, arg: p.push(tuple(p.pop(3))),
    "TUPLE": lambda p, arg: p.push(tuple(p.pop_mark())),
    "LIST": lambda p, arg: p.push(p.pop_mark()),
    "DICT": lambda p, arg: p.push(_update(p.pop_mark(), {})),
    "MARK": lambda p, arg: p.marks.append(len(p.stack)),
    "POP": lambda p, arg: p.marks.pop() if p.marks[-1:] == [len(p.stack)] else p.pop(1),
    "POP_MARK": lambda p, arg: p.pop_mark(),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda p, arg: _put(p, len(p.memo)),
    "SETITEM": lambda p, arg: _update(p.pop(2), p.top()),
    "SETITEMS": lambda p, arg: _update(p.pop_mark(), p.top()),
    "APPEND": lambda p, arg: _extend(p.pop(1), p.top()),
    "APPENDS": lambda p, arg: _extend(p.pop_mark(), p.top()),
    "ADDITEMS": _add_items,
    "GLOBAL": lambda p, arg: p.push(p.machine.known(*arg.split(" ", 1))),
    "STACK_GLOBAL": lambda p, arg: p.push(p.machine.known(*p.pop(2))),
    "REDUCE": lambda p, arg: p.push(p.machine.call(*p.pop(2))),
    "NEWOBJ": _new_object,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
"""What each opcode does, given the pickle and the opcode's argument; no other may occur."""
