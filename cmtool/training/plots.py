"""Pictures of a run: its curves as SVG, and its summary.png."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.data.drawing import display_scale, grid
from cmtool.data.images import to_uint8
from cmtool.system.files import replacing
from cmtool.system.text import printable

MAX_POINTS = 400
LOWER = ", lower is better"
STYLES = ("-", "--", ":", "-.")
"""Lines of curves, by the ten: there are ten colours that are told apart easily."""
Log = Sequence[Mapping[str, Any]]


class Curve(NamedTuple):
    """A name, and the points (step, value)."""

    name: str
    steps: list[float]
    values: list[float]


class Plot(NamedTuple):
    """Curves over the steps that share their axes."""

    title: str
    curves: list[Curve]
    log_scale: bool = False


def picture(images: Tensor, columns: int) -> Tensor:
    """Return images (B, C, H, W), uint8 or in [-1, 1], as one picture; small ones are enlarged."""
    shown = images if images.dtype == torch.uint8 else to_uint8(images)
    return grid(shown, columns, scale=display_scale(images.shape[-1]))


def run_plots(log: Log) -> list[Plot]:
    """Return the plots of a log, without those that would be empty."""
    bands = list(dict.fromkeys(band for line in log for band in line.get("loss_by_sigma", {})))
    losses = [{"step": line["step"], **line.get("loss_by_sigma", {})} for line in log]
    plots = [
        Plot("loss", [curve_of(log, "loss")], log_scale=True),
        Plot("loss by noise level sigma", [curve_of(losses, b) for b in bands], log_scale=True),
        *(Plot(f"{each.name}{LOWER}", [each]) for each in evaluation_curves(log)),
        Plot("gradient norm", [curve_of(log, "grad_norm")], log_scale=True),
        Plot("learning rate", [curve_of(log, "lr")]),
        Plot("points of the noise grid, N", varying(curve_of(log, "n"))),
        Plot("decay of the target, mu", varying(curve_of(log, "mu"))),
        Plot("images a second", [curve_of(log, "images_per_second")]),
        Plot("share of the peak (MFU)", [curve_of(log, "mfu")]),
    ]
    return not_empty(plots)


def not_empty(plots: Sequence[Plot]) -> list[Plot]:
    """Return the plots and curves that have a point."""
    known = (plot._replace(curves=[c for c in plot.curves if c.values]) for plot in plots)
    return [plot for plot in known if plot.curves]


def evaluation_curves(log: Log) -> list[Curve]:
    """Return a curve for each metric that was measured."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for verdict in (line["eval"] for line in log if line.get("eval")):
        found.setdefault(verdict["metric"], []).append((verdict["step"], verdict["value"]))
    return [each for each in (curve(name, found[name]) for name in found) if each.values]


def overlaid(logs: Mapping[str, Log]) -> list[Plot]:
    """Return a plot of the loss of several runs, by name, and one of each metric; no empty ones."""
    losses = [curve_of(log, "loss")._replace(name=name) for name, log in logs.items()]
    plots = {"loss": Plot("loss", losses, log_scale=True)}
    for name, log in logs.items():
        for each in evaluation_curves(log):
            plot = plots.setdefault(each.name, Plot(f"{each.name}{LOWER}", []))
            plot.curves.append(each._replace(name=name))
    return not_empty(list(plots.values()))


def curve_of(log: Log, key: str) -> Curve:
    """Return the curve of one key of the log lines."""
    return curve(key, [(line["step"], line.get(key)) for line in log])


def varying(curve: Curve) -> list[Curve]:
    """Return the curve; nothing for a constant, which the preset shows."""
    return [curve] if len(set(curve.values)) > 1 else []


def curve(name: str, points: Sequence[tuple[float, float | None]]) -> Curve:
    """Return the points that have a value as a curve of at most MAX_POINTS, by averages."""
    known = [(step, value) for step, value in points if value is not None]
    size = -(-len(known) // MAX_POINTS) or 1
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    steps = [part[-1][0] for part in parts]
    return Curve(name, steps, [sum(value for _, value in part) / len(part) for part in parts])


def plain(text: str) -> str:
    """Return text from elsewhere for matplotlib.

    It takes dollars for formulas, and leaves names that begin with _ out of legends.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def svgs(plots: Sequence[Plot]) -> Iterator[str]:
    """Yield each plot as an SVG document."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.size": 9}):
        for plot in plots:
            figure = Figure(figsize=(4.6, 2.6))
            several = len(plot.curves) > 1
            figure.subplots_adjust(0.14, 0.17, 0.8 if several else 0.97, 0.88)
            axis = figure.subplots()
            draw(axis, plot)
            if several:
                axis.legend(
                    fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1),
                    handlelength=1, borderaxespad=0.2,
                )  # fmt: skip
            svg = io.StringIO()
            with lenient_fonts():
                figure.savefig(svg, format="svg", metadata={"Date": None})
            yield svg.getvalue()


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure in the format that the name says."""
    with replacing(path) as temporary, lenient_fonts():
        figure.savefig(temporary, dpi=110, format=path.suffix[1:])


@contextmanager
def lenient_fonts() -> Iterator[None]:
    """Draw a letter that the font lacks as a box, and warn of none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def plain_lines(text: str) -> str:
    """Return text of several lines for matplotlib."""
    return "\n".join(map(plain, text.split("\n")))


def draw(axis: Any, plot: Plot, places: Mapping[str, int] | None = None) -> None:
    """Draw the curves of a plot, in the colours of the `places` of their names, else in turn.

    A scale that may be logarithmic is so if all values are above 0.
    """
    for number, (name, steps, values) in enumerate(plot.curves):
        place = number if places is None else places[name]
        axis.plot(
            steps, values, label=plain(name), linewidth=1.2, marker="." if len(values) == 1 else "",
            color=f"C{place % 10}", linestyle=STYLES[place // 10 % len(STYLES)],
        )  # fmt: skip
    positive = all(value > 0 for each in plot.curves for value in each.values)
    scale = "log" if plot.log_scale and positive else "linear"
    axis.set(title=plain(plot.title), xlabel="step", yscale=scale)
    axis.grid(alpha=0.3)


def write_plots(path: Path, plots: Sequence[Plot]) -> None:
    """Write a PNG of plots beside each other. A name has one colour in all, and one entry."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(curve.name for plot in plots for curve in plot.curves)
    places = {name: place for place, name in enumerate(names)}
    figure = Figure(figsize=(max(5.6 * len(plots), 7), 4.4), layout="constrained")
    for axis, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        draw(axis, plot, places)
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    shown = [f" {name}" for name in lines]  # one that begins with _ would have no entry
    figure.legend(
        [*lines.values()], shown, loc="outside lower center", frameon=False,
        ncols=min(len(lines), 3), fontsize=8,
    )  # fmt: skip
    write_figure(path, figure)


def write_summary(path: Path, log: Log, panels: dict[str, Tensor], title: str) -> None:
    """Write summary.png: the curve of the loss, and beside it the images (B, C, H, W) by title."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(4.6 + 4.2 * len(panels), 3.4), layout="constrained")
    loss, *rest = plot.subplots(1, 1 + len(panels), squeeze=False)[0]
    draw(loss, Plot("loss", [curve_of(log, "loss")], log_scale=True))
    loss.set_ylabel("loss")
    loss.set_title(plain_lines(title), fontsize=10)
    for axis, (name, images) in zip(rest, panels.items(), strict=True):
        _show(axis, picture(images, 10))
        axis.set_title(plain_lines(name), fontsize=10)
        axis.set_axis_off()
    write_figure(path, plot)


def write_curves(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str
) -> None:
    """Write a plot of (x, y) with logarithmic axes, in the format that the name of `path` says."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = plot.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), label=plain(name), marker=".", linewidth=1.2)
    axis.set(xlabel=plain(xlabel), ylabel=plain(ylabel), xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    write_figure(path, plot)


class Reached(NamedTuple):
    """What a run has reached: seconds, images seen, and the distance for each number of steps."""

    seconds: float
    images: float
    values: Sequence[float]


def mean_curve(runs: Sequence[Sequence[Reached]]) -> list[Reached]:
    """Return the means of several runs of a method, point by point."""
    curve = []
    for points in zip(*runs, strict=True):
        seconds, images, values = zip(*points, strict=True)
        many = [sum(each) / len(each) for each in zip(*values, strict=True)]
        curve.append(Reached(sum(seconds) / len(runs), sum(images) / len(runs), many))
    return curve


def write_methods(
    path: Path,
    curves: Mapping[str, Sequence[Sequence[Reached]]],
    teacher: tuple[str, float],
    samples: Mapping[str, Tensor],
    steps: Sequence[int],
    metric: str,
) -> None:
    """Write a PNG of methods: distance against time and images, and samples (B, C, H, W) below.

    `curves` has the runs of each method: one a seed, which is faint if there are several. The
    first of `steps` is a full line, the others are broken. `teacher` is a label and a distance.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.6 + 0.62 * len(samples)), layout="constrained")
    parts = figure.add_gridspec(2, 1, height_ratios=(4.6, 0.62 * len(samples)))
    above, below = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    axes = above.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("seconds", "images"), strict=True):
        for place, (name, runs) in enumerate(curves.items()):
            _draw_method(axis, key, place, name, runs, len(steps))
        axis.axhline(teacher[1], color="0.3", linewidth=1.4, linestyle=":", label=plain(teacher[0]))
        axis.set(xscale="log", yscale="log", xlabel=XLABELS[key])
        axis.grid(alpha=0.25, which="both")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(lambda value, _: short_number(value))
            side.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(plain(f"{metric}{LOWER}"))
    handles, labels = axes[0].get_legend_handles_labels()
    for number, n in enumerate(steps):
        handles += axes[0].plot([], [], color="0.3", linestyle=STYLES[number])
        labels.append(f"in {n} step{'s' * (n > 1)}")
    above.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    _draw_rows(below, samples)
    write_figure(path, figure)


XLABELS = {"seconds": "seconds of training", "images": "images seen"}
MARKERS = "osD^vP"
"""Marks of points, by the ten: there are ten colours that are told apart easily."""


def short_number(value: float) -> str:
    """Return 0.5, 200, 20k, 5M: a number that fits below an axis."""
    for least, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _draw_method(
    axis: Any, key: str, place: int, name: str, runs: Sequence[Sequence[Reached]], lines: int
) -> None:
    """Draw the curves of a method: each run if there are several, and their mean."""
    look = {"color": f"C{place % 10}", "marker": MARKERS[place // 10 % len(MARKERS)]}
    for number in range(lines):
        for run in runs if len(runs) > 1 else ():
            x, y = [getattr(p, key) for p in run], [p.values[number] for p in run]
            axis.plot(x, y, color=look["color"], alpha=0.3, linewidth=0.8)
        mean = mean_curve(runs)
        axis.plot(
            [getattr(p, key) for p in mean], [p.values[number] for p in mean],
            linestyle=STYLES[number], linewidth=1.6 if number == 0 else 1.1, markersize=3.5,
            label=plain(name) if number == 0 else "_", **look,
        )  # fmt: skip


def _show(axis: Any, image: Tensor) -> None:
    """Draw an image (C, H, W) uint8 pixel by pixel; one of a channel is grey, black to white."""
    shown = image.permute(1, 2, 0).numpy()
    axis.imshow(shown, interpolation="nearest", cmap="gray", vmin=0, vmax=255)


def _draw_rows(figure: Any, samples: Mapping[str, Tensor]) -> None:
    """Draw a row of images for each name."""
    axes = figure.subplots(len(samples), 1, squeeze=False)[:, 0]
    for axis, (name, images) in zip(axes, samples.items(), strict=True):
        _show(axis, picture(images, len(images)))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=9)
