"""A reader of pickles that executes nothing: its own small stack machine over plain data.

Unpickling runs whatever the file says. Here opcodes are decoded by the standard library's
`pickletools` (which executes nothing) and played on a machine that knows only literals,
containers, and a fixed table of names. Each name has an inert stand-in; the real object is never
imported. What comes out is Python's plain types, and inert records.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

MAX_OPCODES = 200_000
MAX_LINE = 1024
MAX_KEY = 2**31

LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """The pickle holds something that plain weights do not need."""


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to; only those of TABLE may be called."""

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


class Bounded:
    """A stream of so many bytes, in which no length can ask for more than there is."""

    def __init__(self, content: BinaryIO, size: int) -> None:
        self.content = content
        self.size = size

    def read(self, count: int) -> bytes:
        """Return exactly `count` bytes; fewer than asked for only one by one, at the end."""
        if count > max(self.size - self.content.tell(), 1):
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


class Machine:
    """Plays pickles; `budget` bounds the bytes that all storages together may have.

    `table` are the names that may be called, with their stand-ins; `names` those that may only be
    referred to.
    """

    def __init__(
        self,
        budget: int,
        table: Mapping[Global, Callable[..., Any]],
        names: Collection[Global] = (),
    ) -> None:
        self.budget = budget
        self.table = table
        self.names = names
        self.opcodes = 0
        self.sources: dict[int, tuple[str, str]] = {}

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
        """Return the value of the pickle at the content's position, which moves past it.

        `size` is the whole length of the content.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop(count: int) -> list[Any]:
            floor = marks[-1] if marks else 0
            if count < 0 or len(stack) - count < floor:
                raise Refused("the pickle's stack runs empty")
            taken = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return taken

        def pop_mark() -> list[Any]:
            if not marks:
                raise Refused("the pickle's stack runs empty")
            taken = stack[marks[-1] :]
            del stack[marks.pop() :]
            return taken

        def top() -> Any:
            if len(stack) <= (marks[-1] if marks else 0):
                raise Refused("the pickle's stack runs empty")
            return stack[-1]

        arg: Any
        for opcode, arg, _ in pickletools.genops(cast(BinaryIO, Bounded(content, size))):
            name = opcode.name
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES:,} opcodes: too many for weights")
            if name in LITERALS:
                stack.append(_literal(arg))
            elif name in ("BINGET", "LONG_BINGET"):
                if arg not in memo:
                    raise Refused("the pickle refers to what it has not stored")
                stack.append(memo[arg])
            elif name in ("BINPUT", "LONG_BINPUT"):
                if arg > len(memo) + 8:
                    raise Refused(f"memo index {arg} is far beyond the {len(memo)} in use")
                memo[arg] = top()
            elif name == "MEMOIZE":
                memo[len(memo)] = top()
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name in TUPLES:
                stack.append(tuple(pop(TUPLES[name])))
            elif name == "TUPLE":
                stack.append(tuple(pop_mark()))
            elif name == "LIST":
                stack.append(pop_mark())
            elif name == "DICT":
                stack.append(_updated({}, pop_mark()))
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "POP":
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    pop(1)
            elif name == "POP_MARK":
                pop_mark()
            elif name in ("SETITEM", "SETITEMS"):
                items = pop(2) if name == "SETITEM" else pop_mark()
                _updated(top(), items)
            elif name in ("APPEND", "APPENDS"):
                items = pop(1) if name == "APPEND" else pop_mark()
                expect(top(), list).extend(items)
            elif name == "ADDITEMS":
                items = pop_mark()
                expect(top(), set).update(strings(items))
            elif name == "GLOBAL":
                stack.append(self.known(*arg.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self.known(*pop(2)))
            elif name == "REDUCE":
                function, args = pop(2)
                stack.append(self._call(function, args))
            elif name == "NEWOBJ":
                cls, args = pop(2)
                container = isinstance(cls, Global) and self.table.get(cls) in (new_box, new_dict)
                if not container or args != ():
                    raise Refused("the pickle makes an object of another class than containers")
                stack.append(self._call(cls, args))
            elif name == "BUILD":
                (state,) = pop(1)
                _build(top(), state)
            elif name == "BINPERSID" and persistent is not None:
                stack.append(persistent(pop(1)[0]))
            elif name == "STOP":
                (result,) = pop(1)
                if stack or marks:
                    raise Refused("the pickle leaves things behind")
                return result
            elif name not in ("PROTO", "FRAME"):
                raise Refused(f"opcode {name} has no place among weights")
        raise Refused("the pickle does not end")

    def _call(self, function: Any, args: Any) -> Any:
        """Return what the stand-in of `function` makes of `args`."""
        if not isinstance(function, Global) or function not in self.table:
            raise Refused(f"the pickle calls {shown(function)}, which is not a function")
        if not isinstance(args, tuple):
            raise Refused("a call's arguments are not a tuple")
        return self.table[function](self, *args)


def _literal(arg: Any) -> Any:
    if isinstance(arg, int) and abs(arg) >= 2**80:  # torch's magic number has 80 bits
        raise Refused("an integer of more than 80 bits")
    return arg


def shown(value: Any) -> str:
    """Return how to call a value in a message: a name, or its type."""
    if isinstance(value, Global):
        return f"{value.module}.{value.name}"
    return type(value).__name__


def expect(value: Any, kind: type) -> Any:
    """Return the value. Raises Refused unless it is of that very type."""
    if type(value) is not kind:
        raise Refused(f"{shown(value)} stands where {kind.__name__} belongs")
    return value


def strings(items: list[Any]) -> list[str]:
    """Return the items. Only strings: the hash of nested tuples takes exponential time."""
    return [expect(item, str) for item in items]


def _updated(target: Any, items: list[Any]) -> dict[Any, Any]:
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


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Box) and not target.state:
        target.state = expect(state, dict)
    elif isinstance(target, Array) and not target.state:
        target.state = expect(state, tuple)
    elif isinstance(target, Dtype) and type(state) is tuple and state[1:2] in (("<",), ("|",)):
        return  # the byte order, which is ours
    elif type(target) is dict and type(state) is dict and list(state) == ["_metadata"]:
        return  # an attribute of every state dict: the versions of its layers
    else:
        raise Refused(f"the pickle sets the state of {shown(target)}")


def new_box(machine: Machine) -> Box:
    """Stand in for a container module."""
    return Box()


def new_dict(machine: Machine, items: Any = ()) -> dict[Any, Any]:
    """Stand in for OrderedDict and EasyDict."""
    if items not in ((), []):
        raise Refused("a dictionary is made from more than nothing")
    return {}


def _array(machine: Machine, *args: Any) -> Array:
    """Stand in for numpy's `_reconstruct`: an array that its state will fill."""
    return Array()


def _dtype(machine: Machine, code: Any, align: Any = 0, copy: Any = 1) -> Dtype:
    return Dtype(expect(code, str))


NUMPY_TABLE: dict[Global, Callable[..., Any]] = {
    Global("numpy.core.multiarray", "_reconstruct"): _array,
    Global("numpy._core.multiarray", "_reconstruct"): _array,
    Global("numpy", "ndarray"): _array,
    Global("numpy", "dtype"): _dtype,
}
"""The names in a pickle of numpy arrays, under numpy 1 and 2."""
