"""--show: pictures in the terminal, by its own image protocol, or else as coloured half blocks."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cmtool.cli._output import leads, say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Show = Annotated[
    bool, Option("--show", help="Draw the pictures in the terminal too, as many as fit.")
]
MOST = 40
"""Pictures that are shown."""
CHUNK = 4096
"""Characters of base64 that kitty's protocol takes at once."""


def show(pictures: Sequence[Tensor]) -> None:
    """Draw pictures (C, H, W) uint8 of one size in the terminal that stderr is, or say why not."""
    if not leads() or not pictures:
        return
    if not sys.stderr.isatty():
        say("note: --show draws in a terminal, and stderr is none")
        return
    import torch

    from cmtool.data.drawing import contact_sheet, grid, narrowed, png_bytes

    images = torch.stack([picture.cpu() for picture in pictures[:MOST]])
    protocol = image_protocol(os.environ)
    if protocol is not None:
        sys.stderr.write(PROTOCOLS[protocol](png_bytes(contact_sheet(images))) + "\n")
    else:
        columns, lines = terminal_size()
        h, w = images.shape[-2:]
        across, down = max(1, min(10, columns // (w + 1))), max(1, 2 * lines // (h + 1))
        sheet = grid(images[: across * down], across).expand(3, -1, -1).permute(1, 2, 0)
        _print_blocks(narrowed(sheet.numpy(), columns))
    sys.stderr.flush()


def terminal_size() -> tuple[int, int]:
    """Return the columns and lines of the terminal; 80 and 24 where it does not say them."""
    try:
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        columns, lines = 0, 0
    return columns or 80, lines or 24


def image_protocol(variables: Mapping[str, str]) -> str | None:
    """Return the protocol that the terminal says it has, by its environment: kitty, iterm or None.

    Inside tmux or screen there is none: they pass no pictures on.
    """
    if "TMUX" in variables or variables.get("TERM", "").startswith(("screen", "tmux")):
        return None
    program = variables.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in variables or program == "ghostty":
        return "kitty"
    return "iterm" if program in ("iTerm.app", "WezTerm") else None


def kitty(png: bytes) -> str:
    """Return the words that make a terminal draw a PNG, by kitty's graphics protocol."""
    text = base64.standard_b64encode(png).decode()
    parts = [text[first : first + CHUNK] for first in range(0, len(text), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(parts) - 1)]
    more = [*[1] * (len(parts) - 1), 0]
    words = zip(heads, more, parts, strict=True)
    return "".join(f"\x1b_G{head}m={has_more};{part}\x1b\\" for head, has_more, part in words)


def iterm(png: bytes) -> str:
    """Return the words that make a terminal draw a PNG, by iTerm2's inline images."""
    text = base64.standard_b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)}:{text}\a"


PROTOCOLS = {"kitty": kitty, "iterm": iterm}


def _print_blocks(picture: np.ndarray) -> None:
    """Print a picture (H, W, 3), two pixels a character: one in front and the lower one behind."""
    import numpy as np
    from rich.color import Color
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    if len(picture) % 2:
        picture = np.concatenate([picture, np.full_like(picture[:1], 255)])
    console = Console(file=sys.stderr, soft_wrap=True)
    if console.no_color or console.color_system is None:
        say("note: --show needs colours, and this terminal has none")
        return
    for upper, lower in zip(picture[::2], picture[1::2], strict=True):
        line = Text()
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            line.append("\u2580", style)
        console.print(line)
