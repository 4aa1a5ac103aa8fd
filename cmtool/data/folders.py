"""Images as single files: in a folder, or named in a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cmtool.data.entries import Entries, Names, fingerprint, is_image
from cmtool.data.images import SUFFIXES
from cmtool.data.labels import check_table, find_labels
from cmtool.errors import InputError


def folder_entries(path: Path) -> Entries:
    """Return the images under a folder, sorted by path."""
    found = []
    for folder, _, files in os.walk(path):
        inside = os.path.relpath(folder, path)
        for file in files:
            name = file if inside == "." else f"{inside}/{file}".replace(os.sep, "/")
            if is_image(name):
                found.append(name)
    found.sort()
    if not found:
        raise InputError(f"no images in {path}", f"looked for {', '.join(SUFFIXES)}")

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path / name} cannot be read: {error.strerror}", "repair the file, or remove it"
            ) from None

    def beside(name: str, limit: int) -> bytes | None:
        file = path / name
        if not file.is_file():
            return None
        check_table(file.stat().st_size, limit, str(file))
        return read(name)

    labels = find_labels(str(path), found, beside)
    sizes = (f"{name} {(path / name).lstat().st_size}" for name in found)
    names = Names(found)
    return Entries(names, lambda i: read(names[i]), labels, fingerprint(sizes, labels))


def listed_entries(paths: Sequence[str]) -> Entries:
    """Return the image files of a list of paths, in the order of the list."""
    names = Names(paths)

    def read(index: int) -> bytes:
        try:
            return Path(names[index]).read_bytes()
        except OSError as error:
            raise InputError(
                f"{names[index]} cannot be read: {error.strerror}", "check the path"
            ) from None

    return Entries(names, read, None, fingerprint(paths, None))
