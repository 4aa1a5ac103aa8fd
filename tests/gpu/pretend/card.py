"""What the pretended card has counted, read from the library that is in this process."""

import ctypes
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@cache
def library():
    """Return the library, which was loaded before Python."""
    return ctypes.CDLL(None)


def is_there():
    """Tell whether this process has the card."""
    return hasattr(library(), "pretend_read")


@dataclass
class Counted:
    """What was done: how often, by name, and from where the host waited for the card."""

    counts: dict[str, int] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)
    """Each wait: why, and the line of Python that led to it."""

    def __str__(self):
        """Return where the host waited, a line each."""
        return "\n".join([f"{len(self.waits)} waits for the card", *self.waits])

    def total(self, what):
        """Return how often something was done whose name begins with a word."""
        return sum(times for name, times in self.counts.items() if name.startswith(f"{what} "))

    @property
    def launches(self):
        """Kernels, and what is like one: cuDNN's and cuBLAS's operations, clearing memory."""
        return self.total("launch")


def read():
    """Return all counts since they were forgotten, by name."""
    size = library().pretend_read(None, 0) + (1 << 16)
    buffer = ctypes.create_string_buffer(size)
    library().pretend_read(buffer, size)
    lines = (line.split("\t") for line in buffer.value.decode().splitlines())
    return {name: int(times) for times, name in lines}


def place():
    """Return the innermost line of cmtool or of the tests that is running, and its function."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/cmtool/" in frame.filename or "/tests/" in frame.filename:
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return "a thread without Python"


@contextmanager
def counting():
    """Yield what is counted inside the block; it is there after the block."""
    counted = Counted()
    listener = LISTENER(lambda why: counted.waits.append(f"{why.decode()}, {place()}"))
    before = read()
    library().pretend_on_wait(listener)
    try:
        yield counted
    finally:
        library().pretend_on_wait(LISTENER())
        after = read()
        made = {name: times - before.get(name, 0) for name, times in after.items()}
        counted.counts = {name: times for name, times in made.items() if times}
