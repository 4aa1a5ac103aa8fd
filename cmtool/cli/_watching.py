"""How long work is shown while it goes: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from cmtool.cli._output import leads, processes, say, shown

if TYPE_CHECKING:
    from cmtool.training.log import Progress

EVERY = 10.0
"""Seconds between two lines about one piece of work."""
OnProgress = Callable[[str, float, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


class Pace:
    """The pace of one piece of work after another; each has a name, and begins with 0 done."""

    def __init__(self) -> None:
        self.name = ""
        self.start = self.now = time.monotonic()

    def update(self, name: str, done: float) -> bool:
        """Note what is done now; return whether this is another piece of work."""
        last, self.now = self.now, time.monotonic()
        is_new = name != self.name or done == 0
        if is_new:  # what is done already took the time since the last call
            self.name, self.start = name, self.now if done == 0 else last
        return is_new

    def a_second(self, done: float) -> float:
        """Return how much is done a second."""
        return done / max(self.now - self.start, 1e-9)

    def left(self, done: float, total: int) -> str:
        """Return the time left, - if it is not known."""
        known = done > 0 and total > 0
        return _clock((total - done) / self.a_second(done)) if known else "-"


def ticker(unit: str = "images") -> OnProgress:
    """Return a function that says, every ten seconds, how far the leading process is."""
    pace = Pace()
    said = pace.now

    def progress(what: str, done: float, total: int) -> None:
        nonlocal said
        if pace.update(what, done) and done == 0:
            said = pace.now
        if pace.now - said >= EVERY:
            said = pace.now
            mine = ", this process" if processes()[1] > 1 else ""
            left = f", {pace.left(done, total)} left" if total else ""
            of = f" of {total:,}" if total else ""
            rate = pace.a_second(done)
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            say(f"{what}: {done:,.0f}{of} {unit}, {speed} a second{left}{mine}")

    return progress


@contextmanager
def showing(unit: str = "images") -> Iterator[OnProgress]:
    """Yield a function that shows how far work is: a bar on a terminal, lines in a pipe."""
    if not (sys.stderr.isatty() and leads()):
        yield ticker(unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn(WORK), BarColumn(), TextColumn("{task.fields[left]} left")
    console, is_both = Console(stderr=True), sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=is_both) as bar:
        task, pace = bar.add_task("", visible=False, left="-"), Pace()

        def progress(what: str, done: float, total: int) -> None:
            pace.update(what, done)
            bar.update(task, visible=True, **_work(what, done, total, unit, pace))

        yield progress


WORK = "{task.description} {task.fields[amount]}"
"""The text beside a bar of work."""


def _work(what: str, done: float, total: int, unit: str, pace: Pace) -> dict[str, Any]:
    """Return what a bar shows of a piece of work."""
    amount = f"{done:,.0f} of {total:,} {unit}" if total else f"{done:,.0f} {unit}"
    left = pace.left(done, total)
    return {
        "description": what, "completed": done, "total": total or None, "amount": amount,
        "left": left,
    }  # fmt: skip


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

    def __init__(self) -> None:
        self.working = ticker()

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

        self.bar = Progress(TextColumn(WORK), BarColumn(), TextColumn("{task.fields[left]} left"))
        self.task = self.bar.add_task("", total=steps, left="-", amount=f"0/{steps}")
        self.work = self.bar.add_task("", visible=False, left="-", amount="")
        self.pace = Pace()
        self.figures = Text()
        self.live = Live(Group(self.bar, self.figures), console=Console(stderr=True))

    def __enter__(self) -> BarWatcher:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def progress(self, news: Progress) -> None:
        """Move the bar."""
        amount, left = f"{news.step}/{news.steps}", _clock(news.seconds_left)
        self.bar.update(self.task, completed=news.step, amount=amount, left=left)
        self.figures.plain = "  ".join(f"{key} {value}" for key, value in figures_of(news).items())

    def working(self, what: str, done: float, total: int) -> None:
        """Show a second bar until the work is done."""
        self.pace.update(what, done)
        facts = _work(what, done, total, "images", self.pace)
        self.bar.update(self.work, visible=done < total, **facts)

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
