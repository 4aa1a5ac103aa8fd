"""Devices without float64, as Apple's: nothing on them asks for it.

The meta device stands in for such a device. It has shapes without numbers, and a mode that sees
each operation refuses float64 there.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmtool import sampling
from cmtool.core import edits, tensors
from cmtool.core.adaptive import Grid
from cmtool.evaluation.features import build_extractor
from cmtool.models import load_model
from cmtool.presets.build import needs_teacher
from cmtool.presets.schema import Choice
from cmtool.presets.toml import load_preset, preset_names
from cmtool.sampling import generate, plan
from cmtool.training.fit import StepInfo
from cmtool.training.log import Meter
from cmtool.training.utilisation import shapes_of_step


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64:
                raise TypeError(f"{function}: the device has no float64")
        return out


@pytest.fixture(autouse=True)
def refusing(monkeypatch):
    monkeypatch.setattr(tensors, "NO_FLOAT64", {"meta"})
    monkeypatch.setattr(sampling, "_finite", lambda x0: x0)  # it reads a number
    with NoFloat64():
        yield


def test_the_stand_in_refuses():
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device="meta").double()


@pytest.mark.parametrize(
    ("name", "steps"), [("digits-cmt", 1), ("digits-cd", 3), ("digits-edm", 4)]
)
def test_sampling(name, steps):
    model = load_model(name, device="meta")
    assert drawn(model, plan(model.preset, steps)).shape == (3, 3, 8, 8)


def drawn(model, chosen):
    labels = torch.tensor([1, 2, 3])
    found = generate(model.f, model.preset, chosen, range(3), labels=labels, device="meta")
    return torch.cat(list(found))


@pytest.mark.parametrize("sampler", ["ancestral", "stochastic_heun", "dpmpp_2m"])
def test_samplers_of_teachers(sampler):
    model = load_model("digits-edm", device="meta")
    chosen = plan(model.preset, 4, sampler=Choice(name=sampler))
    assert drawn(model, chosen).dtype == torch.float32


def test_the_sums_of_a_log_line():
    meter = Meter(load_preset("digits-cd").noise, "meta")
    four = torch.zeros(4, device="meta")
    meter.add(StepInfo(1, four, four, four[0], 0.1, 18, 0.0, False, 0.0))
    assert meter.loss.dtype == torch.float32


def test_features_are_computed_elsewhere():
    assert build_extractor("digits", device="meta").device == "cpu"


def test_a_projection_of_an_edit():
    x0 = torch.zeros(2, 3, 8, 8, device="meta")
    edit = edits.colorize(x0)
    assert edit.project(x0).shape == x0.shape


UNSEEN = {"digits-sct", "digits-scd", "digits-tcm", "digits-adcm", "digits-ct-continuous"}
"""Forward mode has numbers in float64 that are no tensors of the device, TCM and ADCM read theirs:
shapes without numbers cannot stand in for a device there."""
METHODS = sorted({n for n in preset_names() if n.startswith("digits-")} - UNSEEN)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_training(name):
    preset = load_preset(name)
    teacher = load_model("digits-edm", device="meta") if needs_teacher(preset) else None
    step = shapes_of_step(preset, teacher)
    step.loss().sum().backward()
    assert any(p.grad is not None for p in step.student.parameters())


@pytest.mark.parametrize("move", [lambda grid: grid.to("meta"), lambda grid: grid.half()])
def test_the_grid_of_adcm_stays_on_the_cpu_in_float64(move):
    grid = Grid()
    move(grid)
    made = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64)
    found = grid.levels(0, lambda: made)
    assert found.device.type == "cpu"
    assert torch.equal(found, made)
