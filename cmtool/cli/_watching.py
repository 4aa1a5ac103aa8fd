"""How a training run is shown while it goes: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cmtool.cli._output import leads, say, shown

if TYPE_CHECKING:
    from cmtool.training.log import Progress


def figures_of(news: Progress) -> dict[str, str]:
    """Return the figures of the last log line by name, as people read them; none before it."""
    line = news.line
    if not line:
        return {}
    bands = "/".join(_figure(loss, 2) for loss in line["loss_by_sigma"].values())
    figures = {"loss": _figure(line["loss"]), "by_sigma": bands}
    if line["skipped"]:
        figures["skipped"] = str(line["skipped"])
    figures["images/s"] = f"{line['images_per_second']:.0f}"
    figures["Mimg"] = f"{line['images'] / 1e6:.4g}"
    figures["data_wait"] = f"{line['data_wait']:.1%}"
    figures["mem"] = f"{line['memory_gib']:.2f}GiB"
    if "mfu" in line:
        figures["mfu"] = f"{line['mfu']:.1%}"
    if found := line.get("eval"):
        figures[found["metric"]] = f"{found['value']:.4g}"
    return figures


class LineWatcher(AbstractContextManager["LineWatcher"]):
    """Shows how a run goes in plain lines, for pipes and logs."""

    def __exit__(self, *_: object) -> None:
        return None

    def progress(self, news: Progress) -> None:
        """Write a line at each log interval."""
        if news.is_log_line:
            figures = " ".join(f"{key}={value}" for key, value in figures_of(news).items())
            say(f"step={news.step}/{news.steps} {figures} left={_clock(news.seconds_left)}")

    def note(self, text: str) -> None:
        """Write a remark."""
        say(text)


class BarWatcher:
    """Shows how a run goes as a progress bar over the last log line, for terminals."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[left]} left"),
        )
        self.task = self.bar.add_task("", total=steps, left="-")
        self.figures = Text()
        self.live = Live(Group(self.bar, self.figures), console=Console(stderr=True))

    def __enter__(self) -> BarWatcher:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def progress(self, news: Progress) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=news.step, left=_clock(news.seconds_left))
        self.figures.plain = "  ".join(f"{key} {value}" for key, value in figures_of(news).items())

    def note(self, text: str) -> None:
        """Write a remark above the bar."""
        self.live.console.print(shown(text), markup=False, highlight=False)


def make_watcher(steps: int) -> LineWatcher | BarWatcher:
    """Return a bar on a terminal, plain lines in a pipe; only the first process prints them."""
    return BarWatcher(steps) if sys.stderr.isatty() and leads() else LineWatcher()


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
