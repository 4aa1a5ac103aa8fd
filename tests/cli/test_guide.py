"""cmtool checkpoint guide: one teacher of two, which samples, is evaluated and is distilled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmtool.core.rng import SeededNoise
from cmtool.data.decoding import read_image
from cmtool.formats.native import read_about, write_weights
from cmtool.models import ASSETS, load_model

MAIN = "digits-edm"
OUT = ["--out", "x.safetensors"]


@pytest.fixture
def weaker(tmp_path):
    """A weaker digits teacher: the bundled one with a tenth of each weight gone."""
    path = tmp_path / "weaker.safetensors"
    bundled = ASSETS / f"{MAIN}.safetensors"
    tensors = {name: 0.9 * tensor for name, tensor in load_file(bundled).items()}
    write_weights(path, tensors, read_about(bundled))
    return path


@pytest.fixture
def guided(cmtool, weaker):
    result = cmtool("checkpoint", "guide", MAIN, weaker, "--weight", "3", "--out", "g.safetensors")
    assert (result.code, result.text) == (0, "g.safetensors\n"), result.err
    return "g.safetensors"


def test_the_file_answers_as_the_two_do_by_the_equation(cmtool, guided, weaker):
    made, main, weak = (load_model(str(name)).f for name in (guided, MAIN, weaker))
    x, labels = SeededNoise(range(4))(torch.empty(4, 3, 8, 8)), torch.arange(4)
    for level in (0.02, 1.0, 70.0):
        sigma = torch.full((4,), level, dtype=torch.float64)
        strong, other = (f(level * x, sigma, labels) for f in (main, weak))
        wanted = other + 3 * (strong - other)
        torch.testing.assert_close(made(level * x, sigma, labels), wanted, rtol=1e-4, atol=1e-4)
    facts = json.loads(cmtool("checkpoint", "info", guided, "--json").text)
    assert facts["guidance"] == {"weight": 3.0, "hears_class": True}
    said = read_about(Path(guided))["made"]
    assert said["from"] == MAIN
    assert said["guide"]["sha256"] == load_model(str(weaker)).sha256


def test_it_samples_and_says_what_it_is_made_of(cmtool, guided, weaker):
    for name in (MAIN, guided):
        drawn = ["sample", "-c", name, "--seeds", "0", "--steps", "3", "--out", f"{name}.png"]
        assert cmtool(*drawn).code == 0
    plain, other = (read_image(Path(f"{name}.png")) for name in (MAIN, guided))
    assert plain.shape == other.shape
    assert not torch.equal(plain, other)
    facts = json.loads(cmtool("checkpoint", "guide", MAIN, weaker, *OUT, "--json").text)
    assert (facts["weight"], facts["hears_class"]) == (2.0, True)
    assert facts["guide"]["sha256"] == load_model(str(weaker)).sha256


def test_its_student_is_one_network_and_starts_from_the_guided_one(cmtool, guided):
    result = cmtool(
        "distill", "--teacher", guided, "--preset", "digits-cmt", "--out", "student",
        "--set", "train.steps=1", "--set", "train.lr=1e-12", "--set", "train.batch=4",
        "--set", "loss.source.points=4", "--set", "loss.source.mixed=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    student, main = (load_model(name) for name in ("student", MAIN))
    assert student.preset.model.guidance is None
    theirs = main.f.network.state_dict()
    for name, tensor in student.f.network.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_a_model_starts_from_the_guided_network_of_two(cmtool, guided):
    result = cmtool(
        "train", "--preset", MAIN, "--init", guided, "--set", "train.steps=1", "--out", "on",
        "--set", "train.batch=4",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "new, not from" not in result.err


@pytest.mark.parametrize(
    ("arguments", "said", "remedy"),
    [
        (["digits-cd", MAIN], "digits-cd is a consistency model", "guide its teacher"),
        ([MAIN, "digits-cmt"], "digits-cmt is a consistency model", "guide its teacher"),
        ([MAIN, "emoji-edm"], "emoji-edm has model.", "an earlier checkpoint of the teacher"),
        (["g.safetensors", MAIN], "is guided already", "the model it was made of"),
        ([MAIN, MAIN, "--no-class"], "never learned images of no class", "or leave --no-class out"),
        ([MAIN, MAIN, "--out", "x.pt"], "x.pt is no .safetensors file", "a name that ends so"),
        ([MAIN, MAIN, "--out", "g.safetensors"], "g.safetensors exists", "--overwrite"),
    ],
)
def test_what_does_not_go_together_is_refused(cmtool, guided, arguments, said, remedy):
    out = [] if "--out" in arguments else OUT
    result = cmtool("checkpoint", "guide", *arguments, *out)
    assert result.code in (2, 3), result.err
    assert said in result.err
    assert remedy in result.err


def test_two_networks_are_not_trained(cmtool):
    result = cmtool("train", "--preset", MAIN, "--set", "model.guidance=2.0", "--out", "t")
    assert result.code == 2
    assert "leave model.guidance out" in result.err
