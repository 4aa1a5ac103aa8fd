"""cmtool compare: a table and a picture of methods; it goes on where it was stopped."""

import json
import shutil
import signal
from contextlib import suppress

import pytest

from cmtool.cli import main
from cmtool.data.decoding import read_image
from cmtool.errors import DivergedError
from cmtool.models import load_model
from cmtool.training import compare, fair
from cmtool.training import run as runs
from cmtool.training.comparison import STEPS, Comparison
from cmtool.training.stop import Stop
from tests.cli.conftest import TINY
from tests.cli.conftest import hasten as hasten_runs

SETTINGS = [
    "--set", "train.steps=4", "--set", "run.sample_grid=1", "--num", "16", "--device", "cpu"
]  # fmt: skip
TIMES = {"seconds", "cpu_seconds"}


def hasten(patch):
    """Let runs do what the test needs: two points, few images, no report, no look at the memory."""
    hasten_runs(patch)
    patch.setattr(compare, "POINTS", 2)
    patch.setattr(compare, "SHOWN", 3)
    patch.setattr(fair, "parts_of_batch", lambda *_: 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An EDM teacher of two steps, sampled in two."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    short = ["--set", "train.steps=2", "--set", "sample.steps=2"]
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        hasten(patch)
        main(["train", "--preset", "digits-edm", "--out", str(out), *short, *TINY])
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hasten(monkeypatch)
    monkeypatch.setattr(compare, "write_methods", lambda *_: None)


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """The folder of a comparison of two methods that was never stopped."""
    out = tmp_path_factory.mktemp("straight") / "out"
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        with pytest.raises(SystemExit) as end:
            main(command(teacher, out))
    assert not end.value.code
    return out


def command(teacher, out, *more, presets=("digits-cd", "digits-ict")):
    return ["compare", *presets, "--teacher", str(teacher), "--out", str(out), *SETTINGS, *more]


def content(out):
    return json.loads((out / "compare.json").read_text())


def untimed(value):
    """JSON without the times, which are never the same."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in TIMES}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def test_the_folder_has_runs_numbers_and_a_picture(straight):
    found = content(straight)
    comparison = Comparison.model_validate(found)
    assert [run.folder for run in comparison.runs] == ["digits-cd", "digits-ict"]
    for run in comparison.runs:
        assert run.state == "done"
        assert [point.step for point in run.points] == [1, 4]
        assert [point.images for point in run.points] == [8, 32]
        assert all({*point.values} == {str(n) for n in STEPS} for point in run.points)
        assert 0 < run.points[0].seconds < run.points[1].seconds
        assert 0 < run.points[0].cpu_seconds < run.points[1].cpu_seconds
        assert load_model(straight / run.folder).kind == "consistency"
    assert comparison.metric == "fd-digits"
    assert comparison.teacher.calls == 3
    first, second = found["table"]
    assert {first["name"], second["name"]} == {"digits-cd", "digits-ict"}
    assert first["values"]["1"] < second["values"]["1"]
    for row in found["table"]:
        assert row["ratio"] == row["values"]["1"] / comparison.teacher.value
    picture = read_image(straight / "compare.png")
    assert picture.shape[0] == 3
    assert picture.float().std() > 10


def test_it_measures_as_eval_does(cmtool, straight):
    for run in content(straight)["runs"]:
        for steps, value in run["points"][-1]["values"].items():
            arguments = ["-c", straight / run["folder"], "--num", "16", "--steps", steps]
            result = cmtool("eval", "fid", *arguments, "--device", "cpu")
            assert json.loads(result.text)["value"] == pytest.approx(value, rel=1e-6)


def test_finished_runs_are_skipped_and_the_table_is_printed(cmtool, straight, teacher, monkeypatch):
    monkeypatch.setattr(runs, "train", None)  # whoever calls it fails
    before = content(straight)
    result = cmtool(*command(teacher, straight))
    assert result.code == 0, result.err
    assert content(straight) == before
    head, *rows = [line.split("\t") for line in result.text.splitlines()]
    assert head[:4] == ["method", "steps", "images", "seconds"]
    assert [row[0] for row in rows[:2]] == [row["name"] for row in before["table"]]
    assert rows[2][0] == "teacher, 3 calls"
    assert [row[1:3] for row in rows[:2]] == [["4", "32"]] * 2
    assert all(len(row) == len(head) for row in rows)
    told = json.loads(cmtool(*command(teacher, straight), "--json").text)
    assert told == before


OTHERS = {
    "--max-time": ["--max-time", "7"], "--seeds": ["--seeds", "1"], "--num": ["--num", "17"],
    "--protocol": ["--protocol", "pixels"], "--set": ["--set", "train.lr=1"],
    "--data": ["--data", "digits"], "the presets": [],
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_arguments_are_refused(cmtool, straight, teacher, what):
    presets = ("digits-cd",) if what == "the presets" else ("digits-cd", "digits-ict")
    result = cmtool(*command(teacher, straight, *OTHERS[what], presets=presets))
    assert result.code == 2
    assert f"was begun with {what} " in result.err
    assert "--overwrite" in result.err


def test_another_teacher_is_refused(cmtool, straight, teacher, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    facts = content(straight)
    facts["teacher"]["sha256"] = "0" * 64
    (tmp_path / "out/compare.json").write_text(json.dumps(facts))
    result = cmtool(*command(teacher, "out"))
    assert (result.code, "begun with another teacher" in result.err) == (2, True)


def test_a_stopped_comparison_goes_on_to_the_same_numbers(
    cmtool, straight, teacher, tmp_path, monkeypatch
):
    calls, stop_at = iter(range(1000)), 5  # in the middle of the second run

    def reason(self):
        return signal.SIGTERM if next(calls) == stop_at else 0

    monkeypatch.setattr(Stop, "reason", reason)
    arguments = command(teacher, "out")
    first = cmtool(*arguments)
    assert first.code == 143, first.err
    assert "the same command goes on" in first.err
    assert cmtool(*arguments).code == 0
    assert untimed(content(tmp_path / "out")) == untimed(content(straight))


class Killed(BaseException):
    pass


def test_a_killed_comparison_goes_on_to_the_same_numbers(
    cmtool, straight, teacher, tmp_path, monkeypatch
):
    calls = iter(range(1000))

    def killed(self):
        if next(calls):
            raise Killed
        return 0

    arguments = command(teacher, "out")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "reason", killed)
        with pytest.raises(Killed):
            cmtool(*arguments)
    assert [point["step"] for point in content(tmp_path / "out")["runs"][0]["points"]] == [1]
    assert cmtool(*arguments).code == 0
    assert untimed(content(tmp_path / "out")) == untimed(content(straight))


def test_overwriting_starts_anew(cmtool, straight, teacher, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    (tmp_path / "out/compare.json").write_text("{}")
    result = cmtool(*command(teacher, "out", "--overwrite", "--seeds", "3"))
    assert result.code == 0, result.err
    found = content(tmp_path / "out")
    assert [run["seed"] for run in found["runs"]] == [3, 3]
    assert untimed(found)["runs"] != untimed(content(straight))["runs"]


def test_two_seeds_make_a_mean_and_a_spread(cmtool, teacher, straight, tmp_path):
    arguments = command(teacher, "out", "--seeds", "0,1", presets=["digits-cd"])
    result = cmtool(*arguments)
    assert result.code == 0, result.err
    found = content(tmp_path / "out")
    a, b = (run["points"][-1]["values"]["1"] for run in found["runs"])
    assert [run["folder"] for run in found["runs"]] == ["digits-cd-seed0", "digits-cd-seed1"]
    assert a == content(straight)["runs"][0]["points"][-1]["values"]["1"]
    (row,) = found["table"]
    assert row["values"]["1"] == pytest.approx((a + b) / 2)
    assert row["spread"]["1"] == pytest.approx(abs(a - b) / 2**0.5)
    assert " +- " in result.text


def test_a_run_that_diverges_ends_only_itself(cmtool, teacher, tmp_path, monkeypatch):
    train = runs.train

    def diverging(preset, out, *rest, **more):
        if out.name == "digits-cd":
            raise DivergedError("five bad steps", "lower the rate")
        return train(preset, out, *rest, **more)

    monkeypatch.setattr(runs, "train", diverging)
    result = cmtool(*command(teacher, "out"))
    assert result.code == 0, result.err
    assert "digits-cd diverged: five bad steps" in result.err
    rows = [line.split("\t")[0] for line in result.text.splitlines()]
    assert rows == ["method", "digits-ict", "digits-cd", "teacher, 3 calls"]
    assert [run["state"] for run in content(tmp_path / "out")["runs"]] == ["diverged", "done"]


def test_a_teacher_is_measured_by_its_own_sampler(cmtool, teacher, tmp_path):
    result = cmtool(*command(teacher, "out", presets=["digits-edm"]))
    assert result.code == 0, result.err
    assert "(3 calls)" in result.text
    assert content(tmp_path / "out")["methods"]["digits-edm"]["calls"] == {"1": 1, "2": 3}


def test_what_cannot_be_compared_is_refused_before_anything_is_made(cmtool, teacher, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").write_text("")
    for code, part, arguments in [
        (3, "no comparison", command(teacher, "full")),
        (2, "did you mean digits-cd", command(teacher, "a", presets=["digit-cd"])),
        (2, "two presets named ect", command(teacher, "a", presets=["ect", "ect"])),
        (2, "give --seeds", command(teacher, "a", "--set", "train.seed=3")),
        (2, "no time", command(teacher, "a", "--max-time", "0")),
        (2, "choose from", command(teacher, "b", "--protocol", "vgg16")),
        (3, "is a consistency model", command("digits-cd", "c")),
    ]:
        result = cmtool(*arguments)
        assert (result.code, part in result.err) == (code, True), result.err
    assert not [*tmp_path.rglob("compare.json")]
