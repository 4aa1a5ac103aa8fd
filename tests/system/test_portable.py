"""cmtool on a system without what Windows lacks: a stand-in, made by taking it away from Python."""

import json
import os
import subprocess
import sys

import pytest

STAND_IN = """
import os, signal, sys
import matplotlib.figure, numpy, torch, torch.distributed, torch.utils.data, torch._dynamo
import PIL.Image, filelock, rich.progress, typer, pydantic, torch.utils.flop_counter
filelock.FileLock = filelock.SoftFileLock  # its own of Windows is not here
for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty"):
    sys.modules[name] = None
for name in ("pread", "pwrite", "fork", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY",
             "getuid", "geteuid", "setsid", "killpg", "getpgid", "uname", "mkfifo"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGCHLD", "SIGPIPE"):
    delattr(signal, name)
from cmtool.cli import main
main(sys.argv[1:])
"""


def elsewhere(folder, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    said = subprocess.run(
        [sys.executable, "-c", STAND_IN, *words], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    return said


@pytest.mark.slow
def test_a_run_samples_and_edits_without_what_windows_lacks(tmp_path):
    more = ["--set", "train.steps=2", "--set", "train.batch=4", "--device", "cpu"]
    elsewhere(tmp_path, "sample", "--seeds", "0-3", "--out", "four.npz")
    elsewhere(tmp_path, "sample", "--seeds", "0-1", "--out", "two")
    digit = "two/seed000000.png"
    elsewhere(tmp_path, "edit", "inpaint", digit, "--box", "0,0,4,8", "--out", "mended.png")
    elsewhere(tmp_path, "data", "prepare", "two", "two.zip")
    elsewhere(tmp_path, "data", "info", "two.zip")
    elsewhere(tmp_path, "distill", "--preset", "digits-cd", *more, "--out", "run")
    elsewhere(tmp_path, "distill", "--out", "run", "--resume", "auto", "--device", "cpu")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    said = elsewhere(tmp_path, "eval", "fid", "-c", "run", "--num", "20", "--device", "cpu")
    assert json.loads(said.stdout)["num_images"] == 20
