"""Runs, checkpoints and files of version 0.1 are read, resumed, sampled and converted.

`golden/run_0_1` is a run that version 0.1 made: its checkpoint of step 4, and of step 8 the weights
and the images that it drew. On another processor the last bits may differ.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmtool.models import load_model
from tests.golden import GOLDEN

RUN = GOLDEN / "run_0_1"


@pytest.fixture
def old_run(tmp_path):
    """A copy of the run, stopped after step 4, as a person would find it."""
    out = tmp_path / "run_0_1"
    shutil.copytree(RUN, out)
    for file in out.glob("*-8.*"):
        file.unlink()
    return out


def test_it_goes_on_to_the_same_end(cmtool, old_run):
    preset = (old_run / "preset.toml").read_text()
    assert 'pair = "noise"' in preset
    result = cmtool("train", "--out", old_run, "--resume", "--device", "cpu")
    assert result.code == 0, result.err
    for name in ("model", "ema"):
        ours = load_file(old_run / f"checkpoints/step-0000008/{name}.safetensors")
        theirs = load_file(RUN / f"{name}-8.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-7)
    lines = [json.loads(line) for line in (old_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]


def test_its_weights_draw_the_same_images(cmtool, old_run):
    file = RUN / "ema-8.safetensors"
    result = cmtool("sample", "-c", file, "--seeds", "0-3", "--out", "x.npz", "--device", "cpu")
    assert result.code == 0, result.err
    with np.load("x.npz") as ours, np.load(RUN / "images-8.npz") as theirs:
        gap = ours["arr_0"].astype(int) - theirs["arr_0"].astype(int)
        assert abs(gap).max() <= 1
        assert (ours["arr_1"] == theirs["arr_1"]).all()


def test_its_kind_and_boundary_are_those_it_was_trained_with(old_run):
    model = load_model(old_run)
    assert model.kind == model.preset.kind == "consistency"
    assert model.preset.model.scalings.name == "consistency"
    assert model.preset.loss.method.name == "consistency_training"


def test_it_converts(cmtool, old_run):
    result = cmtool("checkpoint", "convert", old_run, "new.safetensors")
    assert result.code == 0, result.err
    assert load_model("new.safetensors").kind == "consistency"
