"""Whole runs on the pretended card: checkpoints, evaluation, resuming, and two processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from cmtool.training import run as runs
from tests.gpu.pretend.card import counting

pytestmark = pytest.mark.pretend_gpu

SHORT = [
    "--device", "cuda", "--set", "train.batch=8", "--set", "run.log_every=2",
    "--set", "run.sample_every=4", "--set", "run.sample_grid=4", "--set", "run.checkpoint_every=2",
    "--set", "train.steps=4",
    "--set", "run.eval_every=4", "--set", "run.eval_num=16",
]  # fmt: skip
RUNS = {
    "edm": ["train", "--preset", "digits-edm"],
    "cd": ["distill", "--preset", "digits-cd", "--teacher", "digits-edm"],
    "ct": ["train", "--preset", "digits-ct"],
}
SHARDING = {"DDP": "none", "FSDP2": "fsdp"}


def newest(out):
    found = json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    return out / "checkpoints" / found


def state(out):
    return json.loads((out / "status.json").read_text())["state"]


def resumed(cmtool, words, out):
    """Train four steps, lose the last two, and resume; return what the second command said."""
    first = cmtool(*words, *SHORT, "--out", out)
    assert first.code == 0, first.err
    shutil.rmtree(newest(out))
    return cmtool(*words, *SHORT, "--out", out, "--resume")


@pytest.mark.parametrize(("run", "precision"), [("edm", "fp32"), ("ct", "bf16"), ("cd", "fp16")])
def test_a_run_goes_on_from_a_checkpoint(run, precision, tmp_path, cmtool, bare_runs):
    out = tmp_path / "run"
    again = resumed(cmtool, [*RUNS[run], "--set", f"train.precision={precision}"], out)
    assert again.code == 0, again.err
    assert newest(out).name == "step-0000004"
    assert state(out) == "done"


def test_a_run_ends_with_its_report(tmp_path, cmtool):
    result = cmtool(*RUNS["ct"], *SHORT, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_scale_of_fp16_is_on_the_card_after_a_resumption(
    tmp_path, cmtool, bare_runs, monkeypatch
):  # fmt: skip
    seen = []
    fit = runs.fit

    def watched(state, *given):
        for info in fit(state, *given):
            seen.append(state.scaler._scale.device.type)
            yield info

    monkeypatch.setattr(runs, "fit", watched)
    words = [*RUNS["ct"], "--set", "train.precision=fp16"]
    assert resumed(cmtool, words, tmp_path / "run").code == 0
    assert seen == ["cuda"] * 6


def test_steps_of_a_run_wait_once_each_between_its_lines(tmp_path, cmtool, bare_runs, monkeypatch):
    """What a run does beside its steps, it does every N steps."""
    waits = []
    fit = runs.fit

    def watched(*given):
        steps = fit(*given)
        while True:
            with counting() as counted:
                info = next(steps, None)
                if info is None:
                    return
                yield info  # and what the run does after the step
            waits.append(counted)

    monkeypatch.setattr(runs, "fit", watched)
    quiet = ["--set", "run.log_every=8", "--set", "run.checkpoint_every=8"]
    quiet += ["--set", "run.sample_every=8", "--set", "run.eval_every=8", "--set", "train.steps=8"]
    result = cmtool(*RUNS["cd"], *SHORT, *quiet, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    for counted in waits[2:-1]:
        assert len(counted.waits) == 1, counted


def test_a_run_without_page_locked_memory_is_saved_all_the_same(
    tmp_path, cmtool, bare_runs, monkeypatch
):
    monkeypatch.setenv("PRETEND_PINNED_BYTES", str(1 << 16))
    result = cmtool(*RUNS["ct"], *SHORT, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert newest(tmp_path / "run").name == "step-0000004"


@pytest.mark.parametrize(("sharding", "precision"), [("DDP", "bf16"), ("FSDP2", "fp16")])
def test_two_processes_train_evaluate_and_save(sharding, precision, tmp_path):
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = ["cmtool", *RUNS["cd"], *SHORT, "--set", f"train.precision={precision}"]
    words += ["--set", f"run.sharding={SHARDING[sharding]}", "--set", "train.max_grad_norm=1.0"]
    words += ["--out", str(out)]
    result = subprocess.run(
        [sys.executable, *launcher, *words], env={**os.environ, "PRETEND_GPUS": "2"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert state(out) == "done"
    assert load_file(newest(out) / "model.safetensors")
