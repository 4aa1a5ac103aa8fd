"""What a run changes, built from a preset: a module that belongs to the method is part of it."""

from cmtool.core.methods import METHODS, MethodRow
from cmtool.presets.toml import load_preset
from cmtool.training.checkpoint import state_tensors
from cmtool.training.state import build_state
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
