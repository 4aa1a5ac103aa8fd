"""What a run changes, built from a preset: a module that belongs to the method is part of it."""

import pytest
import torch

from cmtool.core.methods import METHODS, MethodRow
from cmtool.data.batches import batches
from cmtool.data.datasets import load_dataset
from cmtool.errors import UserError
from cmtool.presets.toml import load_preset
from cmtool.training.checkpoint import state_tensors
from cmtool.training.state import (
    build_state,
    check_sharded,
    frozen_for_steps,
    rounded_beforehand,
    training_images,
)
from tests.core.test_methods import LogVariance, weighed
from tests.networks import network

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


def test_a_run_sees_images_as_its_preset_says():
    data = load_dataset("digits")
    said = {"flip": True, "label_dropout": 0.3, "balanced": True}
    overrides = {f"data.{key}": value for key, value in said.items()}
    preset = load_preset("digits-ct", {**overrides, "train.batch": 8, "train.seed": 5})

    def drawn(images):
        return [tensor for step in range(3) for tensor in images(step, 0)]

    ours = drawn(training_images(preset, data, "cpu"))
    batch = {"batch": 8, "shards": 1, "seed": 5, "device": "cpu"}
    assert all(map(torch.equal, ours, drawn(batches(data, **batch, **said))))
    for key, value in said.items():  # each of them counts
        others = drawn(batches(data, **batch, **{**said, key: type(value)()}))
        assert not all(map(torch.equal, ours, others)), key
    split = preset.model_copy(update={"train": preset.train.model_copy(update={"accumulate": 2})})
    half, whole = training_images(split, data, "cpu"), training_images(split, data, "cpu", 16)
    assert (len(half(0, 1)[0]), len(whole(0, 0)[0])) == (4, 16)


def test_forward_mode_through_sharded_models_wants_a_newer_pytorch(monkeypatch):
    forward_mode = load_preset("digits-scd")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.1+cpu"))
    check_sharded(load_preset("digits-cd"))
    with pytest.raises(UserError, match=r"scm_distillation fails in PyTorch 2\.13\.1") as caught:
        check_sharded(forward_mode)
    assert "2.14" in caught.value.hint
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.14.0"))
    check_sharded(forward_mode)


@pytest.mark.parametrize(
    ("device", "precision", "copied"),
    [("cpu", "bf16", False), ("cuda", "fp32", False), ("cuda:1", "bf16", True)],
)
def test_a_teacher_is_rounded_beforehand_on_a_gpu_in_half_precision(device, precision, copied):
    preset = load_preset("digits-cd", {"train.precision": precision})
    f = network("song")
    assert (frozen_for_steps(f, preset, device) is not f) == copied


def test_what_is_rounded_beforehand_answers_as_the_model_with_autocast_and_without():
    f = network("adm").eval()
    called = rounded_beforehand(f, torch.bfloat16, "cpu")
    g = torch.Generator().manual_seed(0)
    given = (torch.randn(2, 3, 8, 8, generator=g), torch.tensor([0.5, 4.0]), torch.tensor([1, 3]))
    with torch.no_grad():
        assert torch.equal(called(*given), f(*given))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = f(*given)
            assert torch.equal(called(*given), rounded)
            next(f.network.input_blocks[0].parameters()).zero_()  # it holds a copy
            assert torch.equal(called(*given), rounded)
