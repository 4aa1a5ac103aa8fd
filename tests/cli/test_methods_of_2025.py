"""Each preset of a newer method: it trains, is resumed bit for bit, samples; bad input is told."""

import json

import pytest
import torch

from cmtool.models import load_model
from cmtool.presets.toml import load_preset
from cmtool.training.log import read_log
from tests.cli.conftest import TINY
from tests.cli.test_method_module import load

FEW = ["--set", "train.batch=4", "--set", "train.decay_to=1.0", "--device", "cpu"]
FEW += ["--set", "run.sample_every=99", "--set", "run.sample_grid=2"]
FROM_TEACHER = ["ect", "ecd", "cmt", "sct", "scd", "adcm"]


def train(cmtool, name, steps, out, *more):
    command = "train" if name == "meanflow" else "distill"
    how = [*TINY, "--set", "model.network.two_time=true"] if name == "meanflow" else []
    steps = ["--set", f"train.steps={steps}"]
    if name == "adcm":
        how = ["--set", "loss.method.lam=2.0"]  # a grid of a few levels
    return cmtool(command, "--preset", f"digits-{name}", *how, *FEW, *steps, "--out", out, *more)


def same(one, other):
    first, second = load(one), load(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("name", [*FROM_TEACHER, "meanflow", "tcm"])
def test_a_run_of_each_method_is_resumed_bit_for_bit_and_samples(cmtool, tmp_path, name):
    more = []
    if name == "tcm":
        assert train(cmtool, "ecd", 2, "first").code == 0
        more = ["--teacher", "first"]
    straight = train(cmtool, name, 3, "straight", *more)
    assert straight.code == 0, straight.err
    assert train(cmtool, name, 2, "half", *more).code == 0
    command = "train" if name == "meanflow" else "distill"
    longer = ["--set", "train.steps=3", "--device", "cpu"]
    resumed = cmtool(command, "--resume", "--out", "half", *longer)
    assert resumed.code == 0, resumed.err
    ends = [tmp_path / run / "checkpoints/step-0000003" for run in ("half", "straight")]
    same(*ends)
    for steps in ("1", "2"):
        drawn = cmtool("sample", "-c", "straight", "--seeds", "0", "--steps", steps, "--out", "-")
        assert drawn.code == 0, drawn.err
        assert drawn.out.startswith(b"\x89PNG")


@pytest.mark.usefixtures("bare_runs")
def test_a_second_stage_keeps_the_first_below_the_transition(cmtool, tmp_path):
    assert train(cmtool, "ecd", 2, "first").code == 0
    assert (
        train(cmtool, "tcm", 2, "second", "--teacher", "first", "--set", "train.lr=1e-2").code == 0
    )
    first, second = load_model(tmp_path / "first").f, load_model(tmp_path / "second").f
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 3])
    sigma = torch.tensor([0.3, 0.999, 1.0], dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = second(x, sigma, labels), first(x, sigma, labels)
    torch.testing.assert_close(ours[:2], theirs[:2])
    assert not torch.allclose(ours[2], theirs[2])


@pytest.mark.usefixtures("bare_runs")
def test_a_student_may_start_from_another_model_than_its_teacher(cmtool, tmp_path):
    assert train(cmtool, "cmt", 2, "cmt", "--set", "train.lr=1e-2").code == 0
    still = ["--set", "train.lr=1e-30"]
    done = train(cmtool, "ecd", 1, "ecd", "--init", "cmt", *still)
    assert done.code == 0, done.err
    for ours, theirs in zip(
        load_model(tmp_path / "ecd", weights="model").f.parameters(),
        load_model(tmp_path / "cmt").f.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("name", ["ecd", "cmt", "sct", "scd", "adcm", "meanflow"])
def test_the_first_loss_in_bf16_is_near_that_in_fp32(cmtool, tmp_path, name):
    first = {}
    for precision in ("fp32", "bf16"):
        every = ["--precision", precision, "--set", "run.log_every=1"]
        done = train(cmtool, name, 1, precision, *every)
        assert done.code == 0, done.err
        assert load_preset(str(tmp_path / precision / "preset.toml")).train.precision == precision
        first[precision] = read_log(tmp_path / precision / "log.jsonl")[0]["loss"]
    near = 0.15 if name == "adcm" else 0.05  # a ratio of two small distances
    assert first["bf16"] == pytest.approx(first["fp32"], rel=near, abs=1e-3)  # ECD's first is 0


@pytest.mark.usefixtures("bare_runs")
def test_the_samples_of_a_teacher_stand_for_images(cmtool, tmp_path):
    drawn = ["--steps", "3", "--seeds", "0-15", "--out", "x.npz"]
    assert cmtool("sample", "-c", "digits-edm", *drawn).code == 0
    done = train(cmtool, "ecd", 1, "student", "--data", "x.npz")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert record["data"]["images"] == 16
    assert load_model(tmp_path / "student").preset.model.num_classes == 10


TOLD = {
    "a second stage without a first": (
        ["distill", "--preset", "digits-tcm", "--teacher", "digits-edm"],
        "second stage",
    ),
    "a second stage by train": (["train", "--preset", "digits-tcm"], "cmtool distill"),
    "a method that needs a teacher, by train": (
        ["train", "--preset", "digits-cmt"],
        "cmtool distill",
    ),
    "paths where images are wanted": (
        ["distill", "--preset", "digits-ecd", "--set", "loss.source=paths"],
        "--set loss.source=images",
    ),
    "images where paths are wanted": (
        ["distill", "--preset", "digits-cmt", "--set", "loss.source=images"],
        "--set loss.source=paths",
    ),
    "an unknown walk": (
        ["distill", "--preset", "digits-cmt", "--set", "loss.source={name='paths', walk='hune'}"],
        "heun",
    ),
    "a two-time student of a one-time method": (
        ["distill", "--preset", "digits-ecd", "--set", "model.network.two_time=true"],
        "kind",
    ),
    "a one-time student of a flow map's method": (
        ["train", "--preset", "digits-meanflow", "--set", "model.network.two_time=false"],
        "kind",
    ),
    "a transition without its method": (
        ["distill", "--preset", "digits-ecd", "--set", "model.transition=1.0"],
        "leave model.transition out",
    ),
    "a method of two networks without a transition": (
        ["distill", "--preset", "digits-ect", "--set", "loss.method=truncated_training"],
        "--set model.transition=1.0",
    ),
    "a bank that no memory holds": (
        ["distill", "--preset", "digits-cmt", "--set", "train.batch=1048576", "--set",
         "loss.source={name='paths', points=1000}"],
        "GiB",
    ),
    "a consistency model as a teacher": (
        ["distill", "--preset", "digits-ecd", "--teacher", "digits-cd"],
        "not a teacher",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_what_cannot_be_is_told_in_two_lines_before_the_first_step(cmtool, tmp_path, what):
    arguments, part = TOLD[what]
    done = cmtool(*arguments, "--device", "cpu", "--out", "out")
    assert done.code in (2, 3, 5), done.err
    told = [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(told) == 2, done.err
    assert part in "\n".join(told)
    assert not (tmp_path / "out" / "checkpoints").exists()
