"""Pictures and pages for people: a run's summary.png, the demo's report.html."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cmtool import __version__
from cmtool.core.checkpoint import write_atomic
from cmtool.core.images import display_scale, grid, to_uint8


class Row(NamedTuple):
    """A line of the report's table; `calls` is None where no network drew the images."""

    label: str
    calls: int | None
    value: float


class Figure(NamedTuple):
    """A picture of the report."""

    caption: str
    path: Path


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>cmtool demo</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }
img { max-width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; } td, th { padding: .3rem 1rem; border-bottom: 1px solid #ccc; }
td + td, th + th { text-align: right; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; }
</style></head><body>
<h1>From noise to digits in one network call</h1>
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
<img alt="{{ figure.caption }}" src="data:image/png;base64,{{ encoded(figure.path) }}">
{% endfor %}<h2>What was run</h2>
<pre>{% for command in commands %}$ {{ command }}
{% endfor %}</pre>
<p>{{ "%.0f"|format(seconds) }} seconds, cmtool {{ version }}.</p>
</body></html>
"""


def write_report(
    path: Path,
    *,
    rows: Sequence[Row],
    figures: Sequence[Figure],
    commands: Sequence[str],
    seconds: float,
) -> None:
    """Write one self-contained HTML page with the table, the figures and the commands."""
    from jinja2 import Environment

    def encoded(picture: Path) -> str:
        return base64.b64encode(picture.read_bytes()).decode()

    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        rows=rows,
        figures=figures,
        commands=commands,
        seconds=seconds,
        encoded=encoded,
        version=__version__,
    )
    write_atomic(path, html.encode())


def picture(images: Tensor, columns: int) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] as one uint8 picture, enlarged for people."""
    return grid(to_uint8(images), columns, scale=display_scale(images.shape[-1]))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of log.jsonl by step, which no clock can turn back, each step's last.

    A line that was cut short or holds rubbish is left out.
    """
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return [lines[step] for step in sorted(lines)]


def write_summary(
    path: Path, log: list[dict[str, Any]], panels: dict[str, Tensor], title: str
) -> None:
    """Write summary.png: the training curve, and each panel's images (B, C, H, W) beside it."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(4.6 + 4.2 * len(panels), 3.4), layout="constrained")
    ratios = [4.2, *[4.2] * len(panels)]
    axes = plot.subplots(1, 1 + len(panels), width_ratios=ratios, squeeze=False)
    curve, *rest = axes[0]
    curve.plot([line["step"] for line in log], [line["loss"] for line in log])
    curve.set(xlabel="step", ylabel="loss", title=title, yscale="log")
    curve.grid(alpha=0.3)
    for axis, (name, images) in zip(rest, panels.items(), strict=True):
        axis.imshow(picture(images, 10).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(title=name)
        axis.set_axis_off()
    temporary = path.with_name(f".{path.name}.tmp.png")
    plot.savefig(temporary, dpi=110)
    temporary.replace(path)
