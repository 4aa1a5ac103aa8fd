import json

import pytest

from cmtool.training import bench as benches
from tests.cli.conftest import TINY

KEYS = {
    "preset", "device", "device_name", "data", "teacher", "precision", "compile", "batch",
    "accumulate", "steps", "timed_steps", "timed_images", "images_per_second", "step_seconds",
    "first_step_seconds", "phases", "flops", "mfu", "memory", "largest_microbatch",
    "largest_is_tried", "hours", "price", "cost",
}  # fmt: skip
FEW = [word for word in TINY if word not in ("run.log_every=2",)]
FEW.pop(FEW.index("--device") - 1)  # the --set of it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benches, "SECONDS", 0.1)
    monkeypatch.setattr(benches, "ideal_seconds", lambda *_: 0.001)


def test_json_has_every_figure_and_they_agree(cmtool, tmp_path):
    result = cmtool("bench", "--preset", "digits-cd", "--price", "2.5", "--json", *FEW)
    assert result.code == 0
    facts = json.loads(result.text)
    assert set(facts) == KEYS
    assert facts["data"] == "digits:train"
    assert facts["teacher"] == "random"
    assert "note: no --teacher" in result.err
    images = facts["steps"] * facts["batch"]
    assert facts["hours"] == pytest.approx(images / facts["images_per_second"] / 3600, rel=1e-4)
    assert facts["cost"] == pytest.approx(2.5 * facts["hours"], rel=1e-4)
    assert sum(facts["phases"].values()) == pytest.approx(facts["step_seconds"], rel=1e-4)
    assert facts["phases"]["data"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_two_columns(cmtool):
    result = cmtool("bench", "--preset", "digits-edm", "--steps", "2", *FEW)
    assert result.code == 0
    rows = dict(line.split("\t") for line in result.text.splitlines())
    assert rows["preset"] == "digits-edm"
    assert rows["timed"] == "2 steps, 8 images at once"
    assert float(rows["images a second"].replace(",", "")) > 0
    assert "cost" not in rows


def test_a_data_set_that_is_not_there_is_replaced_by_random_images(cmtool):
    gone = ["--set", "data.path=nowhere/at/all"]
    result = cmtool("bench", "--preset", "digits-edm", "--steps", "1", "--json", *gone, *FEW)
    assert result.code == 0
    assert "note: no data set 'nowhere/at/all' here, so random images stand in" in result.err
    assert json.loads(result.text)["data"] == "random"


def test_a_trained_teacher_may_be_given(cmtool):
    result = cmtool(
        "bench", "--preset", "digits-cd", "--teacher", "digits-edm", "--steps", "1", "--json",
        "--set", "train.batch=8", "--device", "cpu",
    )  # fmt: skip
    assert json.loads(result.text)["teacher"] == "digits-edm"


def test_a_methods_preset_is_fitted_to_the_images(cmtool, tmp_path, monkeypatch):
    from cmtool.training import planning

    monkeypatch.setattr(planning, "seconds_a_step", lambda *_: 2.0)
    result = cmtool("bench", "--preset", "ect", "--data", "digits", "--steps", "1", "--json", *FEW)
    assert result.code == 0
    assert json.loads(result.text)["steps"] == 1800


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        (("--preset", "digits-cdd"), 2, "digits-cdd", "did you mean"),
        (("--preset", "digits-edm", "--data", "nowhere"), 3, "no data set", "choose from"),
        (("--preset", "digits-edm", "--teacher", "digits-edm"), 2, "takes no teacher", "leave"),
        (("--preset", "digits-cd", "--teacher", "nobody"), 3, "nobody", "digits-edm"),
        (("--preset", "ect"), 2, "names no images", "--data DIR"),
        (("--preset", "digits-edm", "--price", "nan"), 2, "--price", ""),
        (("--preset", "digits-edm", "--steps", "0"), 2, "--steps", "--help"),
        (("--preset", "digits-edm", "--set", "train.lr=x"), 2, "train.lr", ""),
        (("--preset", "digits-edm", "--device", "cuda:77"), 2, "cuda:77", "auto, cpu"),
        (("--preset", "emoji-edm", "--data", "digits"), 3, "8x8", "image_size"),
    ],
)
def test_mistakes_are_told_in_two_lines(cmtool, words, code, error, hint):
    result = cmtool("bench", *words)
    assert (result.code, result.out) == (code, b"")
    first, second = result.err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second


def test_several_processes_are_refused(cmtool, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cmtool("bench", "--preset", "digits-edm")
    assert result.code == 2
    assert "several processes" in result.err


def test_the_batch_of_other_tools_is_a_key_of_the_preset(cmtool):
    result = cmtool("bench", "--batch", "32")
    assert result.err.splitlines()[1] == "hint: cmtool bench --set train.batch=32"
