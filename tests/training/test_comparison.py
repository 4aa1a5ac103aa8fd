"""compare.json: its table, and what makes a comparison another one."""

import json

import pytest

from cmtool.errors import UserError
from cmtool.training.comparison import (
    Asked,
    Comparison,
    Fitted,
    Point,
    Reference,
    Trained,
    check_asked,
    check_names,
    content_of,
    planned_runs,
    read_comparison,
    row_of,
    run_name,
    table,
    with_point,
    with_run,
    write_comparison,
)
from cmtool.training.records import DataFacts

ASKED = Asked(
    presets=["cd", "my/own.toml", "ict"], teacher=None, data=None, seeds=[0, 4], seconds=60.0,
    num=100, protocol=None, values={"train.lr": 0.5},
)  # fmt: skip
ENDS = {  # the distances in one step, by run, and in two steps 1 less
    "cd-seed0": 6.0, "own-seed0": 3.0, "ict-seed0": None, "cd-seed4": 8.0, "own-seed4": None,
    "ict-seed4": None,
}  # fmt: skip


def points(value):
    """Points at steps 5 and 10: the last has the value and takes 3 seconds, 5 of CPU."""
    early = Point(step=5, images=40, values={"1": 99.0, "2": 98.0}, seconds=1.0, cpu_seconds=2.0)
    values = {"1": value, "2": value - 1}
    return [early, Point(step=10, images=80, values=values, seconds=3.0, cpu_seconds=5.0)]


@pytest.fixture
def begun():
    """A comparison of three methods with two seeds, none of whose runs is begun."""
    method = Fitted(
        preset="cd", method="a", steps=10, batch=8, accumulate=1, seconds_a_step=6.0,
        calls={"1": 1, "2": 2},
    )  # fmt: skip
    return Comparison(
        asked=ASKED, metric="fd-pixels", protocol="pixels",
        data=DataFacts(name="photos", images=9, fingerprint=""),
        teacher=Reference(source="t", sha256="0", sampler="heun", calls=35, value=2.0),
        methods=dict.fromkeys(["cd", "own", "ict"], method), runs=planned_runs(ASKED),
        versions={}, device="cpu", threads=1,
    )  # fmt: skip


@pytest.fixture
def ended(begun):
    """The same: cd is done with both seeds, own with one, and all runs of ict diverged."""
    for run in begun.runs:
        value = ENDS[run.folder]
        known = {"state": "diverged"} if value is None else {"state": "done"}
        known |= {} if value is None else {"points": points(value)}
        begun = with_run(begun, run.model_copy(update=known))
    return begun


def test_all_methods_come_before_the_second_seed():
    folders = [run.folder for run in planned_runs(ASKED)]
    assert folders == list(ENDS)
    one = ASKED.model_copy(update={"seeds": [7]})
    assert next((run.folder, run.seed) for run in planned_runs(one)) == ("cd", 7)


def test_the_table_has_means_over_seeds_and_the_least_comes_first(ended):
    own, cd, ict = table(ended)
    assert [row.name for row in (own, cd, ict)] == ["own", "cd", "ict"]
    assert cd.values == {"1": 7.0, "2": 6.0}
    assert cd.spread == {"1": pytest.approx(2**0.5), "2": pytest.approx(2**0.5)}
    assert (cd.ratio, cd.seeds, cd.steps, cd.images) == (3.5, [0, 4], 10, 80)
    assert (cd.seconds, cd.cpu_seconds) == (3.0, 5.0)
    assert (own.values["1"], own.spread["1"], own.seeds) == (3.0, None, [0])
    assert (ict.state, ict.values["1"], ict.ratio, ict.seconds) == ("diverged", None, None, None)


def test_a_method_has_no_row_before_one_of_its_runs_ends(begun):
    assert table(begun) == []
    assert row_of(begun, "cd") is None


def test_what_is_written_is_read_again_and_is_strict_json(ended, tmp_path):
    write_comparison(tmp_path, ended)
    assert read_comparison(tmp_path) == ended
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content == json.loads(json.dumps(content_of(ended), allow_nan=False))
    assert [row["name"] for row in content["table"]] == ["own", "cd", "ict"]


def test_a_point_of_the_same_step_is_replaced():
    run = Trained(name="a", seed=0, folder="a", points=points(3.0))
    now = Point(step=5, images=40, values={"1": 1.0, "2": 2.0})
    assert with_point(run, now).points == [now, run.points[1]]


CHANGES = {
    "presets": (["cd"], "the presets"), "teacher": ("x", "--teacher"), "data": ("x", "--data"),
    "seeds": ([1], "--seeds"), "seconds": (7.0, "--max-time"), "num": (2, "--num"),
    "protocol": ("edm", "--protocol"), "values": ({}, "--set"),
}  # fmt: skip


@pytest.mark.parametrize("key", Asked.model_fields)
def test_whatever_is_asked_makes_another_comparison(key, tmp_path):
    value, name = CHANGES[key]
    with pytest.raises(UserError, match=f"begun with {name} ") as error:
        check_asked(ASKED, ASKED.model_copy(update={key: value}), tmp_path)
    assert "--overwrite" in error.value.hint
    check_asked(ASKED, ASKED, tmp_path)


def test_a_run_has_the_name_of_its_preset():
    assert [*map(run_name, ["cd", "my/own.toml", "a.b"])] == ["cd", "own", "a.b"]
    with pytest.raises(UserError, match="two presets named own"):
        check_names(["own", "a/own.toml"])
