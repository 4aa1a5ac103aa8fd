"""ONNX files draw what cmtool draws, any number of images at once."""

import json

import pytest
import torch

from cmtool import export
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.samplers import clipped, multistep
from cmtool.errors import InputError
from cmtool.export import export_onnx
from cmtool.models import Model, load_model
from cmtool.presets.build import build_denoiser, build_network
from cmtool.presets.toml import load_preset
from cmtool.sampling import plan, sample

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def small():
    """The bundled student with a smaller network: the exporter takes a while for each layer."""
    model = load_model("digits-cd")
    options = AdmOptions(model_channels=16, channel_mult=(1,), num_res_blocks=1,
                         attention_levels=(0,), head_channels=16, norm_groups=4)  # fmt: skip
    torch.manual_seed(0)
    network = Adm(options, 3, 10).requires_grad_(False)
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    model.f.network = network.to(memory_format=torch.channels_last).eval()
    return model


def drawn(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(images)


def test_the_file_draws_what_we_draw_for_any_batch(small, tmp_path):
    path, sigmas = tmp_path / "small.onnx", (80.0, 1.143)
    assert export_onnx(small, plan(small.preset, sigmas=sigmas), path) <= 1e-4
    seeds = range(7)
    ours = sample(small, seeds, sigmas=sigmas)
    from cmtool.core.rng import SeededNoise, seeded_labels

    draw = SeededNoise(seeds)
    noise = torch.stack([draw(torch.empty(7, 3, 8, 8)) for _ in sigmas])
    theirs = drawn(path, noise=noise, labels=seeded_labels(seeds, 10))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(facts["sigmas"]) == list(sigmas)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


TINY = {
    "model.network.model_channels": 16, "model.network.channel_mult": [1],
    "model.network.attention_levels": [0], "model.network.num_res_blocks": 1,
    "model.network.head_channels": 16, "model.network.norm_groups": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("digits-tcm", {"model.num_classes": 0}),
        pytest.param("digits-meanflow", {}, marks=pytest.mark.slow),
    ],
)
def test_models_without_classes_of_two_networks_and_flow_maps_leave_too(name, more, tmp_path):
    preset = load_preset(name, TINY | more)
    torch.manual_seed(0)
    f = build_denoiser(preset, build_network(preset.model)).eval().requires_grad_(False)
    for p in f.parameters():
        p.add_(0.05 * torch.randn_like(p))
    model = Model(f, preset, preset.kind, name, "", "")
    path, sigmas = tmp_path / "x.onnx", (80.0, 0.6)  # one above digits-tcm's transition, one below
    assert export_onnx(model, plan(preset, sigmas=sigmas), path) <= 1e-5
    noise = torch.randn(2, 5, 3, 8, 8)
    labels = {} if preset.model.num_classes == 0 else {"labels": torch.arange(5)}
    draws = iter(noise)
    ours = multistep(
        clipped(f), torch.zeros(5, 3, 8, 8), sigmas, lambda _: next(draws), sigma_min=0.002,
        labels=labels.get("labels"),
    )  # fmt: skip
    torch.testing.assert_close(drawn(path, noise=noise, **labels), ours, atol=1e-5, rtol=0)


def test_a_file_that_draws_otherwise_is_not_left_behind(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_error", lambda *_: 0.5)
    monkeypatch.setattr(export, "_write", lambda *args: args[-1].write_bytes(b"x"))
    with pytest.raises(InputError, match="from ours"):
        export_onnx(small, plan(small.preset), tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_refused(tmp_path):
    with pytest.raises(InputError, match="distill it first"):
        export_onnx(load_model("digits-edm"), None, tmp_path / "x.onnx")
