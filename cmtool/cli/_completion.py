"""What the Tab key offers after an option. It imports no torch, and offers nothing if it fails."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import typer

ROOT = Path(__file__).parent.parent
MOST = 100
"""Classes that are offered."""
HARMLESS = re.compile(r"[\w ./:@%+,=~^-]+")
"""Names that are offered: zsh evaluates what it is given, and folders may have any name."""
Completion = Callable[[typer.Context, str], list[str]]


def completing(names: Callable[[typer.Context, str], Iterable[str]]) -> Completion:
    """Return what a shell asks: those of the names that begin with what is typed, `incomplete`.

    Nobody can answer an error in the middle of a line, so whatever goes wrong, nothing is offered.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            found = (name for name in names(ctx, incomplete) if name.startswith(incomplete))
            return list(filter(HARMLESS.fullmatch, found))
        except Exception:
            return []

    return complete


def fixed(*names: str) -> Completion:
    """Return a completion of names that are always the same."""
    return completing(lambda ctx, incomplete: names)


def keys_of(file: str, name: str) -> Completion:
    """Return a completion of the names in a registry."""
    return completing(lambda ctx, incomplete: registry(file, name))


def registry(file: str, name: str) -> list[str]:
    """Return the keys of a dict literal, or the items of a tuple, that a file of cmtool assigns.

    The file is read and not imported: most of them import torch.
    """
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return [str(item.value) for item in items if isinstance(item, ast.Constant)]
    return []


def run_folders(incomplete: str) -> list[str]:
    """Return the runs in the folder that is typed, under runs/ if none is."""
    from cmtool.system.files import is_regular

    folder = incomplete.rpartition("/")[0] or "/" * incomplete.startswith("/")
    places = [Path(folder)] if folder else [Path("runs"), Path()]
    found = (path for place in places for path in place.glob("*/status.json"))
    return sorted(str(path.parent) for path in found if is_regular(path))


def known_classes(ctx: typer.Context) -> Iterable[str]:
    """Return the classes of the model that the line names, by the preset of its run."""
    from cmtool.system.files import read_own

    checkpoint = ctx.params.get("checkpoint")
    if checkpoint in (None, *registry("models.py", "BUNDLED")):
        return map(str, range(10))
    run = Path(str(checkpoint))
    with suppress(OSError, ValueError):
        names = json.loads(read_own(run / "run.json")).get("class_names")
        if names:
            return map(str, names[:MOST])
    table = tomllib.loads(read_own(run / "preset.toml").decode())
    return map(str, range(min(int(table["model"]["num_classes"]), MOST)))


def pages() -> Iterable[str]:
    """Return the topics of cmtool explain."""
    return (file.stem for file in (ROOT / "docs").glob("*.md"))


def preset_names() -> list[str]:
    """Return the presets that come with cmtool."""
    from cmtool.presets.toml import preset_names

    return preset_names()


def published_names() -> Iterable[str]:
    """Return the names of published weights."""
    from cmtool.weights import PUBLISHED

    return PUBLISHED


models = completing(lambda _, typed: [*registry("models.py", "BUNDLED"), *run_folders(typed)])
runs = completing(lambda _, typed: run_folders(typed))
presets = completing(lambda _, typed: preset_names())
topics = completing(lambda _, typed: sorted(pages()))
classes = completing(lambda ctx, _: known_classes(ctx))
samplers = keys_of("core/samplers.py", "SAMPLERS")
distances = keys_of("core/distances.py", "DISTANCES")
protocols = keys_of("evaluation/features.py", "PROTOCOLS")
data_sets = keys_of("data/datasets.py", "DATASETS")
devices = fixed("auto", "cpu", "cuda", "mps")
precisions = fixed("auto", "fp32", "bf16", "fp16")
kinds = fixed("teacher", "consistency")
weights = fixed("ema", "model", "target")
published = completing(lambda *_: published_names())
