"""Nothing that happens to stderr ends a command."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress

import pytest

from cmtool.cli._output import Lasting, emit, keep_stderr, say
from tests.cli.conftest import TINY

CMTOOL = [sys.executable, "-m", "cmtool"]


@contextmanager
def stream():
    """stderr on a descriptor that the test may point elsewhere."""
    number = os.open(os.devnull, os.O_WRONLY)
    before = sys.stderr
    with open(number, "w", closefd=False) as sys.stderr:
        try:
            keep_stderr()
            yield number
        finally:
            sys.stderr = before
            os.close(number)


def point(number, path):
    other = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(other, number)
    os.close(other)


def test_stderr_comes_back_when_it_works_again(tmp_path):
    with stream() as number:
        point(number, tmp_path / "log")
        say("one")
        point(number, "/dev/full")
        for _ in range(3000):  # more than any buffer holds
            say("two")
        point(number, tmp_path / "log")
        say("three")
    assert (tmp_path / "log").read_text() == "one\nthree\n"


def test_a_pipe_without_a_reader_and_a_gone_terminal_are_no_errors():
    with stream() as number:
        reading, writing = os.pipe()
        os.dup2(writing, number)
        os.close(writing)
        os.close(reading)
        say("nobody reads this")
        ours, theirs = pty.openpty()
        os.dup2(theirs, number)
        os.close(theirs)
        os.close(ours)
        say("nor this")
        assert not sys.stderr.isatty()


def test_stderr_is_kept_once_and_one_that_is_no_file_is_left(monkeypatch):
    with stream():
        kept = sys.stderr
        keep_stderr()
        assert sys.stderr is kept
        assert isinstance(kept.buffer, Lasting)
        for other in (io.StringIO(), io.TextIOWrapper(io.BytesIO())):
            monkeypatch.setattr(sys, "stderr", other)
            keep_stderr()
            assert sys.stderr is other


def test_what_a_write_takes_is_all_of_it(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda number, content: whole(number, content[:3]))
    with (tmp_path / "log").open("wb") as file:
        assert Lasting(file.fileno()).write(b"0123456789") == 10
    assert (tmp_path / "log").read_bytes() == b"0123456789"


BROKEN = ["2>/dev/full", "2>&-", "2> >(true)", "<&- >&- 2>&-"]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("sample -x", 2),
        pytest.param("sample -c nothing", 3, marks=pytest.mark.slow),
        pytest.param("sample --seeds 0 --out s", 0, marks=pytest.mark.slow),
    ],
)
def test_a_command_ends_with_its_code_whatever_stderr_does(tmp_path, how, words, code):
    command = ["bash", "-c", f'"$0" -m cmtool {words} {how}', sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "s/seed000000.png").exists() == (code == 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_run_ends_well_whatever_stderr_does(tmp_path, how):
    words = " ".join(["train", *TINY, "--set", "train.steps=4", "--out", "r"])
    command = ["bash", "-c", f'"$0" -m cmtool {words} {how}', sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=250)
    assert done.returncode == 0
    assert (tmp_path / "r/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_nohup", [False, True])
def test_a_terminal_that_is_closed_saves_and_ends_a_run_unless_by_nohup(tmp_path, is_nohup):
    ours, theirs = pty.openpty()
    steps = "40" if is_nohup else "1000000"
    words = ["train", *TINY, "--set", f"train.steps={steps}", "--out", "r"]
    launcher = ["setsid", "--ctty", *(["nohup"] if is_nohup else []), *CMTOOL, *words]
    run = subprocess.Popen(
        launcher, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    end = time.monotonic() + 150
    try:
        while not (tmp_path / "r/log.jsonl").exists():
            assert time.monotonic() < end
            with suppress(OSError):  # nothing to read yet; or, with nohup, nobody writes
                os.read(ours, 1 << 16)
            time.sleep(0.05)
        os.close(ours)
        assert run.wait(100) == (0 if is_nohup else 128 + signal.SIGHUP)
    finally:
        run.kill()
        run.wait()
    assert list((tmp_path / "r/checkpoints").glob("step-*"))


def test_a_line_for_stdout_may_be_captured_as_text():
    with redirect_stdout(io.StringIO()) as captured:
        emit("runs/caf\udce9")
    assert captured.getvalue() == "runs/caf\\udce9\n"
