"""Stubs of the functions that the card's sources do not write out, one line each."""

import re

LIBRARIES = r"cublas|cudnn|cufft|nccl"
SETTINGS = r"Create|Destroy|Set|Get|Find|Algo|Comm|Group|Mem|RedOp|Register|Version|Win"
COMPUTES = {
    "cublas": r".",
    "cudnn": r"Forward|Backward|Loss",
    "cufft": r"Exec",
    "nccl": r"All|Bcast|Broadcast|Gather|Recv|Reduce|Scatter|Send",
}
"""What the names of functions have that launch a kernel, unless they belong to the settings."""


def wanted(symbols):
    """Return the names of libraries among the symbols that a program lacks."""
    return sorted({name for name in symbols if re.match(LIBRARIES, name)})


def stub(name):
    """Return a function of any arguments that says that all went well."""
    library = re.match(LIBRARIES, name)[0]
    if re.match(r"cudnnCreate", name):
        return f"int {name}(void** to) {{ return *to = calloc(1, 256), 0; }}"
    computes = re.search(COMPUTES[library], name[len(library) :])
    noted = f'note("launch {name}"); ' if computes and not re.search(SETTINGS, name) else ""
    return f"int {name}(...) {{ {noted}return 0; }}"


def source(names):
    """Return a source file of stubs."""
    lines = ["#include <cstdlib>", '#include "ledger.h"', 'extern "C" {', *map(stub, names), "}"]
    return "\n".join(lines) + "\n"
