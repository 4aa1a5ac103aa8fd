import pytest
import torch
from torch.amp import GradScaler

from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import Stage
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label
from cmtool.errors import DivergedError, InputError
from cmtool.formats.checkpoints import point_to
from cmtool.formats.native import read_about
from cmtool.training.checkpoint import (
    load_checkpoint,
    state_tensors,
    take_snapshot,
    write_checkpoint,
)
from cmtool.training.fit import fit
from tests.training.test_fit import data, model, objective, settings, train_state


def trained(steps=3):
    state = train_state(model())
    list(fit(state, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings(steps=steps)))
    return state


def save_checkpoint(folder, state, about):
    final = write_checkpoint(folder, take_snapshot(state), about)
    point_to(folder, final)
    return final


def same(a, b):
    files_a, files_b = state_tensors(a), state_tensors(b)
    assert files_a.keys() == files_b.keys()
    for name, tensors in files_a.items():
        assert tensors.keys() == files_b[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, files_b[name][key]), (name, key)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = trained()
    path = save_checkpoint(tmp_path, state, {"kind": "consistency"})
    fresh = train_state(model())
    load_checkpoint(path, fresh)
    assert fresh.step == 3
    same(state, fresh)
    assert read_about(path / "ema.safetensors")["weights"] == "ema"
    assert {f.name for f in path.iterdir()} == {
        "model.safetensors", "target.safetensors", "ema.safetensors", "optimizer.safetensors",
        "state.json", "manifest.json",
    }  # fmt: skip


def test_a_run_in_fp16_goes_on_bit_equal_with_its_scale(tmp_path):
    def start():
        state = train_state(model())
        state.scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        return state

    def go_on(state, steps):
        heavy = objective(lambda hi, lo: torch.full_like(hi, 100.0))
        half = settings(steps=steps, precision="fp16")
        return [
            info.skipped for info in fit(state, heavy, data, lambda k, n: Stage(n=5, mu=0.9), half)
        ]

    straight, stopped, resumed = start(), start(), start()
    skipped = go_on(straight, 30)
    assert any(skipped[:18])
    assert not all(skipped[:18])
    assert any(skipped[18:])
    go_on(stopped, 18)
    load_checkpoint(save_checkpoint(tmp_path, stopped, {}), resumed)
    assert go_on(resumed, 30) == skipped[18:]
    same(straight, resumed)
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


def test_the_layout_of_weights_does_not_show_in_a_checkpoint(tmp_path):
    state, other = trained(), train_state(model())
    before = save_checkpoint(tmp_path / "a", state, {})
    state.student.to(memory_format=torch.channels_last)
    after = save_checkpoint(tmp_path / "b", state, {})
    assert (after / "manifest.json").read_text() == (before / "manifest.json").read_text()
    other.student.to(memory_format=torch.channels_last)
    load_checkpoint(after, other)
    same(state, other)


def test_a_resumed_run_ends_bit_equal(tmp_path):
    straight = trained(20)
    path = save_checkpoint(tmp_path, trained(7), {})
    resumed = train_state(model())
    load_checkpoint(path, resumed)
    list(fit(resumed, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings(steps=20)))
    # 7 steps of a 7-step run and of a 20-step run are the same here: the rate is constant
    same(straight, resumed)


@pytest.mark.parametrize("part", ["student", "target", "ema"])
def test_numbers_that_are_not_finite_are_never_saved(tmp_path, part):
    state = trained(1)
    models = {"student": state.student, "target": state.target, "ema": state.emas["ema"].model}
    with torch.no_grad():
        next(models[part].parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite at step 1"):
        save_checkpoint(tmp_path, state, {})
    assert list(tmp_path.iterdir()) == []


def test_a_state_without_moments_comes_back(tmp_path):
    """As between two stages of progressive distillation, where the optimizer starts anew."""
    state = trained(2)
    state.optimizer.state.clear()
    path = save_checkpoint(tmp_path, state, {})
    other = trained(3)
    load_checkpoint(path, other)
    same(state, other)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, trained(1), {})
    other = train_state(Preconditioned(
        Mlp(MlpOptions(width=16, depth=3), channels=2),
        consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002,
    ))  # fmt: skip
    with pytest.raises(InputError, match="does not fit this run"):
        load_checkpoint(path, other)
