"""Text that came from files and names, made safe to show."""

from __future__ import annotations

MAX_SHOWN = 700


def printable(text: str) -> str:
    """Return the text on one line without control characters, shortened.

    Names and files may hold escape sequences, which a terminal would obey, characters that turn
    the direction of writing, and bytes that are not UTF-8. They are shown as Python writes them.
    """
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_utf8(text: str) -> bool:
    """Tell whether a name is UTF-8: it may hold other bytes, which Python carries along."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
