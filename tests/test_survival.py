"""A run is killed, starved of disk, damaged and told to stop; it loses no finished checkpoint."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import TINY

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out, *more, steps=60):
    return [
        sys.executable, "-m", "cmtool", "train", "--preset", "digits-ct", "--out", str(out),
        "--set", f"train.steps={steps}", "--set", "run.checkpoint_every=1", *TINY, *more,
    ]  # fmt: skip


def run(arguments, **more):
    return subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **more
    )


def tensors(out):
    newest = json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted((out / "checkpoints" / newest).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def lines(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def started(arguments, out, **more):
    """A run that has logged something since it started."""
    before = lines(out)
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        **more,
    )  # fmt: skip
    end = time.monotonic() + 60
    while process.poll() is None and lines(out) in (0, before) and time.monotonic() < end:
        time.sleep(0.01)
    return process


def finish(process, patience=60):
    _, err = process.communicate(timeout=patience)
    return process.returncode, err


def test_a_run_killed_at_twenty_random_moments_ends_bit_equal(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(command(straight, steps=120)).returncode == 0
    moments = random.Random(0)
    kills = 0
    for _ in range(40):
        more = ["--resume"] if (killed / "preset.toml").exists() else []
        process = started(command(killed, *more, steps=120), killed)
        time.sleep(moments.uniform(0, 0.12))
        if process.poll() is None:
            process.kill()
            kills += 1
        code, err = finish(process)
        assert code in (0, -signal.SIGKILL), err
        if code == 0 or kills == 20:
            break
    final = run(command(killed, "--resume", steps=120))
    assert final.returncode == 0, final.stderr
    assert kills >= 10
    a, b = tensors(straight), tensors(killed)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert not list((killed / "checkpoints").glob(".tmp-*"))
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_newer_checkpoint_is_found_though_latest_does_not_name_it(tmp_path):
    assert run(command(tmp_path / "run", steps=4)).returncode == 0
    latest = tmp_path / "run" / "checkpoints" / "latest.json"
    latest.write_text('{"checkpoint": "step-0000003"}')
    again = run(command(tmp_path / "run", "--resume", steps=4))
    assert "resumed from" in again.stderr
    assert "step-0000004" in again.stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    out = tmp_path / "run"
    assert run(command(out, steps=4)).returncode == 0
    folder = out / "checkpoints" / "step-0000004"
    file = folder / "model.safetensors"
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1000])
    named = run([sys.executable, "-m", "cmtool", "checkpoint", "info", str(folder)])
    assert named.returncode == 3
    again = run(command(out, "--resume", steps=4))
    assert again.returncode == 0, again.stderr
    assert "passed over: " in again.stderr
    assert "resumed from" in again.stderr
    assert "step-0000003" in again.stderr


def limited(size):
    """Limit the size of files, as a full disk would, in a process about to start."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_keeps_the_last_checkpoint_says_so_and_ends_with_5(tmp_path):
    out = tmp_path / "run"
    assert run(command(out, steps=2)).returncode == 0
    before = tensors(out)
    (out / "preset.toml").write_text(
        (out / "preset.toml").read_text().replace("steps = 2", "steps = 9", 1)
    )
    size = min(f.stat().st_size for f in (out / "checkpoints" / "step-0000002").glob("*.safet*"))
    again = run(command(out, "--resume", steps=9), preexec_fn=limited(size - 1000))
    assert again.returncode == 5, again.stderr
    assert "no room on the disk for checkpoint step-0000003: going on without it" in again.stderr
    assert "error: no room on the disk" in again.stderr
    assert "Traceback" not in again.stderr
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    for name, tensor in tensors(out).items():
        assert torch.equal(tensor, before[name])
    assert not list((out / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_its_code(tmp_path, number):
    out = tmp_path / "run"
    process = started(command(out, steps=100_000), out)
    process.send_signal(number)
    start = time.monotonic()
    code, err = finish(process, 30)
    assert time.monotonic() - start < 30
    assert code == 128 + number, err
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + number)
    newest = json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    assert newest == f"step-{status['step']:07d}"
    assert "hint: go on with --resume" in err


def test_the_time_is_up_in_good_order(tmp_path):
    out = tmp_path / "run"
    process = started(command(out, "--max-time", "8", steps=100_000), out)
    code, err = finish(process)
    assert code == 75, err
    assert "the time is up" in err
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_is_whole(tmp_path):
    out = tmp_path / "run"
    process = started(command(out, steps=100_000), out)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, _ = finish(process, 20)
    assert code == 130
    again = run(command(out, "--resume", "--max-time", "1", steps=100_000))
    assert again.returncode == 75, again.stderr


def test_one_folder_one_run_and_a_dead_ones_lock_is_free(tmp_path):
    out = tmp_path / "run"
    first = started(command(out, steps=100_000), out)
    second = run(command(out, "--resume", steps=100_000))
    assert second.returncode == 7
    assert str(first.pid) in second.stderr
    first.kill()
    finish(first)
    third = run(command(out, "--resume", "--max-time", "1", steps=100_000))
    assert third.returncode == 75, third.stderr
