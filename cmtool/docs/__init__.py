"""The pages that `cmtool explain` prints: each is a Markdown file of this folder."""

from __future__ import annotations

from pathlib import Path

from cmtool.errors import UserError, nearest

FOLDER = Path(__file__).parent


def titles() -> dict[str, str]:
    """Return the title of each page by its topic, sorted by topic."""
    files = sorted(FOLDER.glob("*.md"))
    return {file.stem: _read(file).partition("\n")[0].lstrip("# ") for file in files}


def page(topic: str) -> str:
    """Return the Markdown of a page. Raises UserError for an unknown topic."""
    if topic not in titles():
        raise UserError(f"no page {topic!r}", nearest(topic, titles()))
    return _read(FOLDER / f"{topic}.md")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
