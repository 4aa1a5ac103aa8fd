"""`--resume auto`: one identical command starts a run, goes on with it, and ends with its end."""

import pytest
import torch
from safetensors.torch import load_file

from cmtool.cli import with_auto_resume

TINY = ["train", "--preset", "digits-ct", "--set", "train.steps=12", "--set", "train.batch=4",
        "--set", "run.checkpoint_every=4", "--set", "run.sample_every=12",
        "--device", "cpu"]  # fmt: skip


def weights_of(run):
    (path,) = (run / "checkpoints").glob("*012/ema.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--resume", "auto", "-n"], ["train", "--auto-resume", "-n"]),
        (["train", "--resume=auto"], ["train", "--auto-resume"]),
        (["train", "--out", "auto", "--resume"], ["train", "--out", "auto", "--resume"]),
        (["auto"], ["auto"]),
        ([], []),
    ],
)
def test_auto_is_a_value_of_resume_alone(words, meant):
    assert with_auto_resume(words) == meant


@pytest.mark.usefixtures("bare_runs")
def test_one_command_starts_goes_on_and_ends_bit_equal(cmtool, tmp_path):
    straight = cmtool(*TINY, "--out", "straight")
    assert straight.code == 0, straight.err
    again = [*TINY, "--out", "run", "--resume", "auto"]
    codes = []
    for _ in range(12):
        stopped = cmtool(*again, "--max-time", "0")
        codes.append(stopped.code)
        if stopped.code == 0:
            break
    assert set(codes[:-1]) == {75}
    assert codes[-1] == 0
    ended = cmtool(*again)
    assert ended.code == 0, ended.err
    assert "checkpoints" in ended.text
    left, right = weights_of(tmp_path / "straight"), weights_of(tmp_path / "run")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_it_wants_a_folder_and_no_overwriting(cmtool):
    assert "name it with --out" in cmtool(*TINY, "--resume", "auto").err
    both = cmtool(*TINY, "--out", "run", "--resume", "auto", "--overwrite")
    assert both.code == 2
    assert "give one of them" in both.err


def test_a_model_to_start_from_is_used_once(cmtool):
    given = [*TINY, "--init", "digits-cd", "--set", "train.steps=2", "--out", "run"]
    first = cmtool(*given, "--resume", "auto")
    assert first.code == 0, first.err
    assert cmtool(*given, "--resume", "auto").code == 0
    assert cmtool(*given, "--resume").code == 2
