"""What is not finite, what does not fit into memory, and in which precision a run goes on."""

import json
import os
import resource
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cmtool.data.decoding import read_image
from cmtool.system.devices import best_precision
from cmtool.system.dist import ALONE
from cmtool.training import state
from cmtool.training.fit import Diverged
from cmtool.training.stop import with_dump
from tests.cli.conftest import TINY


@pytest.fixture
def broken_at(monkeypatch):
    """Make the data of some steps hold one image of NaN."""
    real = state.batches

    def make(steps):
        def batches(*args, **kwargs):
            fetch = real(*args, **kwargs)

            def microbatch(step, shard):
                x0, labels = fetch(step, shard)
                if step in steps:
                    x0[3] = torch.nan
                return x0, labels

            return microbatch

        monkeypatch.setattr(state, "batches", batches)

    return make


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("bare_runs")
def test_a_bad_step_is_skipped_counted_and_told(cmtool, tmp_path, broken_at):
    arguments = ["train", "--preset", "digits-ct", *TINY, "--set", "run.checkpoint_every=1",
                 "--set", "run.keep=9", "--precision", "fp32"]  # fmt: skip
    broken_at({2})
    result = cmtool(*arguments, "--set", "train.steps=4", "--out", "r")
    assert result.code == 0, result.err
    assert "step 3 skipped: the loss of image 3 of shard 0 at sigma " in result.err
    assert [line["skipped"] for line in log(tmp_path / "r")] == [0, 1]
    before, after = (tmp_path / f"r/checkpoints/step-000000{n}" for n in (2, 3))
    for file in ("model", "target", "ema", "optimizer"):
        tensors = load_file(before / f"{file}.safetensors")
        for name, tensor in load_file(after / f"{file}.safetensors").items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.usefixtures("bare_runs")
def test_a_run_that_stays_bad_ends_with_6_and_shows_the_batch(cmtool, tmp_path, broken_at):
    arguments = ["train", "--preset", "digits-edm", *TINY, "--set", "run.checkpoint_every=2",
                 "--set", "train.max_bad_steps=3", "--set", "train.seed=5"]  # fmt: skip
    broken_at(range(4, 99))
    result = cmtool(*arguments, "--set", "train.steps=40", "--out", "r", "--accumulate", "2")
    assert result.code == 6
    assert result.out == b""
    assert result.err.count("skipped: ") == 3
    assert "error: not finite 3 steps in a row, to step 7: the loss of image 3 of" in result.err
    assert "the batch of this step is in r/failed/step-0000007" in result.err
    assert "Traceback" not in result.err
    checkpoints = sorted((tmp_path / "r/checkpoints").glob("step-*"))
    assert [p.name for p in checkpoints] == ["step-0000004", "step-0000006"]
    assert log(tmp_path / "r")[-1]["step"] == 7
    assert sum(line["skipped"] for line in log(tmp_path / "r")) == 3
    status = json.loads((tmp_path / "r/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)

    failed = tmp_path / "r/failed/step-0000007"
    batch = load_file(failed / "batch.safetensors")
    assert batch["x0"].shape == (8, 3, 8, 8)
    assert torch.isnan(batch["loss"]).nonzero().flatten().tolist() == [3, 7]
    assert (batch["labels"].dtype, batch["sigma"].shape) == (torch.int64, (8,))
    assert json.loads((failed / "fault.json").read_text())["keys"] == [[5, 6, 0], [5, 6, 1]]
    assert read_image(failed / "images.png").shape[0] == 3

    broken_at(())
    again = cmtool("train", "--out", "r", "--resume", "--max-time", "0")
    assert again.code == 75, again.err
    assert "resumed from r/checkpoints/step-0000006" in again.err
    over = cmtool(*arguments, "--set", "train.steps=1", "--out", "r", "--overwrite")
    assert over.code == 0, over.err
    assert not (tmp_path / "r/failed").exists()


def test_a_run_that_diverged_says_so_though_the_batch_cannot_be_written(tmp_path):
    (tmp_path / "failed").write_text("in the way")
    error = Diverged("not finite", "lower the rate", SimpleNamespace(step=7), None)
    run = SimpleNamespace(out=tmp_path, preset=None, group=ALONE)
    assert with_dump(error, run) is error
    assert error.exit_code == 6
    assert error.hint.startswith("lower the rate; the batch of this step cannot be written: ")


def test_a_rate_that_is_far_too_high_ends_with_6_and_finite_checkpoints(cmtool, tmp_path):
    result = cmtool(
        "train", "--preset", "digits-edm", *TINY, "--set", "train.steps=300", "--out", "r",
        "--set", "train.lr=1e6", "--set", "train.warmup_steps=0", "--set", "run.checkpoint_every=5",
    )  # fmt: skip
    assert result.code == 6, result.err
    assert "Traceback" not in result.err
    for file in (tmp_path / "r/checkpoints").glob("step-*/*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values())


@pytest.mark.slow
def test_a_batch_that_does_not_fit_ends_with_5_and_proposes_to_split_it(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [
        sys.executable, "-m", "cmtool", "train", "--preset", "digits-ct", "--device", "cpu",
        "--out", str(tmp_path / "r"), "--set", "train.batch=30000", "--precision", "fp32",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=200
    )
    assert result.returncode == 5, result.stderr
    assert "error: out of memory after step 0, with 30000 images at a time" in result.stderr
    assert "hint: split the batch: --accumulate 2" in result.stderr
    assert "Traceback" not in result.stderr
    status = json.loads((tmp_path / "r/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)


@pytest.mark.usefixtures("bare_runs")
def test_a_run_goes_on_in_the_precision_it_started_in(cmtool, tmp_path):
    def precision():
        stored = tomllib.loads((tmp_path / "r/preset.toml").read_text())["train"]["precision"]
        assert json.loads((tmp_path / "r/run.json").read_text())["precision"] == stored
        return stored

    arguments = ["train", *TINY, "--set", "train.steps=2", "--out", "r"]
    assert cmtool(*arguments, "--precision", "auto").code == 0
    assert precision() == best_precision("cpu")
    assert cmtool(*arguments, "--precision", "fp16", "--overwrite").code == 0
    assert precision() == "fp16"
    again = cmtool("train", *TINY, "--out", "r", "--resume", "--set", "train.steps=2")
    assert again.code == 0, again.err
    assert precision() == "fp16"
    other = cmtool("train", *TINY, "--out", "r", "--resume", "--precision", "fp32")
    assert other.code == 2
    assert "'fp16'" in other.err
