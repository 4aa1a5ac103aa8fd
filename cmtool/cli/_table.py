"""A table on stdout: for people on a terminal, and for programs in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from cmtool.cli._output import emit, shown


def show_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, with_head: bool = True
) -> None:
    """Print a table: for people on a terminal, else cells apart by tabs, the head if wanted."""
    if not sys.stdout.isatty():
        for row in [head, *rows] if with_head else rows:
            emit("\t".join(map(shown, row)))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(*map(escape, map(shown, head)), box=None)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console().print(table)
