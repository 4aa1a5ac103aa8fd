"""Whether a run compiles, where its preset leaves that open: on a GPU, long enough, and alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from cmtool.presets.toml import load_preset, resolve, to_toml
from cmtool.system.dist import ALONE
from cmtool.training import compiling
from cmtool.training.compiling import seconds_saved, with_compile_decided
from cmtool.training.start import Start

TEACHER = SimpleNamespace(preset=load_preset("imagenet64-edm"))
LONG = {"train.precision": "bf16"}


def decided(name, device="cuda", group=ALONE, **values):
    """What is decided for a preset, and what the user is told."""
    preset, origins = resolve(name, {"--set": LONG | values})
    start = Start(Path("run"), preset, origins, False, False, [""], [])
    end = with_compile_decided(start, TEACHER if preset.kind != "teacher" else None, device, group)
    return end.preset.train.compile, list(end.notes)


def test_a_long_run_on_a_gpu_compiles_and_says_so():
    pays, (note,) = decided("imagenet64-cd-l2")
    assert pays is True
    assert note.startswith("the networks are compiled at the first step")
    assert "--no-compile" in note


@pytest.mark.parametrize(
    ("name", "device", "values"),
    [
        ("imagenet64-cd-l2", "cpu", {}),
        ("imagenet64-cd-l2", "mps", {}),
        ("imagenet64-cd-l2", "cuda", {"train.precision": "fp32"}),
        ("imagenet64-cd-l2", "cuda", {"train.steps": 100}),
        ("imagenet64-cd-l2", "cuda", {"model.network.dropout": 0.1}),  # masks are shared
        ("imagenet64-scd", "cuda", {"model.network.dropout": 0.0}),  # forward mode
        ("digits-ct", "cuda", {}),
    ],
)
def test_others_do_not_and_say_nothing(name, device, values):
    assert decided(name, device, **values) == (False, [])


def test_sharded_models_do_not():
    group = ALONE._replace(mesh=SimpleNamespace())
    assert decided("imagenet64-cd-l2", group=group) == (False, [])


def test_a_teachers_dropout_shares_no_masks():
    assert decided("cifar10-edm", **{"model.network.dropout": 0.13})[0] is True


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["digits-ct", "imagenet64-cd-l2"])
def test_what_the_user_says_stands(name, asked):
    assert decided(name, **{"train.compile": asked}) == (asked, [])


def test_twice_the_steps_save_twice_and_two_processes_half():
    preset = load_preset("cifar10-edm", {"train.steps": 1000})
    twice = load_preset("cifar10-edm", {"train.steps": 2000})
    one = seconds_saved(preset, None, 1)
    assert one > 0
    assert seconds_saved(twice, None, 1) == pytest.approx(2 * one)
    assert seconds_saved(preset, None, 2) == pytest.approx(one / 2)


def test_a_network_whose_arithmetic_nobody_can_count_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "step_flops", lambda *_: None)
    assert decided("imagenet64-cd-l2") == (False, [])


def test_a_run_that_is_resumed_goes_on_as_it_began(tmp_path):
    """What was decided is in the preset of its folder, and is no default there."""
    preset, origins = resolve("imagenet64-cd-l2", {"--set": LONG})
    (tmp_path / "preset.toml").write_text(to_toml(preset, origins))
    assert decided(str(tmp_path / "preset.toml")) == (False, [])
    start = Start(tmp_path, preset, origins, False, False, [""], [])
    began = with_compile_decided(start, TEACHER, "cuda", ALONE)
    (tmp_path / "preset.toml").write_text(to_toml(began.preset, began.origins))
    assert "compile = true # auto" in (tmp_path / "preset.toml").read_text()
    assert decided(str(tmp_path / "preset.toml")) == (True, [])
