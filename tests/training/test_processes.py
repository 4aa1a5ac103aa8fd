"""What several processes of one run do together, and when one of them fails; exit codes by rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.data.batches import permutation
from cmtool.training.log import read_log
from tests.cli.conftest import TINY
from tests.training.test_torchrun import tensors

pytestmark = pytest.mark.slow

ROOT = str(Path(__file__).parents[2])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}


METHODS = {
    "ct": ["train", "--preset", "digits-ct", *TINY],
    "cd": [
        "distill", "--preset", "digits-cd", "--teacher", "digits-edm", *TINY[:2], *TINY[-4:],
        "--set", "loss.target=ema", "--set", "loss.curriculum.mu=0.9",
    ],
}  # fmt: skip
METHODS["cd, continuous and live"] = [
    *METHODS["cd"][:-4], "--set", "loss.method=live_distillation", "--set", "loss.levels=ramp",
    "--set", "model.network.dropout=0.1",
]  # fmt: skip
METHODS["with a module of its own"] = [*METHODS["ct"], "--set", "loss.method=weighed"]
SHARDED = ["--set", "run.sharding=fsdp"]
AGAIN = ["--set", "train.checkpoint_activations=true"]


def job(out, *arguments, method="ct", processes=2, **more):
    arguments = [*METHODS[method], "--out", str(out), *arguments]
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


def test_when_the_leading_process_is_killed_another_says_so_in_its_place(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, _),), stderr = run(job(out, *steps, fault=["killed", 0, 7]))
    assert codes == [-9, 5]
    (told,) = errors(stderr)
    assert told.startswith("error: rank 1: no contact with another process after step 7: ")
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert status(out)["error"] in told
    assert status(out)["step"] == 6


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
    assert "the batch is split into 2 parts as before, 2 for each process" in stderr
    assert f"resumed from {two}/checkpoints/step-0000004" in stderr
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert json.loads((two / "run.json").read_text())["processes"] == 1
    assert "accumulate = 2" in (two / "preset.toml").read_text()


def distances(one, two):
    """How far each file of two checkpoints is apart, relative to its norm; moments by kind."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    sums = {}
    for name in a:
        file, *_, last = name.split(".")
        kind = f"{file}.{last}" if file == "optimizer" else file
        apart, size = sums.get(kind, (0.0, 0.0))
        x, y = a[name].double(), b[name].double()
        sums[kind] = apart + float((x - y).square().sum()), size + float(x.square().sum())
    return {kind: (apart / size) ** 0.5 for kind, (apart, size) in sums.items()}


@pytest.mark.parametrize("method", METHODS)
def test_sharded_models_are_trained_sampled_and_saved_as_replicated_ones(method, tmp_path):
    two, sharded = tmp_path / "two", tmp_path / "sharded"
    more = ["--set", "train.steps=7", "--precision", "fp32"]
    more += ["--set", "train.max_grad_norm=0.001"] if method == "cd" else []  # else sums show
    more += ["--set", "run.eval_every=4", "--set", "run.eval_num=40", "--accumulate", "2"]
    ours = [*more, *SHARDED, *(AGAIN if method == "ct" else [])]
    ends, stderr = run(job(two, *more, method=method), job(sharded, *ours, method=method))
    assert [codes for codes, _ in ends] == [[0, 0], [0, 0]], stderr
    apart = distances(two, sharded)
    assert {"model", "ema", "optimizer.exp_avg_sq"} <= apart.keys()
    for kind, distance in apart.items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind
    a, b = ([line.get("eval") for line in read_log(out / "log.jsonl")] for out in (two, sharded))
    for ours, theirs in zip(a, b, strict=True):
        assert ours == (theirs and {**theirs, "value": pytest.approx(theirs["value"], rel=1e-4)})
    pictures = [sorted(p.name for p in (o / "samples").iterdir()) for o in (two, sharded)]
    assert pictures[0] == pictures[1] == ["step-0000007.png"]


def test_a_sharded_run_that_is_killed_goes_on_as_one_process(tmp_path):
    sharded, one = tmp_path / "sharded", tmp_path / "one"
    more = ["--set", "train.steps=7", "--set", "run.checkpoint_every=2", "--precision", "fp32"]
    ends, stderr = run(
        job(sharded, *more, *SHARDED, fault=["killed", 1, 5]),
        job(sharded, *more, "--resume", processes=1),  # its preset shards still: over one process
        job(one, *more, "--accumulate", "2", processes=1),
    )
    assert [codes for codes, _ in ends] == [[5, -9], [0], [0]], stderr
    assert f"resumed from {sharded}/checkpoints/step-0000004" in stderr
    for kind, distance in distances(one, sharded).items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind


def test_one_process_goes_on_sharded_over_two(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--set", "run.checkpoint_every=2", "--precision", "fp32"]
    steps = ["--set", "train.steps=7", "--accumulate", "2"]
    ends, stderr = run(
        job(two, *more, *steps, processes=1, fault=["killed", 0, 5]),
        job(two, *more, *SHARDED, "--resume"),
        job(one, *more, *steps, processes=1),
    )
    assert [codes for codes, _ in ends] == [[-9], [0, 0], [0]], stderr
    for kind, distance in distances(one, two).items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind


def test_a_disk_slower_than_the_timeout_ends_no_sharded_run(tmp_path):
    out = tmp_path / "run"
    more = ["--set", "train.steps=3", "--set", "run.checkpoint_every=2", "--set", "run.timeout=4"]
    ((codes, _),), stderr = run(job(out, *more, *SHARDED, fault=["slow disk", 0, 1]))
    assert codes == [0, 0], stderr
    assert checkpoints(out) == ["latest.json", "step-0000002", "step-0000003"]
