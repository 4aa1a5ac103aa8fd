"""A small EDM2 trains, samples and goes on bit for bit; averages are made when a run is done."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.networks.edm2 import MPLayer
from cmtool.models import load_model
from tests.training.test_torchrun import EDM2

pytestmark = pytest.mark.usefixtures("bare_runs")

RUN = [
    "train", "--preset", "digits-edm", "--device", "cpu", "--precision", "fp32", "--set", EDM2,
    "--set", "train.batch=8", "--set", "train.decay_to=1.0", "--set", "train.warmup_steps=0",
    "--set", "run.sample_grid=4", "--set", "run.sample_every=1000",
]  # fmt: skip
AVERAGES = "train.ema=[{name='ema', sigma_rel=0.05}, {name='long', sigma_rel=0.1}]"
SMALL = [
    "train", "--preset", "digits-edm", "--device", "cpu", "--precision", "fp32",
    "--set", "model.network={name='mlp', width=8}", "--set", "train.batch=4",
    "--set", "train.warmup_steps=0", "--set", "run.sample_grid=4",
]  # fmt: skip


@pytest.mark.parametrize("method", ["denoising", "uncertain_denoising"])
def test_a_small_edm2_trains_samples_and_goes_on_bit_for_bit(cmtool, tmp_path, method):
    run = [*RUN, "--set", f"loss.method={method}"]
    for steps, out in (("3", "half"), ("8", "straight")):
        result = cmtool(*run, "--set", f"train.steps={steps}", "--out", out)
        assert result.code == 0, result.err
    resumed = cmtool(
        "train", "--resume", "--out", "half", "--set", "train.steps=8", "--device", "cpu"
    )
    assert resumed.code == 0, resumed.err
    ends = [tensors(tmp_path / out / "checkpoints/step-0000008") for out in ("half", "straight")]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    sampled = cmtool("sample", "-c", "straight", "--seeds", "0-1", "--steps", "2", "--out", "o")
    assert sampled.code == 0, sampled.err


def test_weights_are_normalised_at_the_end_of_a_step(cmtool, tmp_path):
    large = ["--set", "train.lr=0.1", "--set", "train.optimizer=adam", "--set", "train.steps=2"]
    result = cmtool(*RUN, *large, "--out", "run")
    assert result.code == 0, result.err
    network = load_model(tmp_path / "run", weights="model").f.network
    layers = [part for part in network.modules() if isinstance(part, MPLayer)]
    assert len(layers) > 20
    for layer in layers:
        size = layer.weight.flatten(1).square().mean(1)
        torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=0)


def tensors(folder):
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def run(cmtool, tmp_path):
    """A run of 40 steps that stored its averages every 4 steps, and kept a third one."""
    third = AVERAGES.replace("[{", "[{name='kept', sigma_rel=0.075}, {")
    result = cmtool(
        *SMALL,
        "--set",
        third,
        "--set",
        "train.steps=40",
        "--set",
        "run.ema_every=4",
        "--out",
        "run",
    )
    assert result.code == 0, result.err
    for file in (tmp_path / "run/averages").glob("*/kept.safetensors"):
        file.unlink()
    return tmp_path / "run"


def test_an_average_of_another_width_is_near_to_one_that_was_kept(cmtool, run, tmp_path):
    made = cmtool("checkpoint", "average", "run", "--sigma-rel", "0.075", "--out", "w.safetensors")
    assert made.code == 0, made.err
    assert made.out.decode() == "w.safetensors\n"
    assert "made of 20 stored averages, the last of step 40" in made.err
    found = load_file(tmp_path / "w.safetensors")
    kept, wide = (
        load_file(run / f"checkpoints/step-0000040/ema-{name}.safetensors")
        for name in ("kept", "long")
    )
    apart = sum((found[k] - kept[k]).square().sum() for k in kept).sqrt()
    scale = sum((wide[k] - kept[k]).square().sum() for k in kept).sqrt()
    assert apart < 0.3 * scale  # of 40 steps: their profiles are no powers quite
    model = load_model(tmp_path / "w.safetensors")
    assert (model.kind, model.weights) == ("teacher", "ema")


def test_a_stored_average_comes_back_as_it_is(cmtool, run, tmp_path):
    made = cmtool(
        "checkpoint", "average", "run", "--sigma-rel", "0.1", "--step", "20",
        "--out", "w.safetensors", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    facts = json.loads(made.out)
    assert facts == {"path": "w.safetensors", "sigma_rel": 0.1, "step": 20, "made_of": 10}
    found = load_file(tmp_path / "w.safetensors")
    stored = load_file(run / "averages/step-0000020/long.safetensors")
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_averaged(cmtool, run):
    line = ["checkpoint", "average", "run", "--sigma-rel", "0.1", "--out"]
    other = cmtool(*line, "w.safetensors", "--step", "21")
    assert (other.code, "--step 20" in other.err) == (2, True)
    early = cmtool(*line, "w.safetensors", "--step", "1")
    assert (early.code, "the first is --step 4" in early.err) == (2, True)
    pickle = cmtool(*line, "w.pkl")
    assert (pickle.code, "give --out a name that ends so" in pickle.err) == (2, True)
    again = cmtool(*SMALL, "--set", "train.steps=2", "--out", "run", "--overwrite")
    assert again.code == 0, again.err
    none = cmtool(*line, "w.safetensors")
    assert (none.code, "run.ema_every" in none.err) == (3, True)
