"""Loading: what it costs, and that a model is what its file says."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

from cmtool import models
from cmtool.core.noise import karras_sigmas
from cmtool.core.precond import consistency_scalings, edm_scalings, vp_label
from cmtool.errors import InputError, Stopped, UserError
from cmtool.formats.native import read_weights, write_weights
from cmtool.models import ASSETS, load_model
from cmtool.presets.build import build_curriculum, build_denoiser, build_network, build_objective
from cmtool.presets.toml import load_preset
from cmtool.sampling import plan
from cmtool.system.dist import Group
from cmtool.training.checkpoint import state_tensors
from cmtool.training.fit import fit
from cmtool.training.state import build_state, fit_settings
from tests.golden import golden

LOAD = """
import json, resource, sys
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

from cmtool.models import load_model
load_model("digits-cd")
before = resident()
model = load_model(sys.argv[1])
loaded = resident()
status = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
for p in model.f.parameters():
    assert not p.any()
mapped = any(str(sys.argv[1]) in line for line in open("/proc/self/maps"))
print(json.dumps({"loaded": loaded - before, "peak": peak - before,
                  "used": resident() - before, "mapped": mapped}))
"""


@pytest.mark.slow
def test_a_checkpoint_of_300_million_parameters_is_mapped_not_copied(tmp_path):
    preset = load_preset("imagenet64-edm")
    with torch.device("meta"):
        network = build_network(preset.model)
    tensors = {name: torch.zeros(t.shape) for name, t in network.state_dict().items()}
    path = tmp_path / "big.safetensors"
    about = {"kind": "teacher", "weights": "ema", "preset": preset.model_dump(mode="json")}
    write_weights(path, tensors, about)
    size = path.stat().st_size
    assert size > 4 * 295_899_267
    del tensors
    out = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, check=True)
    told = json.loads(out.stdout)
    assert told["mapped"]
    assert told["loaded"] < 0.1 * size
    assert told["peak"] < 1.3 * size
    assert told["used"] < 1.3 * size


def test_a_teacher_has_plain_scalings_and_is_in_eval_mode():
    teacher, student = load_model("digits-edm"), load_model("digits-cd")
    assert teacher.f.scalings is edm_scalings
    assert student.f.scalings is consistency_scalings
    assert not teacher.f.training
    assert not any(p.requires_grad for p in teacher.f.parameters())
    assert teacher.weights == "ema"


@pytest.mark.parametrize(
    ("kind", "other"), [("teacher", "digits-cd"), ("consistency", "digits-edm")]
)
def test_kind_overrides_the_file_and_changes_scalings_and_sampler(kind, other):
    model = load_model(other, kind=kind)
    assert model.kind == model.preset.kind == kind
    assert (model.f.scalings is edm_scalings) == (kind == "teacher")


def test_a_preset_for_a_file_that_has_its_own_is_refused():
    with pytest.raises(UserError, match="--preset digits-ct for digits-cd"):
        load_model("digits-cd", preset="digits-ct")


def test_foreign_scalings_and_labels_are_built_from_a_preset():
    preset = load_preset(
        "digits-edm", {"model.scalings": "vp", "model.noise_label": {"name": "vp", "beta_d": 10.0}}
    )
    f = build_denoiser(preset, build_network(preset.model))
    sigma = torch.tensor([1.0])
    assert f.scalings(sigma, 0.5, 0.0).c_out == -1
    assert f.noise_label(sigma) != vp_label(sigma)


def test_a_stop_while_loading_is_a_stop(monkeypatch):
    def stop(*_):
        raise Stopped("stopped by signal 15", "", 15)

    for name in ("build_network", "build_denoiser"):
        monkeypatch.setattr(models, name, stop)
        with pytest.raises(Stopped) as caught:
            load_model("digits-cd")
        assert caught.value.exit_code == 143
        monkeypatch.undo()


def test_a_file_that_is_another_network_than_it_says_is_refused(tmp_path):
    preset = load_preset("digits-edm")
    tensors = read_weights(ASSETS / "digits-edm.safetensors")
    tensors["out.2.bias"] = torch.zeros(4)
    about = {"kind": "teacher", "weights": "ema", "preset": preset.model_dump(mode="json")}
    write_weights(tmp_path / "x.safetensors", tensors, about)
    with pytest.raises(InputError, match="is not the network it names"):
        load_model(tmp_path / "x.safetensors")


def test_levels_of_a_model_from_elsewhere_lie_on_the_published_grid(tmp_path):
    model = load_model(golden("diffusers_cm", tmp_path))
    grid = karras_sigmas(40).flip(0)
    assert plan(model.preset, steps=2).sigmas == pytest.approx([80.0, float(grid[20])])


@pytest.mark.parametrize(
    ("method", "overrides", "message", "hint"),
    [
        ("consistency_destillation", {}, "loss.method = 'consistency_dest", "consistency_dist"),
        ("denoising", {}, "kind = 'consistency' with loss.method = 'denoising'", "kind='teacher'"),
        ("consistency_distillation", {"loss.target": "live"}, "target = 'live'", "student or ema"),
        ("continuous_training", {"loss.target": "ema"}, "loss.target = 'ema'", "target=student"),
        ("continuous_distillation", {"loss.distance": "l1"}, "'l1' has no curvature", "live"),
        ("live_distillation", {"train.checkpoint_activations": True}, "forwards", "--accumulate"),
        ("consistency_training", {"loss.method.c": 1}, "has no option 'c'", "leave it out"),
        ("consistency_training", {"loss.target": "previous"}, "'previous'", "student or ema"),
    ],
)
def test_a_choice_that_a_method_does_not_take_is_refused(method, overrides, message, hint):
    choices = {"loss.method": {"name": method}, **overrides}
    preset = load_preset("digits-cd", {k: v for k, v in choices.items() if v != "live"})
    if overrides.get("loss.target") == "live":  # a word of version 0.1, which presets translate
        preset = preset.model_copy(
            update={"loss": preset.loss.model_copy(update={"target": "live"})}
        )
    with pytest.raises(UserError, match=message) as caught:
        build_objective(preset, lambda x, *_: x)
    assert hint in caught.value.hint


def test_a_method_that_distills_wants_a_teacher():
    with pytest.raises(UserError, match="distills a teacher") as caught:
        build_objective(load_preset("digits-cd"), None)
    assert "cmtool distill" in caught.value.hint


@pytest.mark.parametrize("two_time", [True, False])
def test_kind_and_network_agree_on_the_number_of_noise_levels(two_time):
    kind = "consistency" if two_time else "flow map"
    preset = load_preset(
        "digits-ct", {"model.network": {"name": "mlp", "two_time": two_time}, "kind": kind}
    )
    with pytest.raises(UserError, match=f"kind = '{kind}' must take") as caught:
        build_denoiser(preset, build_network(preset.model))
    assert f"two_time = {str(not two_time).lower()}" in caught.value.hint


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile calls a C++ compiler")
def test_a_compiled_network_is_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(**changes):
        preset = load_preset("digits-ct", {
            "model.network": {"name": "mlp", "width": 8, "depth": 1}, "model.channels": 2,
            "model.num_classes": 0, "train.precision": "fp32", **changes,
        })  # fmt: skip
        state = build_state(preset, None, "cpu")
        x0 = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        curriculum = build_curriculum(preset)
        steps = fit(
            state, build_objective(preset, None), lambda *_: (x0, None), curriculum,
            dataclasses.replace(fit_settings(preset), steps=3),
        )  # fmt: skip
        return [info.loss for info in steps], state_tensors(state)

    (losses, eager), (compiled_losses, compiled) = run(), run(**{"train.compile": True})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # student and target
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-8)
    assert {f: t.keys() for f, t in compiled.items()} == {f: t.keys() for f, t in eager.items()}


def test_models_are_not_both_sharded_and_compiled():
    preset = load_preset("digits-ct", {"train.compile": True})
    group = Group(world_size=2, mesh=object())
    with pytest.raises(UserError, match=r"train.compile with run.sharding"):
        build_state(preset, None, "cpu", group)
