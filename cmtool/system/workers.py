"""Worker processes that work ahead. They may die, hang, or be stopped at any moment."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cmtool.errors import InputError, ResourceError
from cmtool.system.portable import STOPPING, has_fork, signals

WORKER_TIMEOUT = 300
"""Seconds without a result after which workers count as hanging."""


class Results(TorchDataset[Any]):
    """What a function makes of each number, or the InputError that it raises."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        try:
            return self.make(number)
        except InputError as error:  # raised again where the user can see it
            return error


def made_ahead(
    items: TorchDataset[Any], order: Iterable[int], workers: int, timeout: float = WORKER_TIMEOUT
) -> Iterator[Any]:
    """Yield single items in an order; worker processes make them ahead, or this one if 0.

    Where there is no fork it is this one: others could not share the images.

    Raises ResourceError when a worker died, or when all gave nothing for `timeout` seconds. It is
    raised while waiting for an item, never during other work, and then no worker is left.
    """
    before = signal.getsignal(signal.SIGCHLD) if has_fork() else None
    others = multiprocessing.active_children()
    given = _load(items, order, workers if has_fork() else 0)
    crew = [child for child in multiprocessing.active_children() if child not in others]
    late = threading.Event()

    def dismiss() -> None:
        for worker in crew:  # torch would wait for one that hangs
            worker.kill()

    def on_an_end(*_: object) -> None:
        if any(worker.exitcode for worker in crew):
            _handle_children(before)  # else the end of another worker would raise here
            raise RuntimeError("a worker is gone")

    def give_up() -> None:
        late.set()
        dismiss()

    # at its end Python would send a signal, which workers ignore, and wait
    at_exit = Finalize(None, dismiss, exitpriority=1)
    try:
        while True:
            timer = threading.Timer(timeout, give_up)
            timer.daemon = True
            try:
                try:
                    if crew:
                        timer.start()
                        _handle_children(on_an_end)
                        on_an_end()
                    item = next(given)
                finally:  # torch's handler would raise anywhere in the main thread; ours only here
                    _handle_children(before)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # torch raises these when a worker is gone
                if not _one_is_gone(crew):
                    raise
                what = "a data worker died (out of memory?)"
                if late.is_set():
                    what = f"the data workers hang: they gave nothing for {timeout:g} s,"
                hint = "use fewer workers: --set data.workers=1, or in eval --workers 1"
                raise ResourceError(what, hint) from None
            finally:
                timer.cancel()
            yield item
    finally:
        dismiss()
        at_exit.cancel()


def _load(items: TorchDataset[Any], order: Iterable[int], workers: int) -> Iterator[Any]:
    """Start the workers, and return what yields their items in order."""
    with warnings.catch_warnings():  # more workers than processors are only slower
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return iter(DataLoader(
            items, batch_size=None, sampler=order, num_workers=workers,
            prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None, worker_init_fn=_ignore_signals,
        ))  # fmt: skip


def _ignore_signals(_: int) -> None:
    """Make a worker ignore signals, which a terminal sends to it too: its parent ends it."""
    for number in signals(STOPPING[:4]):
        signal.signal(number, signal.SIG_IGN)


def _handle_children(handler: Any) -> None:
    """Set the handler for the end of a child process, where Python allows it."""
    if threading.current_thread() is threading.main_thread() and has_fork():
        signal.signal(signal.SIGCHLD, handler)


def _one_is_gone(crew: Sequence[BaseProcess], patience: float = 2.0) -> bool:
    """Tell whether a worker has died; the news may come a moment after its silence."""
    end = time.monotonic() + patience
    while crew and not any(worker.exitcode for worker in crew):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return bool(crew)
