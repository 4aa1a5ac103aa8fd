"""Two processes and two accumulation rounds are the same run; and what happens when one is gone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmtool.training.log import read_log
from tests.cli.conftest import TINY

pytestmark = pytest.mark.slow

EDM2 = (
    "model.network={name='edm2', model_channels=16, channel_mult=[1,2], num_blocks=1,"
    " attention_levels=[1], head_channels=16, dropout=0.1}"
)
METHODS = {
    "ct": ["train", "--preset", "digits-ct", *TINY],
    "cd": ["distill", "--preset", "digits-cd", "--teacher", "digits-edm", "--device", "cpu",
           "--set", "train.batch=8", "--set", "run.log_every=2"],
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(method, out, *more, torchrun=False, restarts=0):
    launcher = [sys.executable, "-m"]
    if torchrun:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += ["--max-restarts", str(restarts), "-m"]
    return [*launcher, "cmtool", *METHODS[method], "--out", str(out), *more]


def run(arguments, **more):
    return subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **more
    )


def tensors(out):
    newest = json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    folder = out / "checkpoints" / newest
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_alike(one, two):
    """The tensors of two runs of steps of eight images are equal, and so is what they logged."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for mine, theirs in zip(*(read_log(out / "log.jsonl") for out in (one, two)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        for band, loss in mine["loss_by_sigma"].items():
            assert loss is None or loss == pytest.approx(theirs["loss_by_sigma"][band], rel=1e-6)
        assert mine["images_by_sigma"] == theirs["images_by_sigma"]
        assert sum(mine["images_by_sigma"].values()) == 16  # two steps of eight


def test_two_processes_are_bit_equal_to_two_rounds(tmp_path):
    """Other methods: test_processes.py."""
    steps = ["--set", "train.steps=4", "--set", "run.sample_every=4", "--eval-every", "4",
             "--set", "run.eval_num=9"]  # fmt: skip  # an odd number: the shares differ
    two = run(command("cd", tmp_path / "two", *steps, torchrun=True))
    assert two.returncode == 0, two.stderr
    assert two.stdout == f"{tmp_path / 'two' / 'checkpoints' / 'step-0000004'}\n"
    one = run(command("cd", tmp_path / "one", *steps, "--accumulate", "2"))
    assert one.returncode == 0, one.stderr
    assert_alike(tmp_path / "one", tmp_path / "two")
    one, two = (read_log(tmp_path / name / "log.jsonl")[-1] for name in ("one", "two"))
    assert one["eval"]["value"] == pytest.approx(two["eval"]["value"], rel=1e-4)


BROKEN = """
import torch
from cmtool.training import state
from cmtool.cli import main

real = state.batches

def batches(*args, **kwargs):
    fetch = real(*args, **kwargs)

    def microbatch(step, shard):
        x0, labels = fetch(step, shard)
        if shard == 1 and step in (1, 3, 4):
            x0[2] = torch.nan
        return x0, labels

    return microbatch

state.batches = batches
main()
"""


def test_what_is_not_finite_in_one_process_is_skipped_and_ends_in_all(tmp_path):
    out, script = tmp_path / "run", tmp_path / "broken.py"
    script.write_text(BROKEN)
    arguments = command("ct", out, "--set", "train.max_bad_steps=2", torchrun=True)
    place = arguments.index("cmtool")
    result = run([*arguments[: place - 1], str(script), *arguments[place + 1 :]])
    assert result.returncode == 1
    words = "the loss of image 2 of shard 1 at sigma "
    assert result.stderr.count(f"step 2 skipped: {words}") == 1
    ends = f"error: not finite 2 steps in a row, to step 5: {words}"
    assert result.stderr.count(ends) == 1
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    failed = out / "failed" / "step-0000005"
    for folder, shard, bad in ((failed, 0, 0), (failed / "rank-1", 1, 1)):
        assert json.loads((folder / "fault.json").read_text())["keys"] == [[0, 4, shard]]
        assert int(load_file(folder / "batch.safetensors")["loss"].isnan().sum()) == bad


def wait_for(path, text, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not get {text!r}")


def workers(out):
    """The process ids of the run's two workers, the leading one first."""
    leading = json.loads((out / "status.json").read_text())["pid"]
    parent = Path(f"/proc/{leading}/stat").read_text().rsplit(")", 1)[1].split()[1]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [leading, *(int(child) for child in children if int(child) != leading)]


@contextlib.contextmanager
def running(tmp_path, *more, restarts=0):
    """A run of two processes that goes on for ever, in its own session; killed at the end."""
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", *more]
    arguments = command("ct", out, *steps, torchrun=True, restarts=restarts)
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, stderr=stderr, stdout=stderr, start_new_session=True
        )
        try:
            wait_for(out / "log.jsonl", '"step": 4')
            yield out, process, tmp_path / "stderr"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def endless(tmp_path):
    with running(tmp_path) as run:
        yield run


def test_a_killed_process_ends_the_other_which_says_so_and_resume_goes_on(endless):
    out, process, stderr = endless
    os.kill(workers(out)[1], signal.SIGKILL)
    start = time.monotonic()
    assert process.wait(60) == 1  # torchrun's only failure code
    assert time.monotonic() - start < 60
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert "no contact with another process" in status["error"]
    assert "error: rank 0: no contact" in stderr.read_text()
    steps = status["step"] + 2
    again = run(command("ct", out, "--resume", "--max-time", "8", torchrun=True))
    assert again.returncode == 0
    assert "Traceback" not in again.stderr
    assert "the time is up" in again.stderr
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert steps > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_at_one_step_and_status_tells_the_truth(endless, number):
    out, process, stderr = endless
    os.killpg(process.pid, number)  # as Ctrl-C on a terminal does
    assert process.wait(60) == 1
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + number)
    newest = json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    assert newest == f"step-{status['step']:07d}"
    assert stderr.read_text().count(f"error: stopped by signal {number}") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])  # it dies of either
def test_workers_whose_torchrun_is_gone_save_and_leave(endless, number):
    out, process, _ = endless
    pids = workers(out)
    process.send_signal(number)
    assert process.wait(60) == -number
    step = json.loads((out / "status.json").read_text())["step"]
    wait_for(out / "status.json", '"stopped"')
    status = json.loads((out / "status.json").read_text())
    assert status["exit_code"] == 143
    assert (out / "checkpoints" / f"step-{status['step']:07d}").is_dir()
    assert status["step"] <= step + 2 * 2  # within one log interval of what the log had reached
    for pid in pids:
        for _ in range(100):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{pid}")


def test_workers_that_torchrun_starts_anew_go_on_by_themselves(tmp_path):
    more = ["--set", "run.checkpoint_every=2"]
    with running(tmp_path, *more, restarts=3) as (out, process, stderr):
        os.kill(workers(out)[1], signal.SIGKILL)
        wait_for(stderr, "resumed from")
        step = read_log(out / "log.jsonl")[-1]["step"]
        wait_for(out / "log.jsonl", f'"step": {step + 4},')
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        status = json.loads((out / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("stopped", 143)
        steps = [line["step"] for line in read_log(out / "log.jsonl")]
        assert steps == list(range(2, steps[-1] + 1, 2))
        assert stderr.read_text().count("resumed from") == 1


def test_a_mistake_is_told_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = run(command("ct", tmp_path / "run", torchrun=True))
    assert result.returncode == 1
    assert result.stderr.count("is not empty and not a run") == 1
    assert result.stdout == ""
