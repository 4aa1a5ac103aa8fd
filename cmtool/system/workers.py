"""Work done ahead by worker processes, which may die, hang, or be stopped at any moment."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cmtool.errors import ResourceError

WORKER_TIMEOUT = 300
"""Seconds until a worker that gives nothing is taken for hanging."""


def made_ahead(
    items: TorchDataset[Any], order: Iterable[int], workers: int, timeout: float = WORKER_TIMEOUT
) -> Iterator[Any]:
    """Yield single items in an order, made ahead by worker processes, or here without any.

    Raises ResourceError, in a wait and never in the midst of other work, when a worker died or
    all together gave nothing for `timeout` seconds; then there is no worker left.
    """
    before, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    with warnings.catch_warnings():  # more workers than processors are slower, and no danger
        warnings.filterwarnings("ignore", "This DataLoader will create")
        given = iter(DataLoader(
            items, batch_size=None, sampler=order, num_workers=workers,
            prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None, worker_init_fn=_left_to_the_parent,
        ))  # fmt: skip
    crew = [child for child in multiprocessing.active_children() if child not in others]
    late = threading.Event()

    def dismiss() -> None:
        for worker in crew:  # one that hangs would be waited for
            worker.kill()

    def on_an_end(*_: object) -> None:
        if any(worker.exitcode for worker in crew):
            _handle_children(before)  # another end is no news, and would raise in the midst of this
            raise RuntimeError("a worker is gone")

    def give_up() -> None:
        late.set()
        dismiss()

    # at the end Python would ask them to go by a signal they take no notice of, and wait
    at_exit = Finalize(None, dismiss, exitpriority=1)
    try:
        while True:
            timer = threading.Timer(timeout, give_up)
            timer.daemon = True
            try:
                if crew:
                    timer.start()
                    _handle_children(on_an_end)
                    on_an_end()
                item = next(given)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # what torch says of a worker that is gone
                if not _one_is_gone(crew):
                    raise
                what = "a data worker died (out of memory?)"
                if late.is_set():
                    what = f"the data workers hang: they gave nothing for {timeout:g} s,"
                hint = "lower data.workers (of eval --workers), or look at the machine"
                raise ResourceError(what, hint) from None
            finally:
                timer.cancel()
                _handle_children(before)  # torch's own raises wherever the main thread is
            yield item
    finally:
        dismiss()
        at_exit.cancel()


def _left_to_the_parent(_: int) -> None:
    """Let a worker take no notice of signals, which a terminal sends it too: its parent ends it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _handle_children(handler: Any) -> None:
    """Set the handler of a child's end, where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)


def _one_is_gone(crew: Sequence[BaseProcess], patience: float = 2.0) -> bool:
    """Tell whether a worker has died; its end may be known a moment after its silence."""
    end = time.monotonic() + patience
    while crew and not any(worker.exitcode for worker in crew):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return bool(crew)
