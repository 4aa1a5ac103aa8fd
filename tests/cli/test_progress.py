"""Long work is never silent: how far it is, and how long it will go on."""

import re

import pytest
import torch

from cmtool.cli import _watching
from cmtool.cli._watching import BarWatcher, LineWatcher, ticker
from cmtool.data.decoding import read_image
from cmtool.presets.toml import load_preset
from cmtool.training import observers

LINE = r"^(.+): ([\d,]+) of ([\d,]+) (images|network calls), [\d,.e+]+ a second, ([\d:]+) left$"


@pytest.fixture
def impatient(monkeypatch):
    """Every piece of progress is a line."""
    monkeypatch.setattr(_watching, "EVERY", 0.0)


def told(result):
    """The lines of progress: what, done, of how many."""
    assert result.code == 0, result.err
    found = re.findall(LINE, result.err, re.MULTILINE)
    return [(what, *(int(n.replace(",", "")) for n in numbers[:2])) for what, *numbers in found]


@pytest.mark.parametrize(
    ("arguments", "what", "total"),
    [
        (["sample", "--seeds", "0-39", "--out", "a.zip"], "drawn", 40),
        (["sample", "--seeds", "0-39", "--out", "a.npz", "--batch", "17"], "drawn", 40),
        (["sample", "--seeds", "0-39", "--out", "a.png", "--steps", "2"], "drawn", 40),
        (["sample", "--seeds", "0-39", "--out", "a"], "drawn", 40),
        (["sample", "-c", "digits-edm", "--seeds", "0-3", "--out", "a.png"], "drawn", 4),
        (["eval", "fid", "-c", "digits-cd", "--num", "40"], "drawn", 40),
        (["eval", "fid", "digits:held-out"], "images", 2840),
        (["eval", "consistency", "--num", "2", "--levels", "2", "--substeps", "1"], "paths", 10),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_pipe_gets_lines_that_ascend_to_all(cmtool, impatient, arguments, what, total):
    check_lines(told(cmtool(*arguments)), what, total)


def check_lines(told, what, total):
    lines = [(done, of) for name, done, of in told if name == what]
    assert lines[-1] == (total, total)
    assert {of for _, of in lines} == {total}
    assert [done for done, _ in lines] == sorted(done for done, _ in lines)
    assert len(lines) > 1


def test_a_search_tells_of_the_images_for_each_score(cmtool, impatient):
    result = cmtool("search", "-c", "digits-cd", "--grid", "4", "--num", "40", "--out", "l.json")
    lines = [line for line in told(result) if line[0] == "drawn"]
    assert lines.count(("drawn", 40, 40)) == result.err.count("fd-digits") == 2


def test_quick_work_has_no_lines(cmtool):
    assert told(cmtool("sample", "--seeds", "0-3", "--out", "a.zip")) == []


def test_lines_are_seconds_apart_and_have_the_time_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = ticker()
    for now in range(100, 140):
        progress("drawn", now - 100, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "drawn: 10 of 50 images, 1 a second, 0:40 left",
        "drawn: 20 of 50 images, 1 a second, 0:30 left",
        "drawn: 30 of 50 images, 1 a second, 0:20 left",
    ]


def test_a_process_among_several_speaks_for_itself(monkeypatch, capsys, impatient):
    monkeypatch.setenv("WORLD_SIZE", "2")
    LineWatcher().working("samples", 2, 4)
    assert capsys.readouterr().err.endswith(" left, this process\n")


def test_a_terminal_has_a_second_bar_while_there_is_work():
    watcher = BarWatcher(10)
    steps, work = watcher.bar.tasks
    assert not work.visible
    watcher.working("samples", 0, 40)
    assert (work.visible, work.description, work.fields["left"]) == (True, "samples", "-")
    watcher.working("samples", 10, 40)
    assert work.fields["amount"] == "10 of 40 images"
    assert work.fields["left"] != "-"
    watcher.working("samples", 40, 40)
    assert (work.visible, steps.visible) == (False, True)


def test_a_bar_is_on_stderr_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with _watching.showing() as progress:
        progress("drawn", 1, 2)
        print("a path")
    assert capsys.readouterr().out == "a path\n"


def drawn(monkeypatch):
    """A list to which each drawing of a run's grids adds its number of images."""
    numbers = []
    generate = observers.generate

    def counting(model, card, plan, seeds, **options):
        numbers.append((card.kind, len(seeds)))
        return generate(model, card, plan, seeds, **options)

    monkeypatch.setattr(observers, "generate", counting)
    return numbers


def test_the_last_grid_is_drawn_once_and_all_work_is_told(cmtool, tmp_path, monkeypatch, impatient):
    numbers, shown = drawn(monkeypatch), []
    monkeypatch.setattr(observers, "write_summary", lambda *given: shown.append(given[2]))
    result = cmtool(
        "distill", "--preset", "digits-cd", "--device", "cpu", "--out", "r",
        "--set", "train.batch=8", "--set", "train.steps=2", "--set", "run.sample_every=1",
        "--set", "run.sample_grid=12", "--eval-every", "2", "--set", "run.eval_num=30",
    )  # fmt: skip
    assert numbers == [("consistency", 12), ("consistency", 12), ("teacher", 12)]
    lines = told(result)
    check_lines([line for line in lines if line[0] == "samples"][-2:], "samples", 12)
    check_lines(lines, "samples of the teacher", 12)
    check_lines(lines, "images to evaluate", 30)
    check_lines(lines, "reference", 11536)
    *_, last = shown[0].values()
    picture = observers.picture(last, observers.COLUMNS)
    assert torch.equal(picture, read_image(tmp_path / "r/samples/step-0000002.png"))
    numbers.clear()
    assert cmtool("distill", "--resume", "--out", "r", "--device", "cpu").code == 0
    assert numbers == [("teacher", 12), ("consistency", 12)]  # no step was left to take
    assert all(torch.equal(shown[0][title], shown[1][title]) for title in shown[0])


def test_a_grid_has_40_images_unless_the_preset_says_otherwise(cmtool):
    assert load_preset("digits-cd").run.sample_grid == 40
    assert cmtool("train", "--set", "run.sample_grid=0", "--dry-run").code == 2
