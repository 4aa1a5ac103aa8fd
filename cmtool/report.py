"""Pictures of a run: its curve and its samples in one PNG."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from cmtool.core.images import display_scale, grid, to_uint8


def picture(images: Tensor, columns: int) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] as one uint8 picture, enlarged for people."""
    return grid(to_uint8(images), columns, scale=display_scale(images.shape[-1]))


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of log.jsonl, without a last line that was cut short."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def write_summary(
    path: Path, log: list[dict[str, float]], panels: dict[str, Tensor], title: str
) -> None:
    """Write summary.png: the training curve, then each panel's images (B, C, H, W) side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 + 3.4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(
        1, 1 + len(panels), width_ratios=[4.2, *[3.4] * len(panels)], squeeze=False
    )
    curve, *rest = axes[0]
    curve.plot([line["step"] for line in log], [line["loss"] for line in log])
    curve.set(xlabel="step", ylabel="loss", title=title)
    curve.set_yscale("log")
    curve.grid(alpha=0.3)
    for axis, (name, images) in zip(rest, panels.items(), strict=True):
        axis.imshow(picture(images, 10).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(title=name)
        axis.set_axis_off()
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
