"""What a run changes, built from a preset: a module that belongs to the method is part of it."""

import pytest
import torch

from cmtool.core.methods import METHODS, MethodRow
from cmtool.errors import UserError
from cmtool.presets.toml import load_preset
from cmtool.training.checkpoint import state_tensors
from cmtool.training.state import build_state, check_sharded
from tests.core.test_methods import LogVariance, weighed

WEIGHED = MethodRow(weighed, "consistency", owns=LogVariance)


def test_a_methods_module_is_in_optimizer_and_checkpoint(monkeypatch):
    monkeypatch.setitem(METHODS, "weighed", WEIGHED)
    small = {"model.network": {"name": "mlp", "width": 8}, "loss.method": "weighed"}
    state = build_state(load_preset("digits-ct", small), None, "cpu")
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in state.own.parameters()} <= held
    assert state_tensors(state)["method"].keys() == {"line.weight", "line.bias"}
    names = state_tensors(state, fill_optimizer=True)["optimizer"]
    assert "method/line.bias.exp_avg" in names


def test_forward_mode_through_sharded_models_wants_a_newer_pytorch(monkeypatch):
    forward_mode = load_preset("digits-scd")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.1+cpu"))
    check_sharded(load_preset("digits-cd"))
    with pytest.raises(UserError, match=r"scm_distillation fails in PyTorch 2\.13\.1") as caught:
        check_sharded(forward_mode)
    assert "2.14" in caught.value.hint
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.14.0"))
    check_sharded(forward_mode)
