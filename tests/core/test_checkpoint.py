import json
import os

import pytest
import torch

from cmtool.core.checkpoint import (
    checkpoints,
    clear_temporary,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
    state_tensors,
    verify,
    write_atomic,
)
from cmtool.core.formats.native import read_about
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import Stage
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label
from cmtool.core.trainer import fit
from cmtool.errors import DivergedError, InputError
from tests.core.test_trainer import data, model, objective, settings, train_state


def trained(steps=3):
    state = train_state(model())
    list(fit(state, objective(), data, lambda k, n: Stage(5, 0.9), settings(steps=steps)))
    return state


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


def test_a_resumed_run_ends_bit_equal(tmp_path):
    straight = trained(20)
    path = save_checkpoint(tmp_path, trained(7), {})
    resumed = train_state(model())
    load_checkpoint(path, resumed)
    list(fit(resumed, objective(), data, lambda k, n: Stage(5, 0.9), settings(steps=20)))
    # 7 steps of a 7-step run and of a 20-step run are the same here: the rate is constant
    same(straight, resumed)


def test_a_damaged_checkpoint_is_found_and_passed_over(tmp_path):
    good = save_checkpoint(tmp_path, trained(2), {})
    bad = save_checkpoint(tmp_path, trained(3), {})
    content = bytearray((bad / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (bad / "model.safetensors").write_bytes(bytes(content))
    newest, complaints = newest_checkpoint(tmp_path)
    assert newest == good
    assert "step-0000003" in complaints[0]
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        verify(bad)


@pytest.mark.parametrize("harm", ["no manifest", "cut", "file missing"])
def test_half_a_checkpoint_does_not_exist(tmp_path, harm):
    path = save_checkpoint(tmp_path, trained(1), {})
    if harm == "no manifest":
        (path / "manifest.json").unlink()
    elif harm == "cut":
        os.truncate(path / "ema.safetensors", 100)
    else:
        (path / "optimizer.safetensors").unlink()
    assert newest_checkpoint(tmp_path)[0] is None


def test_prune_keeps_the_newest_and_temporaries_go(tmp_path):
    for steps in (1, 2, 3, 4):
        save_checkpoint(tmp_path, trained(steps), {})
    (tmp_path / ".tmp-9-123").mkdir()
    prune(tmp_path, 2)
    clear_temporary(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["latest.json", "step-0000003", "step-0000004"]
    assert json.loads((tmp_path / "latest.json").read_text())["checkpoint"] == "step-0000004"


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    state = trained(1)
    with torch.no_grad():
        next(state.student.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite at step 1"):
        save_checkpoint(tmp_path, state, {})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, trained(1), {})
    other = train_state(Preconditioned(
        Mlp(MlpOptions(width=16, depth=3), channels=2),
        consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002,
    ))  # fmt: skip
    with pytest.raises(InputError, match="does not fit this run"):
        load_checkpoint(path, other)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-10000000", "step-9999999", "step-5000x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-9999999", "step-10000000"]


def test_a_special_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            write_atomic(target, b"")
