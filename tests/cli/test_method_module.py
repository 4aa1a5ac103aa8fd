"""A run whose method owns a module is resumed with it, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.methods import METHODS
from cmtool.models import load_model
from tests.cli.conftest import TINY
from tests.training.test_state import WEIGHED

pytestmark = pytest.mark.usefixtures("bare_runs")

RUN = ["train", "--preset", "digits-ct", "--set", "loss.method=weighed", "--precision", "fp32"]
RUN += ["--set", "loss.curriculum={name='fixed', n=9}", "--set", "train.decay_to=1.0"]
"""With a fixed grid and rate, so that steps may be added."""


def test_a_run_with_such_a_module_goes_on_where_it_stopped(monkeypatch, cmtool, tmp_path):
    monkeypatch.setitem(METHODS, "weighed", WEIGHED)
    for steps, out in (("3", "half"), ("6", "straight")):
        result = cmtool(*RUN, *TINY, "--set", f"train.steps={steps}", "--out", out)
        assert result.code == 0, result.err
    more = ["--set", "train.steps=6", "--device", "cpu"]
    resumed = cmtool("train", "--resume", "--out", "half", *more)
    assert resumed.code == 0, resumed.err
    ends = [load(tmp_path / run / "checkpoints/step-0000006") for run in ("half", "straight")]
    assert ends[0].keys() == ends[1].keys()
    assert {name.split("/")[0] for name in ends[0]} >= {"method", "model", "optimizer"}
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert load_model(tmp_path / "half").weights == "ema"


def load(folder):
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
