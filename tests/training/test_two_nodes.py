"""Two nodes of one run, as two network namespaces: the link goes down, one node is taken away."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import TINY
from tests.training.test_torchrun import ENVIRONMENT, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone]

TIMEOUT = 5
NODES = "ab"
LINK = "cmtool0"


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces():
    """The names of two network namespaces that are joined by one link."""
    names = [f"cmtool-{os.getpid()}-{node}" for node in NODES]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", LINK, "netns", names[0], "type", "veth",
           "peer", "name", LINK, "netns", names[1])  # fmt: skip
        for host, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@pytest.fixture
def nodes(namespaces, tmp_path):
    """The torchrun of each of two nodes, their run for ever, its folder and what each told."""
    out, told = tmp_path / "run", [tmp_path / f"stderr-{node}" for node in NODES]
    processes = []
    with contextlib.ExitStack() as stack:
        for rank, (name, file) in enumerate(zip(namespaces, told, strict=True)):
            launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            launcher += ["--node-rank", str(rank), "--master-addr", "10.77.0.1"]
            run = ["-m", "cmtool", "train", "--preset", "digits-ct", "--out", str(out), *TINY]
            run += ["--set", "train.steps=100000", "--set", f"run.timeout={TIMEOUT}"]
            stderr = stack.enter_context(file.open("w"))
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *launcher, *run],
                env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": LINK}, stdout=stderr, stderr=stderr,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # its workers see that they are left behind
            processes.append(process)
        wait_for(out / "log.jsonl", '"step": 4,')
        yield processes, out, told


def status(out):
    return json.loads((out / "status.json").read_text())


def test_both_nodes_give_up_when_the_link_goes_down(namespaces, nodes):
    processes, out, told = nodes
    ip("-n", namespaces[1], "link", "set", LINK, "down")
    start = time.monotonic()
    for rank, file in enumerate(told):
        wait_for(file, f"error: rank {rank}: no contact with another process")
    assert time.monotonic() - start < TIMEOUT + 5
    assert [process.wait(60) for process in processes] == [1, 1]
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert not list((out / "checkpoints").glob("step-*"))


def test_both_nodes_have_saved_when_one_is_taken_away(nodes):
    processes, out, told = nodes
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(60)
    assert (status(out)["state"], status(out)["exit_code"]) == ("stopped", 143)
    assert (out / "checkpoints" / f"step-{status(out)['step']:07d}").is_dir()
    assert "error: stopped by signal 15 after saving step" in told[0].read_text()
    for pid in Path("/proc").glob("[0-9]*"):
        assert str(out) not in _command(pid)


def _command(pid):
    try:
        return (pid / "cmdline").read_text()
    except OSError:
        return ""
