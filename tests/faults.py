"""Commands that start at once and may be killed, and what a fault has to leave behind.

A server process has torch and cmtool imported and forks: a command is a process of its own, in its
own folder, with its streams in files, and its end by a signal is a real one.
"""

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cmtool.cli
import cmtool.data.datasets
import cmtool.training.run
from cmtool.system.slurm import ranks
from tests.cli.conftest import hasten

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [__name__, "torch._dynamo", "torch.utils.flop_counter", "matplotlib.backends.backend_agg"]
)
NUMBERS = itertools.count()
STREAMS = tempfile.TemporaryDirectory()


def _command(arguments, folder, streams, options):
    torch.set_num_threads(1)
    os.chdir(folder)
    tty, max_file = options.get("tty"), options.get("max_file")
    if tty:
        os.setsid()
        terminal = os.open(tty, os.O_RDWR)  # and now the one that controls this session
        for number in range(3):
            os.dup2(terminal, number)
    else:
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    if max_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
    if options.get("streamed"):
        cmtool.data.datasets.MAX_IN_MEMORY = 0
    if options.get("environment") is not None:
        os.environ.clear()
        os.environ.update(options["environment"])
        os.environ.update(ranks(os.environ))  # of srun
    if not options.get("rights", True):  # root's, to write anywhere
        assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0
    if options.get("bare"):
        hasten(pytest.MonkeyPatch())
    sys.argv = ["cmtool", *arguments]
    cmtool.cli.main(arguments)


class Command:
    """`cmtool ARGUMENTS` in a folder, started."""

    def __init__(self, *arguments, folder, **options):
        """Options: `max_file`, how long files may be; `streamed`, data are, however few they be;

        `tty`, the terminal it runs on; `environment`; `rights`, whether root has any; and `bare`,
        without the report and the look at memory.
        """
        number = next(NUMBERS)
        self.streams = [Path(STREAMS.name) / f"{name}-{number}" for name in ("out", "err")]
        words = [str(a) for a in arguments]
        self.process = CONTEXT.Process(target=_command, args=(words, folder, self.streams, options))
        self.process.start()
        self.pid = self.process.pid

    def send(self, number):
        os.kill(self.pid, number)

    def ended(self):
        return self.process.exitcode is not None

    def said(self):
        return self.streams[1].read_text() if self.streams[1].exists() else ""

    def finish(self, patience=200):
        """Return the exit code, stdout and stderr; minus n is an end by signal n."""
        self.process.join(patience)
        assert self.ended(), f"runs on after {patience} s: {self.said()}"
        out, err = (path.read_text() if path.exists() else "" for path in self.streams)
        for path in self.streams:
            path.unlink(missing_ok=True)
        assert "Traceback" not in err, err
        assert "Exception" not in err, err
        return self.process.exitcode, out, err

    def done(self):
        """Return stderr of a command that does what it should."""
        code, _, err = self.finish()
        assert code == 0, err
        return err

    def failed(self, code, *texts, patience=200):
        """Return stderr of a command that ends with a code, two lines that say why, and no data."""
        found, out, err = self.finish(patience)
        assert found == code, err
        assert out == ""
        for text in texts:
            assert text in err
        end = err.splitlines()[-2:]
        assert [line.partition(": ")[0] for line in end] == ["error", "hint"], err
        return err

    def kill(self):
        self.send(signal.SIGKILL)
        code, _, err = self.finish()
        assert code == -signal.SIGKILL, err

    def wait_for(self, condition, patience=100):
        """Wait until a condition holds; the process must not end before."""
        end = time.monotonic() + patience
        while not condition():
            assert not self.ended(), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)

    def suspend_when(self, condition, patience=100):
        """Suspend the process in a moment in which a condition holds."""
        end = time.monotonic() + patience
        while True:
            self.wait_for(condition, end - time.monotonic())
            self.send(signal.SIGSTOP)
            while state(self.pid) not in "TZ":
                time.sleep(0.0002)
            if condition():
                assert state(self.pid) == "T", self.said()
                return
            self.send(signal.SIGCONT)

    def children(self):
        """Return the process ids of the data workers."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def state(pid):
    """Return the state of a process as one letter, Z when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def steps(out):
    """Return the numbers of the checkpoints of a run."""
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def logged(out):
    """Return the last step in log.jsonl, 0 before the first."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def written(out, command):
    """Return how many files the checkpoint has that a command is writing, -1 while it is none."""
    for folder in (out / "checkpoints").glob(f".tmp-[0-9]*-{command.pid}"):
        with contextlib.suppress(OSError):
            return len(list(folder.iterdir()))
    return -1


def contents(folder):
    """Return all files under a folder with their bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(out):
    """Return what is half written in a run folder."""
    return [p for p in out.rglob(".*") if ".tmp" in p.name]


def status(out):
    return json.loads((out / "status.json").read_text())


def final_tensors(out):
    """Return every tensor of a run's newest checkpoint."""
    newest = out / "checkpoints" / f"step-{steps(out)[-1]:07d}"
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def log_lines(out):
    """Return log.jsonl without what depends on the clock and the machine."""
    free = {
        "time",
        "images_per_second",
        "step_seconds",
        "step_cpu_seconds",
        "data_wait",
        "memory_gib",
        "mfu",
    }
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in free} for line in lines]


def assert_same_run(a, b):
    """Two runs ended with the same bits in every tensor, and logged the same on the way."""
    ours, theirs = final_tensors(a), final_tensors(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert log_lines(a) == log_lines(b)


def fill(folder):
    """Fill the disk under a folder, and return the file that does it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return path


@contextlib.contextmanager
def small_disk(size):
    """Yield a folder on a disk of so many bytes, or None where that takes more rights."""
    folder = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "cmtool-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@contextlib.contextmanager
def fast_disk():
    """Yield a folder in memory where there is one: a test waits for no disk."""
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
