"""Guidance through the commands, and in what distillation follows."""

import json

import pytest
import torch
from PIL import Image

from cmtool.cli.sample import SampleOptions
from cmtool.core.guidance import guided
from cmtool.core.methods import METHODS, Models
from cmtool.core.objective import Point
from cmtool.core.paths import Drawn
from cmtool.core.rng import step_generator
from cmtool.core.types import NO_CLASS
from cmtool.data.datasets import load_dataset
from cmtool.data.images import from_uint8
from cmtool.errors import UserError
from cmtool.evaluation.held_out import held_out_loss
from cmtool.models import load_model
from cmtool.presets.build import build_curriculum, build_objective, build_source
from cmtool.presets.schema import Choice
from cmtool.presets.toml import load_preset
from cmtool.system.dist import ALONE
from tests.cli.conftest import TINY
from tests.evaluation.test_held_out import network_of, of_method


def with_loss(name, **loss):
    preset = load_preset(name)
    return preset.model_copy(update={"loss": preset.loss.model_copy(update=loss)})


def test_the_paths_of_a_guided_teacher_are_guided():
    teacher = load_model("emoji-edm")
    x0, labels = torch.zeros(2, 3, 32, 32), torch.tensor([6, NO_CLASS])

    unmixed = Choice(name="paths", rho=7.0)

    def drawn(f, weight):
        preset = with_loss("emoji-cmt", guidance=weight, source=unmixed)
        return build_source(preset, lambda *_: (x0, labels), f)(0, 0)

    plain, asked = drawn(teacher.f, 1.0), drawn(teacher.f, 2.5)
    torch.testing.assert_close(asked.x0, drawn(guided(teacher.f, 2.5), 1.0).x0)
    assert (asked.x0[0] - plain.x0[0]).abs().max() > 0.1
    torch.testing.assert_close(asked.x0[1], plain.x0[1], rtol=0, atol=1e-4)


FOLLOWS = [n for n, row in METHODS.items() if row.needs_teacher and "previous" not in row.targets]


@pytest.mark.parametrize("name", FOLLOWS)
def test_steps_and_held_out_loss_follow_the_guided_teacher(name):
    preset = of_method(name)
    preset = preset.model_copy(update={"loss": preset.loss.model_copy(update={"guidance": 2.0})})
    teacher, student, asked = load_model("digits-edm").f, network_of(preset, 0), []

    def asking(x, sigma, labels=None, sigma_to=None):
        asked.append(labels)
        return type(teacher).forward(teacher, x, sigma, labels)

    teacher.forward = asking
    models, data = Models(student, student), load_dataset("digits:held-out")
    x0, labels = from_uint8(data.images[:4]), data.labels[:4]
    draw = build_source(preset, lambda *_: (x0, labels), teacher)
    drawn = Drawn(*draw(0, 0))
    point = () if drawn.noise is None else (Point(drawn.noise, drawn.sigma),)
    stage = build_curriculum(preset)(0, preset.train.steps)
    objective, generator = build_objective(preset, teacher), step_generator(0, 0, 0)
    objective(models, drawn.x0, drawn.labels, stage, generator, *point)
    in_training = len(asked)
    assert in_training
    held_out_loss(preset, data, teacher, 8, "cpu")(models, 0, ALONE, None)
    assert len(asked) > in_training
    for given in asked:
        known, unknown = given.chunk(2)
        assert (unknown == NO_CLASS).all()
        assert (known != NO_CLASS).all()


@pytest.mark.parametrize("name", ["pd", "ct", "edm"])
def test_guidance_without_a_teacher_is_refused(name):
    with pytest.raises(UserError, match=r"loss.guidance = 2 with loss.method"):
        build_objective(with_loss(name, guidance=2.0), lambda x, *_: x)


def test_sample_says_what_it_did_and_eval_draws_the_same(cmtool, tmp_path):
    asked = ["-c", "emoji-edm", "--steps", "3", "--guidance", "2.5"]
    drawn = cmtool("sample", *asked, "--seeds", "0-3", "--out", "some")
    assert drawn.code == 0, drawn.err
    assert "10 network calls each" in drawn.err  # Heun: 5 answers, each of two calls
    first = drawn.out.decode().split()[0]
    with Image.open(tmp_path / first) as image:
        assert image.info["cmtool:guidance"] == "2.5"
    plain = cmtool("sample", *asked[:4], "--seeds", "0-3", "--out", "plain")
    assert (tmp_path / plain.out.decode().split()[0]).read_bytes() != (
        tmp_path / first
    ).read_bytes()
    options = ["--protocol", "pixels", "--reference", "emoji"]
    folder = json.loads(cmtool("eval", "fid", "some", *options).text)
    model = json.loads(cmtool("eval", "fid", *asked, "--num", "4", *options).text)
    assert model["guidance"] == 2.5
    assert model["value"] == pytest.approx(folder["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("digits-edm", "never learned images of no class", "data.label_dropout=0.1"),
        ("digits-cd", "is guided when it is made", "--set loss.guidance=2"),
    ],
)
def test_a_model_that_cannot_be_guided_says_why(cmtool, model, message, hint):
    result = cmtool("sample", "-c", model, "--guidance", "2", "--out", "x.png")
    assert result.code == 2
    assert message in result.err
    assert hint in result.err
    if model == "digits-edm":
        asked = ["distill", "--teacher", model, "--preset", "digits-cd", *TINY, "--out", "r"]
        result = cmtool(*asked, "--set", "loss.guidance=2")
        assert result.code == 2
        assert message in result.err


def test_a_student_of_a_guided_teacher_is_another(cmtool):
    asked = ["distill", "--teacher", "emoji-edm", "--set", "train.steps=2", "--set",
             "train.batch=2", "--set", "run.sample_grid=1"]  # fmt: skip
    values = []
    for weight in ("1", "3"):
        run = cmtool(*asked, "--preset", "emoji-cmt", "--set", f"loss.guidance={weight}",
                     "--out", f"r{weight}")  # fmt: skip
        assert run.code == 0, run.err
        values.append(load_model(f"r{weight}").sha256)
    assert values[0] != values[1]


def test_processes_that_are_told_other_weights_are_told():
    facts = [
        SampleOptions("emoji-edm", "0-1", guidance=weight, device="cpu").drawing([0, 1]).facts()
        for weight in (1.0, 2.0)
    ]
    assert {key for key in facts[0] if facts[0][key] != facts[1][key]} == {"--guidance"}
