"""HTML pages, each in one file that needs no other: the demo's, and a run's report.html."""

from __future__ import annotations

import base64
import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cmtool import __version__
from cmtool.errors import InputError
from cmtool.formats.checkpoints import best
from cmtool.system.files import is_regular, read_own, write_atomic
from cmtool.system.records import known_facts
from cmtool.training.guide import good_loss, known_preset, next_commands, title
from cmtool.training.lock import read_status
from cmtool.training.log import read_log
from cmtool.training.plots import run_plots, svgs
from cmtool.training.records import Record

TRAINING_IMAGES = "training-images.png"
MAX_FRAMES = 12
MAX_BYTES = 16 << 20
MAX_PICTURE = 256 << 20


class Row(NamedTuple):
    """A row of the demo's table; `calls` is None for images that no network drew."""

    label: str
    calls: int | None
    value: float


class Figure(NamedTuple):
    """A picture of the demo's page."""

    caption: str
    path: Path


def rendered(template: str, **facts: object) -> bytes:
    """Return the page that a template of this folder makes of the facts."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent))
    page = pages.get_template(template)
    return page.render(png=png, version=__version__, **facts).encode(errors="backslashreplace")


def png(path: Path) -> str:
    """Return a PNG file as a data URI."""
    return data_uri("image/png", read_own(path, MAX_PICTURE))


def data_uri(kind: str, content: bytes) -> str:
    """Return content of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_report(
    path: Path, *, rows: list[Row], figures: list[Figure], commands: list[str], seconds: float
) -> None:
    """Write the demo's page: the table, the figures and the commands."""
    facts = {"rows": rows, "figures": figures, "commands": commands, "seconds": seconds}
    write_atomic(path, rendered("demo.html.jinja", title="cmtool demo", **facts))


def write_run_report(out: Path) -> None:
    """Write report.html of a run from its folder: curves, samples, provenance."""
    log = read_log(out / "log.jsonl")
    status = read_status(out)
    record = known_facts(out / "run.json", Record)
    known = known_preset(out)
    preset = _text(out / "preset.toml")
    plots = run_plots(log)
    drawn = (data_uri("image/svg+xml", svg.encode()) for svg in svgs(plots))
    summary, training = out / "summary.png", out / TRAINING_IMAGES
    left = status.seconds_left if status and status.state == "running" else None
    page = rendered(
        "report.html.jinja",
        title=title(out, known, record),
        description=_description(preset),
        state=status,
        left=None if left is None else str(timedelta(seconds=left)),
        facts=run_facts(log[-1] if log else {}, best(out / "checkpoints")),
        curves=[(plot.title, uri) for plot, uri in zip(plots, drawn, strict=True)],
        good_loss=good_loss(known),
        commands=next_commands(out, known, status),
        training=training if is_regular(training) else None,
        class_names=record.class_names if record else [],
        frames=frames(out / "samples"),
        summary=summary if is_regular(summary) else None,
        preset=preset,
        provenance=_text(out / "run.json"),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomic(out / "report.html", page)


def _description(preset: str) -> object:
    try:
        return tomllib.loads(preset).get("description", "")
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""


def run_facts(line: Mapping[str, Any], kept: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the rows of a run's table, from its last log line and its best checkpoints."""
    if not line:
        return []
    shown = {
        "loss": ("loss", "{:.4g}"),
        "images": ("images seen", "{:,}"),
        "images_per_second": ("images a second", "{:,}"),
        "mfu": ("share of the peak (MFU)", "{:.1%}"),
        "data_wait": ("waiting for images", "{:.1%}"),
        "memory_gib": ("memory, at most", "{} GiB"),
    }
    known = [(line[key], *how) for key, how in shown.items() if line.get(key) is not None]
    rows = [(name, form.format(value)) for value, name, form in known]
    return rows + [(f"best: {name}", f"{v:.4g}") for name, v in kept.items()]


def frames(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of sample grids, evenly over time and with the last one.

    They are at most MAX_FRAMES, and at most MAX_BYTES together unless the last one is larger.
    """
    named = (p for p in folder.glob("step-*.png") if re.fullmatch("[0-9]{1,18}", p.stem[5:]))
    paths = sorted(path for path in named if is_regular(path))
    for count in range(min(MAX_FRAMES, len(paths)), 0, -1):
        stride = (len(paths) - 1) / max(count - 1, 1)
        chosen = [paths[len(paths) - 1 - round(i * stride)] for i in reversed(range(count))]
        if count == 1 or sum(path.stat().st_size for path in chosen) <= MAX_BYTES:
            return [(int(path.stem[5:]), path) for path in chosen]
    return []


def _text(path: Path) -> str:
    """Return the text in a file of the run, "" for one that cannot be read."""
    try:
        return read_own(path).decode(errors="replace")
    except (OSError, InputError):
        return ""
