"""HTML pages, each in one file that needs no other: the demo's, and a run's report.html."""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cmtool import __version__
from cmtool.formats.checkpoints import best
from cmtool.system.files import write_atomic
from cmtool.training.folder import read_json
from cmtool.training.log import read_log
from cmtool.training.plots import run_plots, svgs

MAX_FRAMES = 12
"""A run's report shows at most so many sample grids."""
MAX_BYTES = 16 << 20
"""So many bytes at most in all of them: of large pictures there are fewer."""


class Row(NamedTuple):
    """A row of the demo's table; `calls` is None for images that no network drew."""

    label: str
    calls: int | None
    value: float


class Figure(NamedTuple):
    """A picture of the demo's page."""

    caption: str
    path: Path


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 1rem auto; padding: 0 1rem; }
img { max-width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; } td, th { padding: .3rem 1rem; border-bottom: 1px solid #ccc; }
td + td, th + th { text-align: right; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: .8rem; }
.many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
.many img { width: 100%; } figure { margin: 0; }
.smooth { image-rendering: auto; } .bad { color: #b00020; }
</style></head><body>
"""

DEMO = """<h1>From noise to digits in one network call</h1>
<p>A diffusion teacher was distilled into a consistency model (Song et al. 2023) and both were
measured against the training digits. Lower is nearer; real digits that no model has seen are
the yardstick. fd-digits compares features of a small bundled classifier: it is not the FID of
papers.</p>
<table><tr><th>images</th><th>network calls</th><th>fd-digits</th></tr>
{% for row in rows %}<tr><td>{{ row.label }}</td>
<td>{{ "-" if row.calls is none else row.calls }}</td>
<td>{{ "%.2f"|format(row.value) }}</td></tr>
{% endfor %}</table>
{% for figure in figures %}<h2>{{ figure.caption }}</h2>
<img alt="{{ figure.caption }}" src="{{ png(figure.path) }}">
{% endfor %}<h2>What was run</h2>
<pre>{% for command in commands %}$ {{ command }}
{% endfor %}</pre>
<p>{{ "%.0f"|format(seconds) }} seconds, cmtool {{ version }}.</p>
</body></html>
"""


RUN = """<h1>{{ title }}</h1>
<p>{{ description }}</p>
<p{% if state.state == "failed" %} class="bad"{% endif %}><b>{{ state.state or "not started" }}</b>,
step {{ state.step or 0 }} of {{ state.steps or "?" }}{% if left %}, {{ left }} left{% endif %}
{%- if state.exit_code %}, exit code {{ state.exit_code }}{% endif %}
{%- if state.error %}: {{ state.error }}{% endif %}</p>
<table>
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
<h2>Curves</h2>
<div class="many">{% for title, svg in curves %}<img alt="{{ title }}" src="{{ svg }}">
{% else %}<p>Nothing was logged yet.</p>{% endfor %}</div>
<h2>Samples, from the same noise</h2>
<div class="many">{% for step, path in frames %}<figure><figcaption>step {{ step }}</figcaption>
<img alt="samples at step {{ step }}" src="{{ png(path) }}"></figure>
{% else %}<p>Nothing was sampled yet.</p>{% endfor %}</div>
{% if summary %}<h2>At the end</h2>
<img class="smooth" alt="loss, and images at the end" src="{{ png(summary) }}">{% endif %}
<h2>How it was made</h2>
<details><summary>Preset</summary><pre>{{ preset }}</pre></details>
<details><summary>Arguments, versions, data</summary><pre>{{ provenance }}</pre></details>
<p>Written {{ now }} by cmtool {{ version }}.</p>
</body></html>
"""


def rendered(template: str, **facts: object) -> bytes:
    """Return the page that a template makes of the facts."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(HEAD + template)
    return page.render(png=png, version=__version__, **facts).encode()


def png(path: Path) -> str:
    """Return a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(
    path: Path,
    *,
    rows: Sequence[Row],
    figures: Sequence[Figure],
    commands: Sequence[str],
    seconds: float,
) -> None:
    """Write the demo's page: the table, the figures and the commands."""
    page = rendered(
        DEMO, title="cmtool demo", rows=rows, figures=figures, commands=commands, seconds=seconds
    )
    write_atomic(path, page)


def write_run_report(out: Path) -> None:
    """Write report.html of a run from its folder: curves, samples, provenance."""
    log = read_log(out / "log.jsonl")
    state = read_json(out / "status.json")
    preset = _text(out / "preset.toml")
    plots = run_plots(log)
    encoded = (base64.b64encode(svg.encode()).decode() for svg in svgs(plots))
    summary = out / "summary.png"
    page = rendered(
        RUN,
        title=f"Run {out.resolve().name}",
        description=tomllib.loads(preset).get("description", ""),
        state=state,
        left=_duration(state) if state.get("state") == "running" else None,
        facts=run_facts(log[-1] if log else {}, best(out / "checkpoints")),
        curves=[
            (plot.title, f"data:image/svg+xml;base64,{svg}")
            for plot, svg in zip(plots, encoded, strict=True)
        ],
        frames=frames(out / "samples"),
        summary=summary if summary.is_file() else None,
        preset=preset,
        provenance=_text(out / "run.json"),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomic(out / "report.html", page)


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
    rows = [
        (name, form.format(line[key]))
        for key, (name, form) in shown.items()
        if line.get(key) is not None
    ]
    return rows + [(f"best: {name}", f"{v:.4g}") for name, v in kept.items()]


def frames(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of sample grids, evenly over time and with the last one.

    They are at most MAX_FRAMES, and at most MAX_BYTES together unless the last one is larger.
    """
    paths = sorted(folder.glob("step-*.png"))
    sizes = {path: path.stat().st_size for path in paths}
    for count in range(min(MAX_FRAMES, len(paths)), 0, -1):
        stride = (len(paths) - 1) / max(count - 1, 1)
        chosen = [paths[len(paths) - 1 - round(i * stride)] for i in reversed(range(count))]
        if count == 1 or sum(sizes[path] for path in chosen) <= MAX_BYTES:
            return [(int(path.stem[5:]), path) for path in chosen]
    return []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _duration(state: Mapping[str, Any]) -> str | None:
    seconds = state.get("seconds_left")
    return None if seconds is None else str(timedelta(seconds=seconds))
