"""Where the golden files are, and how to get at the two that are kept compressed."""

import lzma
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent


def golden(name, folder):
    """Return the path of a golden file or folder, unpacked into `folder` if it is compressed."""
    path = GOLDEN / name
    packed = path.with_name(f"{name}.xz")
    if path.is_file():
        return path
    target = Path(folder) / name
    if target.exists():
        return target
    if packed.is_file():
        target.write_bytes(lzma.decompress(packed.read_bytes()))
        return target
    shutil.copytree(path, target)
    for file in list(target.rglob("*.xz")):
        file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        file.unlink()
    return target
