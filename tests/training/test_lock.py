import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from cmtool.errors import BusyError, ResourceError
from cmtool.training import lock
from cmtool.training.folder import keep_status
from cmtool.training.lock import is_held, locked, read_status, refuse_busy, tell_killed
from cmtool.training.report import write_run_report
from cmtool.training.start import remarks_on_end

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(out):
    """Another process that holds the lock of a folder; it is killed after the block."""
    command = [sys.executable, "-c", HOLDER, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            yield
        finally:
            holder.kill()


def write(out, state="running", age=0.0, host=None, **facts):
    facts |= {"state": state, "step": 7, "pid": 1, "host": host or platform.node()}
    (out / "status.json").write_text(json.dumps(facts))
    os.utime(out / "status.json", (time.time() - age,) * 2)


def break_locks(monkeypatch, number):
    """Make every file system one that says `number` when a lock is asked for."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_run_whose_lock_is_held_is_running_however_old_its_heartbeat(tmp_path):
    for host in (None, "elsewhere"):
        write(tmp_path, age=1e6, host=host)
        with another(tmp_path):
            assert is_held(tmp_path) is True
            assert read_status(tmp_path).state == "running"
        with locked(tmp_path):  # by this process
            assert read_status(tmp_path).state == "running"


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_run_of_this_machine_that_nobody_holds_was_killed(tmp_path, has_lock):
    write(tmp_path, loss=0.5)
    if has_lock:
        with another(tmp_path):
            pass
    assert is_held(tmp_path) is False
    found = read_status(tmp_path)
    assert (found.state, found.step) == ("killed", 7)
    assert remarks_on_end(tmp_path)[0].endswith(
        "was killed, or the machine went down, after step 7"
    )
    write_run_report(tmp_path)
    assert '<p class="bad"><b>killed</b>' in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"  # as it was


@pytest.mark.parametrize(("age", "state"), [(30, "running"), (-30, "running"), (4000, "killed")])
def test_a_run_of_another_machine_is_judged_by_its_heartbeat(tmp_path, age, state):
    write(tmp_path, age=age, host="elsewhere")
    assert read_status(tmp_path).state == state


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_a_run_that_said_how_it_ended_is_believed(tmp_path, state):
    write(tmp_path, state, age=1e6)
    assert read_status(tmp_path).state == state
    assert remarks_on_end(tmp_path) == []


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(lock, "is_held", lambda out: bool(write(out, "done")))
    assert read_status(tmp_path).state == "done"


def test_looking_at_a_run_does_not_keep_it_from_starting(tmp_path):
    with another(tmp_path):
        pass
    file = (tmp_path / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    closing = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(0.05)"], pass_fds=[file.fileno()]
    )
    file.close()
    with locked(tmp_path, patience=5.0):
        pass
    closing.wait(10)


def test_a_run_sets_the_time_of_its_status_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    status = tmp_path / "status.json"
    with keep_status(tmp_path):
        os.utime(status, (0, 0))
        end = time.monotonic() + 5
        while status.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_without_the_call_a_run_goes_on_and_a_second_is_noticed_or_the_note_is_there(
    tmp_path, monkeypatch
):
    """Some releases of filelock make do with a file then."""
    break_locks(monkeypatch, errno.ENOSYS)
    notes = []
    with locked(tmp_path, notes.append):
        if notes:
            assert "without locks" in notes[0]
        else:
            with pytest.raises(BusyError):
                refuse_busy(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_heartbeat_tells_who_lives(tmp_path, monkeypatch, number):
    break_locks(monkeypatch, number)
    notes = []
    with locked(tmp_path, notes.append):
        refuse_busy(tmp_path)
    (note,) = notes
    assert "without locks: a second run in it will not be noticed" in note
    assert is_held(tmp_path) is None
    for age, state in ((30, "running"), (4000, "killed")):
        write(tmp_path, age=age)
        assert read_status(tmp_path).state == state


def test_another_error_of_the_lock_is_no_missing_feature(tmp_path, monkeypatch):
    break_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="rror"), locked(tmp_path):
        pass


def test_who_survives_the_leading_process_says_how_the_run_ended(tmp_path):
    write(tmp_path, loss=0.5)
    error = ResourceError("no contact with another process after step 7: connection closed")
    with another(tmp_path):
        tell_killed(tmp_path, error)
        assert read_status(tmp_path).state == "running"
        with pytest.raises(BusyError):
            refuse_busy(tmp_path)
    tell_killed(tmp_path, error)
    tell_killed(tmp_path, ResourceError("another survivor"))
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["exit_code"], found["error"]) == ("failed", 5, error.what)
    assert (found["step"], found["loss"]) == (7, 0.5)
