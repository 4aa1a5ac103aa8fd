"""What several processes of one run do together, and when one of them fails; exit codes by rank."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.core.data import permutation
from tests.cli.conftest import TINY
from tests.test_torchrun import tensors

pytestmark = pytest.mark.slow

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}


def job(out, *arguments, processes=2, **more):
    arguments = ["train", "--preset", "digits-ct", "--out", str(out), *TINY, *arguments]
    return {"processes": processes, "arguments": arguments, **more}


def run(*jobs):
    """Of each job the exit codes by rank and the seconds from first to last; all their stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes", json.dumps(jobs)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def status(out):
    return json.loads((out / "status.json").read_text())


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def errors(stderr):
    return sorted(line for line in stderr.splitlines() if line.startswith("error: "))


def test_an_exception_in_one_process_ends_the_other_which_names_it(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, seconds),), stderr = run(job(out, *steps, fault=["boom", 1, 7]))
    assert codes == [5, 1]
    assert seconds < 10
    told = "rank 1 failed after step 7: ValueError('boom')"
    assert errors(stderr) == [f"error: rank 0: {told}"]
    assert stderr.count("Traceback") == 1  # a bug, of rank 1 alone
    assert "in rank 1, after step 7" in stderr
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert status(out)["error"] == told
    assert checkpoints(out) == ["latest.json", "step-0000003", "step-0000006"]


def test_a_damaged_image_that_one_process_meets_ends_both_and_is_named_by_both(tmp_path):
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for i in range(64):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i:02}.png")
    damaged = images / f"{int(permutation(64, 0, 0)[5 * 8 + 4]):02}.png"  # rank 1 sees it at step 5
    damaged.write_bytes(damaged.read_bytes()[:60])
    options = ["--data", str(images), "--set", "model.num_classes=0", "--set", "data.workers=0"]
    ((codes, _),), stderr = run(job(out, *options, "--set", "train.steps=100000", stream=True))
    assert codes == [5, 3]
    ours, theirs = errors(stderr)
    assert ours.startswith("error: rank 0: rank 1 failed after step 5: ")
    assert theirs.startswith("error: rank 1: ")
    assert damaged.name in ours
    assert damaged.name in theirs
    assert status(out)["exit_code"] == 5
    assert damaged.name in status(out)["error"]
    assert "Traceback" not in stderr


def test_a_process_that_hangs_is_given_up_after_the_time_that_was_set(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, _),), stderr = run(
        job(out, *steps, "--set", "run.timeout=4", fault=["hangs", 1, 7], patience=1)
    )
    assert codes == [5, -9]
    assert errors(stderr) == [
        "error: rank 0: no contact with another process after step 7: timed out"
    ]
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert checkpoints(out) == ["latest.json", "step-0000003", "step-0000006"]


def test_two_processes_resumed_as_one_end_bit_equal_to_one_that_accumulates(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    steps = ["--set", "train.steps=7", "--set", "run.checkpoint_every=2"]
    ends, stderr = run(
        job(two, *steps, fault=["killed", 1, 5]),
        job(two, *steps, "--resume", processes=1),
        job(one, *steps, "--accumulate", "2", processes=1),
    )
    assert [codes for codes, _ in ends] == [[5, -9], [0], [0]]
    assert "a batch has 2 parts as before, 2 a process" in stderr
    assert f"resumed from {two}/checkpoints/step-0000004" in stderr
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert json.loads((two / "run.json").read_text())["processes"] == 1
    assert "accumulate = 2" in (two / "preset.toml").read_text()
