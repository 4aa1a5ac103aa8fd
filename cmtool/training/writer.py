"""What the leading process writes for people to read: log, status, pictures, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cmtool.data.images import png_bytes
from cmtool.errors import ResourceError
from cmtool.system.files import write_atomic
from cmtool.training.events import Events
from cmtool.training.log import LogFile, read_log
from cmtool.training.plots import picture, write_summary
from cmtool.training.report import write_run_report
from cmtool.training.setup import Run
from cmtool.training.status import StatusWriter

COLUMNS = 10
"""Images in a row of a sample grid."""


class RunWriter:
    """Writes what people read of a run. A run goes on without any of it, and says so."""

    def __init__(self, run: Run, write_status: StatusWriter) -> None:
        self.run, self.write_status = run, write_status
        self.log_file = LogFile(run.out / "log.jsonl")
        tensorboard = run.preset.run.tensorboard
        self.events = Events(run.out / "tensorboard", run.state.step) if tensorboard else None
        self.failing: set[str] = set()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # a second Ctrl-C, which is no Exception, waits for nothing
        if self.events and (kind is None or issubclass(kind, Exception)):
            with self.expendable("tensorboard/"):
                self.events.close()

    @contextmanager
    def expendable(self, what: str) -> Iterator[None]:
        """Go on if something cannot be written; say so once until it can be written again."""
        try:
            yield
        except (OSError, ResourceError) as error:
            if what not in self.failing:
                self.run.watcher.note(f"{what} cannot be written: going on without it; {error}")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def log(self, line: dict[str, Any], seconds_left: float) -> None:
        """Write a line of log.jsonl, and its main figures to status.json."""
        with self.expendable("log.jsonl"):
            self.log_file.write(line)
        if self.events:
            with self.expendable("tensorboard/"):
                self.events.log(line)
        facts = {key: line[key] for key in ("step", "loss", "eval") if key in line}
        with self.expendable("status.json"):
            self.write_status(state="running", **facts, seconds_left=round(seconds_left))

    def samples(self, images: Tensor, step: int) -> None:
        """Write samples/step-NNNNNNN.png."""
        shown = picture(images, COLUMNS)
        path = self.run.out / "samples" / f"step-{step:07d}.png"
        with self.expendable("the sample grid"):
            write_atomic(path, png_bytes(shown))
        if self.events:
            with self.expendable("tensorboard/"):
                self.events.picture("samples", shown, step)

    def report(self) -> None:
        """Write report.html, as the run stands."""
        with self.expendable("report.html"):
            write_run_report(self.run.out)

    def summary(self, panels: dict[str, Tensor]) -> None:
        """Write summary.png: the curve, and images of teacher and model from the same noise."""
        out, title = self.run.out, self.run.preset.description
        with self.expendable("summary.png"):
            write_summary(out / "summary.png", read_log(out / "log.jsonl"), panels, title)
