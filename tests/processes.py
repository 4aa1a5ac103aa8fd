"""Processes of one run, as torchrun starts them, forked from one that has torch in memory already.

`python -m tests.processes JOBS`, where JOBS is a JSON list of {"processes", "arguments", "others",
"fault", "patience", "bare"}: the jobs run one after the other, and the last line on stdout says for
each its exit codes by rank, and the seconds between the first end and the last. `others` are more
arguments of all ranks but the first. A fault is [name, rank, step]: it befalls that rank before
that step; that of a rank that is `late` takes 8 seconds. `uncompiled` runs compile nothing. When a
process ends and the others do not within `patience` seconds, they are killed, as torchrun does
after 30. `bare` runs leave out reports and the look at memory.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from cmtool.cli import main
from cmtool.core.methods import METHODS
from cmtool.data import datasets as data
from cmtool.training import checkpoint
from cmtool.training import state as run_state
from tests.cli.conftest import hasten
from tests.training.test_state import WEIGHED

ROOT = str(Path(__file__).parents[1])
PRELOADED = ("torch._dynamo", "torch.utils.flop_counter", "matplotlib.backends.backend_agg")
"""What each process would import for itself: it takes several seconds."""


def boom():
    raise ValueError("boom")


def slow_disk():
    write = checkpoint.write_checkpoint

    def slowly(*arguments):
        time.sleep(6)
        return write(*arguments)

    checkpoint.write_checkpoint = slowly


def late():
    FAULTS["late"] = lambda: None  # once, as a compiler that then has done its work
    time.sleep(8)


FAULTS = {
    "late": late,
    "boom": boom,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "slow disk": slow_disk,
    "hangs": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def befall(name, step):
    """Let a fault happen in this process before a step."""
    batches = run_state.batches

    def faulty(*arguments, **options):
        microbatch = batches(*arguments, **options)

        def fetch(now, shard):
            if now == step:
                FAULTS[name]()
            return microbatch(now, shard)

        return fetch

    run_state.batches = faulty


def forbid_writing(folder, spared):
    """Make every attempt of this process to change a run's folder an error, but for `spared`."""
    spared = tuple(f"{folder}/{name}" for name in spared)

    def audit(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if event == "open" and isinstance(arguments[1], str):
            changes = arguments[1][:1] in "wax" or "+" in arguments[1]
        path = str(arguments[0])
        if changes and path.startswith(folder) and not path.startswith(spared):
            raise PermissionError(f"{event} {arguments[0]} in rank {os.environ['RANK']}")

    sys.addaudithook(audit)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(job, rank, port):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        if job["processes"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": str(job["processes"]), "MASTER_ADDR": "127.0.0.1"}
        if rank and job["arguments"][0] in ("train", "distill"):
            is_last = job.get("fault", [None])[:2] == ["killed", 0]  # then it writes the end
            spared = ["failed", *(["status.json", ".status.json", ".lock"] if is_last else [])]
            forbid_writing(job["arguments"][job["arguments"].index("--out") + 1], spared)
        if job.get("bare"):
            hasten(pytest.MonkeyPatch())
        if job.get("uncompiled"):
            torch.nn.Module.compile = lambda _: None
        if job.get("stream"):
            data.MAX_IN_MEMORY = data.MAX_CHECKED = 0
        name, where, step = job.get("fault") or (None, None, None)
        if where == rank:
            befall(name, step)
        main([*job["arguments"], *(job.get("others", []) if rank else [])])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ends(job):
    port = free_port()
    running = {start(job, rank, port): rank for rank in range(job["processes"])}
    ended = {}
    first = deadline = float("inf")
    while running:
        pid, state = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[running.pop(pid)] = os.waitstatus_to_exitcode(state)
            first = min(first, time.monotonic())
            deadline = first + job.get("patience", 30)
        if time.monotonic() > deadline:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [ended[rank] for rank in range(job["processes"])], time.monotonic() - first


def run(*jobs):
    """Run jobs. Return of each the exit codes by rank and the seconds; stdout by line; stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes", json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, ends = done.stdout.splitlines()
    return json.loads(ends), said, done.stderr


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    METHODS["weighed"] = WEIGHED  # a method that owns a module
    print(json.dumps([ends(job) for job in json.loads(sys.argv[1])]))
