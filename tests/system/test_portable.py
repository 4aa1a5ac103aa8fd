"""cmtool on a system without what Windows lacks: a stand-in, made by taking it away from Python."""

import json
import os
import subprocess
import sys

import pytest

STAND_IN = """
import json, os, signal, sys
import matplotlib.figure, numpy, torch, torch.distributed, torch.utils.data, torch._dynamo
import PIL.Image, filelock, rich.progress, typer, pydantic, torch.utils.flop_counter
fork, wait = os.fork, os.waitpid
words = None
for job in json.loads(sys.argv[1]):  # a process each
    pid = fork()
    if not pid:
        words = job
        break
    code = os.waitstatus_to_exitcode(wait(pid, 0)[1])
    if code:
        sys.exit(f"{job} ended with {code}")
if words is None:
    sys.exit()
filelock.FileLock = filelock.SoftFileLock  # its own of Windows is not here
for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty"):
    sys.modules[name] = None
for name in ("pread", "pwrite", "fork", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY",
             "getuid", "geteuid", "setsid", "killpg", "getpgid", "uname", "mkfifo"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGCHLD", "SIGPIPE"):
    delattr(signal, name)
from cmtool.cli import main
main(words)
"""


def elsewhere(folder, *commands):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    said = subprocess.run(
        [sys.executable, "-c", STAND_IN, json.dumps(commands)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    return said


@pytest.mark.slow
def test_a_run_samples_and_edits_without_what_windows_lacks(tmp_path):
    more = ["--set", "train.steps=2", "--set", "train.batch=4", "--device", "cpu"]
    said = elsewhere(
        tmp_path,
        ["sample", "--seeds", "0-3", "--out", "four.npz"],
        ["sample", "--seeds", "0-1", "--out", "two"],
        ["edit", "inpaint", "two/seed000000.png", "--box", "0,0,4,8", "--out", "mended.png"],
        ["data", "prepare", "two", "two.zip"],
        ["data", "info", "two.zip"],
        ["distill", "--preset", "digits-cd", *more, "--out", "run"],
        ["distill", "--out", "run", "--resume", "auto", "--device", "cpu"],
        ["eval", "fid", "-c", "run", "--num", "20", "--json", "--device", "cpu"],
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert json.loads(said.stdout.splitlines()[-1])["num_images"] == 20
