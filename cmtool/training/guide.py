"""What a report tells people of a run in words: what it is, what is good, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from cmtool.core.methods import METHODS
from cmtool.data.datasets import DATASETS
from cmtool.errors import UserError
from cmtool.presets.build import needs_teacher
from cmtool.presets.schema import Preset
from cmtool.presets.toml import load_preset
from cmtool.system.files import is_regular
from cmtool.system.text import printable
from cmtool.training.records import Record, Status

GOOD_LOSS = (
    "A good loss falls fast at first, and then flattens. Whether the model is good is for the"
    " samples to say, or for a metric."
)
"""For methods whose row says nothing else."""
LONGEST = 30
"""Characters of a name in a title."""


class Command(NamedTuple):
    """Something to do with a run: what it is for, and what to type."""

    purpose: str
    line: str


def known_preset(out: Path) -> Preset | None:
    """Return the preset of a run, None for one that cannot be read."""
    path = out / "preset.toml"
    if not is_regular(path):
        return None
    try:
        return load_preset(str(path))
    except (UserError, OSError, ValueError, RecursionError):
        return None


def good_loss(preset: Preset | None) -> str:
    """Return what the loss of a good run by the preset's method looks like."""
    row = METHODS.get(preset.loss.method.name) if preset else None
    return row.good_loss if row and row.good_loss else GOOD_LOSS


def about(preset: Preset, origin: str | None, data: str | None) -> list[str]:
    """Return ["consistency distillation of TEACHER", "on DATA"], as far as these are known.

    `origin` is the teacher, or the model whose weights the run started from.
    """
    what = preset.loss.method.name.replace("_", " ")
    if origin is not None:
        row = METHODS.get(preset.loss.method.name)
        what += f" {'of' if row and row.needs_teacher else 'from'} {short(origin)}"
    return [what] if data is None else [what, f"on {short(data)}"]


def title(out: Path, preset: Preset | None, record: Record | None) -> str:
    """Return "Run NAME: what was trained, on what"."""
    origin = record and (record.teacher or record.init)
    data = record.data.name if record and record.data else None
    parts = about(preset, origin.source if origin else None, data) if preset else []
    return ": ".join(filter(None, [f"Run {printable(out.resolve().name)}", " ".join(parts)]))


def short(name: str) -> str:
    """Return a name or path that fits into a title: of a long one the end."""
    shown = printable(name)
    return shown if len(shown) <= LONGEST else f"...{shown[3 - LONGEST :]}"


def next_commands(out: Path, preset: Preset | None, status: Status | None) -> list[Command]:
    """Return what to do with a run: go on with it if it stopped, use its model if it is done."""
    if preset is None or preset.loss.method.name not in METHODS or status is None:
        return []
    run, trains_alone = shlex.quote(str(out)), not needs_teacher(preset)
    if status.state in ("stopped", "failed", "killed"):
        command = "train" if trains_alone else "distill"
        return [Command("Go on with it", f"cmtool {command} --resume --out {run}")]
    if status.state != "done":
        return []
    is_own = preset.data.path.partition(":")[0] not in DATASETS
    data = shlex.quote(preset.data.path)
    picture, morph = (shlex.quote(f"{out.resolve().name}.{end}") for end in ("png", "gif"))
    reference = f" --reference {data}" if is_own else ""
    found = [
        Command("Draw images", f"cmtool sample -c {run} --seeds 0-15 --out {picture}"),
        Command("Measure it", f"cmtool eval fid -c {run}{reference}"),
    ]
    if preset.kind == "teacher" and trains_alone:
        line = f"cmtool distill --teacher {run}" + (f" --data {data}" if is_own else "")
        found.insert(0, Command("Distill it into a model that draws in one step", line))
    if preset.kind == "consistency":
        line = f"cmtool edit interpolate -c {run} --seeds 3,7 --frames 24 --out {morph}"
        found.insert(1, Command("Morph one image into another", line))
    return found
