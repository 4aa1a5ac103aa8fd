import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cmtool.errors import ResourceError
from cmtool.system import workers
from cmtool.system.workers import made_ahead


class Numbers(torch.utils.data.Dataset):
    """Its own indices, and the pid of the worker that gave them."""

    def __getitem__(self, index):
        return index, os.getpid()


def busy(seconds):
    """Some work in this process, in the midst of which a signal would be felt."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def busy_until_dead(pid):
    """Some work in this process until another, that was killed, has come to its end."""
    end, stat = time.monotonic() + 30, Path(f"/proc/{pid}/stat")
    while stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < end
        busy(0.05)
    busy(0.2)


@pytest.mark.parametrize("count", [0, 2])
def test_items_come_in_order_and_leave_no_worker(count):
    given = list(made_ahead(Numbers(), iter([3, 1, 2]), count))
    assert [index for index, _ in given] == [3, 1, 2]
    assert (os.getpid() in {pid for _, pid in given}) == (count == 0)
    assert multiprocessing.active_children() == []


def test_more_workers_than_processors_are_no_matter_for_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert len(list(made_ahead(Numbers(), iter([3, 1, 2]), 2))) == 3


def test_a_killed_worker_is_told_in_a_wait_and_not_in_the_midst_of_work():
    before = signal.getsignal(signal.SIGCHLD)
    given = made_ahead(Numbers(), itertools.count(), 2)
    _, pid = next(given)
    os.kill(pid, signal.SIGKILL)
    busy_until_dead(pid)
    with pytest.raises(ResourceError, match=r"a data worker died \(out of memory\?\)"):
        next(given)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_second_worker_that_ends_meanwhile_is_no_news(monkeypatch):
    given = made_ahead(Numbers(), itertools.count(), 2)
    _, pid = next(given)
    os.kill(pid, signal.SIGKILL)

    def looked(crew):
        os.kill(os.getpid(), signal.SIGCHLD)
        busy(0.05)
        return any(worker.exitcode for worker in crew)

    monkeypatch.setattr("cmtool.system.workers._one_is_gone", looked)
    with pytest.raises(ResourceError, match="a data worker died"):
        list(itertools.islice(given, 100))


def test_a_broken_pipe_that_is_felt_before_the_signal_is_told_too(monkeypatch):
    def broken(given):
        yield next(given)
        raise ConnectionResetError

    def looked(crew):
        crew[0].kill()
        busy(0.05)  # its signal is felt here
        return look(crew)

    load, look = workers._load, workers._one_is_gone
    monkeypatch.setattr(workers, "_load", lambda *arguments: broken(load(*arguments)))
    monkeypatch.setattr(workers, "_one_is_gone", looked)
    with pytest.raises(ResourceError, match="a data worker died"):
        list(made_ahead(Numbers(), itertools.count(), 2))


def test_workers_that_hang_are_told_and_killed():
    given = made_ahead(Numbers(), itertools.count(), 2, timeout=0.3)
    for pid in {next(given)[1] for _ in range(2)}:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"the data workers hang: they gave nothing for 0.3 s"):
        list(itertools.islice(given, 100))
    assert time.monotonic() - start < 5
    assert multiprocessing.active_children() == []


def test_a_terminals_signals_are_not_the_workers(capfd):
    given = made_ahead(Numbers(), itertools.count(), 2)
    pids = {next(given)[1] for _ in range(2)}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
            os.kill(pid, number)
        busy(0.1)
        later = [next(given)[1] for _ in range(8)]
    finally:
        signal.signal(signal.SIGINT, before)
        given.close()
    assert set(later) == pids
    assert capfd.readouterr().err == ""


def test_an_abandoned_wait_leaves_no_worker_though_they_hang():
    given = made_ahead(Numbers(), itertools.count(), 2)
    for pid in {next(given)[1] for _ in range(2)}:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    given.close()
    assert time.monotonic() - start < 4
    assert multiprocessing.active_children() == []


def test_a_process_that_ends_in_the_midst_of_it_takes_its_workers_along():
    code = (
        "import itertools; from tests.system.test_workers import Numbers, made_ahead\n"
        "given = made_ahead(Numbers(), itertools.count(), 2); print(next(given)[1])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)
