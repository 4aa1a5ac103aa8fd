"""cmtool explain: the pages about methods and tasks."""

from __future__ import annotations

import re
import sys
from typing import Annotated

from typer import Argument

from cmtool.cli import _completion
from cmtool.cli._output import emit

MAX_WIDTH = 100
"""Columns of a page on a terminal: longer lines are hard to read."""


def explain(
    topic: Annotated[
        str | None,
        Argument(help="Name of a page. Default: list them.", autocompletion=_completion.topics),
    ] = None,
) -> None:
    """Explain a method or a task: print a page, or list all pages.

    `cmtool explain`

    `cmtool explain cd`

    `cmtool explain troubleshooting | less`

    A terminal shows the page formatted. A pipe gets its Markdown.
    """
    from cmtool.docs import page, titles

    if topic is None:
        width = max(map(len, titles()))
        for name, title in titles().items():
            emit(f"{name:<{width}}  {title}")
    elif sys.stdout.isatty():
        _show(page(topic))
    else:
        emit(page(topic).rstrip("\n"))


def _show(markdown: str) -> None:
    """Print Markdown formatted; a link to a page becomes its text, which names the command."""
    from rich.console import Console
    from rich.markdown import Markdown

    text = re.sub(r"\[([^\]]+)\]\([\w.-]+\.md\)", r"\1", markdown)
    console = Console()
    console.print(Markdown(text), width=min(console.width, MAX_WIDTH))
