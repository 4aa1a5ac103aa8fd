"""cmtool runs: a table of runs, and a comparison; odd folders are passed over with a note."""

import json
import os
import pty
import subprocess
import sys
import threading

import pytest

from cmtool.cli.runs import AGES, SIZES, rounded
from cmtool.data.decoding import read_image
from cmtool.presets.toml import resolve, to_toml
from cmtool.training import plots
from cmtool.training.history import History, read_history


def make(folder, preset="digits-cd", losses=(0.5, 0.25), metric=(), when=1000, **status):
    """A run's folder, with a line of log each step."""
    folder.mkdir(parents=True)
    resolved = resolve(preset, {"--set": {"train.steps": 9}})
    (folder / "preset.toml").write_text(to_toml(resolved.preset, resolved.origins))
    data = {"name": "my digits", "images": 3, "fingerprint": ""}
    (folder / "run.json").write_text(json.dumps({"versions": {"cmtool": "1"}, "data": data}))
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    for line, value in zip(lines, metric, strict=False):
        line["eval"] = {"metric": "fd-digits", "value": value, "num": 8, "step": line["step"]}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"state": "done", "step": 9, "steps": 9, **status}
    (folder / "status.json").write_text(json.dumps(facts))
    os.utime(folder / "status.json", (when, when))
    return folder


def cells(result):
    assert result.code == 0, result.err
    return [line.split("\t") for line in result.text.splitlines()]


def test_a_pipe_gets_a_line_a_run_the_newest_first(cmtool, tmp_path):
    make(tmp_path / "runs/old", when=1000)
    make(tmp_path / "runs/new", "digits-edm", when=3000, state="stopped", step=4)
    make(tmp_path / "runs/between", "digits-ct", metric=[3.0, 2.5], when=2000)
    found = cells(cmtool("runs", "list"))
    assert [row[0] for row in found] == ["new", "between", "old"]
    assert found[0][1:7] == ["teacher", "denoising", "my digits", "4/9", "stopped", "0.25"]
    assert found[1][1:7] == [
        "consistency", "consistency training", "my digits", "9/9", "done", "fd-digits 2.5"
    ]  # fmt: skip
    assert [len(row) for row in found] == [9, 9, 9]
    assert cells(cmtool("runs", "list", "runs/old")) == found[-1:]


def test_json_is_one_object_with_plain_numbers(cmtool, tmp_path):
    make(tmp_path / "x/a", metric=[3.0, 2.5, 9.0], losses=[1.0, 0.5, 2.0])
    result = cmtool("runs", "list", "x", "--json")
    (facts,) = json.loads(result.text)["runs"]
    size = sum(file.stat().st_size for file in (tmp_path / "x/a").rglob("*") if file.is_file())
    assert facts["age_seconds"] > 1e9
    assert facts["updated"] == "1970-01-01T00:16:40+00:00"
    told = {
        key: facts[key] for key in ("path", "step", "steps", "loss", "best", "bytes", "teacher")
    }
    assert told == {
        "path": "x/a", "step": 9, "steps": 9, "loss": 2.0, "best": {"fd-digits": 2.5},
        "bytes": size, "teacher": None,
    }  # fmt: skip


def test_a_run_that_is_gone_is_killed(cmtool, tmp_path):
    make(tmp_path / "runs/a", state="running", step=3)
    assert cells(cmtool("runs", "list"))[0][5] == "killed"


ODD = {
    "empty": lambda path: None,
    "no object": lambda path: (path / "status.json").write_text("[1]"),
    "cut short": lambda path: (path / "status.json").write_text('{"state": "do'),
    "another type": lambda path: (path / "status.json").write_text('{"state": 7}'),
    "deep": lambda path: (path / "status.json").write_text("[" * 100_000),
    "a folder": lambda path: (path / "status.json").mkdir(),
    "a pipe": lambda path: os.mkfifo(path / "status.json"),
    "a link": lambda path: (path / "status.json").symlink_to("/dev/zero"),
    "no text": lambda path: (path / "status.json").write_bytes(b"\xff\xfe\0"),
}


@pytest.mark.timeout(60)
def test_odd_folders_are_passed_over_with_a_note(cmtool, tmp_path):
    make(tmp_path / "runs/good")
    for name, spoil in ODD.items():
        (tmp_path / "runs" / name).mkdir()
        spoil(tmp_path / "runs" / name)
    (tmp_path / "runs/a file").write_text("")
    result = cmtool("runs", "list")
    assert [row[0] for row in cells(result)] == ["good"]
    notes = result.err.splitlines()
    assert all(note.startswith("passed over: runs/") for note in notes)
    assert len(notes) == len(ODD)
    compared = cmtool("runs", "compare", "runs/good", *(f"runs/{name}" for name in ODD))
    assert (compared.code, "error: 1 run to compare" in compared.err) == (3, True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["preset.toml", "run.json", "log.jsonl"])
def test_what_else_cannot_be_read_is_a_gap(cmtool, tmp_path, name):
    for number, spoil in enumerate(
        [lambda path: path.write_bytes(b"\xff[[["), os.mkfifo, lambda path: path.mkdir()]
    ):
        run = make(tmp_path / f"runs/{number}")
        (run / name).unlink()
        spoil(run / name)
    found = cells(cmtool("runs", "list"))
    assert [len(row) for row in found] == [9, 9, 9]
    gap = {"preset.toml": (2, "-"), "run.json": (3, "digits"), "log.jsonl": (6, "-")}[name]
    assert {row[gap[0]] for row in found} == {gap[1]}
    assert cmtool("runs", "compare", "runs/0", "runs/1", "--out", "c.png").code == 0


def test_names_cannot_write_to_the_terminal(cmtool, tmp_path):
    make(tmp_path / "runs" / "a\x1b[31m\t[b]\n")
    assert cells(cmtool("runs", "list"))[0][0] == r"a\x1b[31m\t[b]\n"


def on_a_terminal(folder, *arguments):
    """What a command writes to a terminal on stdout and stderr."""
    ours, theirs = pty.openpty()
    written = []
    reader = threading.Thread(target=lambda: written.append(read_all(ours)), daemon=True)
    reader.start()
    subprocess.run(
        [sys.executable, "-m", "cmtool", *arguments], cwd=folder, stdout=theirs, stderr=theirs,
        timeout=100, check=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
    )  # fmt: skip
    os.close(theirs)
    reader.join(10)
    return written[0].decode()


@pytest.mark.slow
def test_paths_stand_above_the_bar_on_a_terminal(tmp_path):
    text = on_a_terminal(tmp_path, "sample", "--seeds", "0-199", "--batch", "1", "--out", "o")
    told = {int(part.split()[0]) for part in text.split("drawn ")[1:]}
    assert len(told) > 1  # of its redraws, ten a second, some fall between the first and the last
    lines = [line.rpartition("\x1b[2K")[2].strip() for line in text.splitlines()]
    assert [line for line in lines if line.endswith(".png")] == [
        f"o/seed{seed:06}.png" for seed in range(200)
    ]  # fmt: skip


def test_text_of_many_lines_is_whole_on_a_terminal(tmp_path):
    assert len(on_a_terminal(tmp_path, "preset", "show", "digits-cd").splitlines()) > 40


def test_a_terminal_gets_a_table(tmp_path):
    make(tmp_path / "runs" / "[b]a")
    text = on_a_terminal(tmp_path, "runs", "list")
    assert "loss or best" in text
    assert "[b]a" in text
    assert "\t" not in text


def read_all(descriptor):
    content = b""
    try:
        while part := os.read(descriptor, 1 << 16):
            content += part
    except OSError:  # the other end is closed
        pass
    return content


def test_without_runs_there_is_a_word(cmtool):
    result = cmtool("runs", "list")
    assert (result.code, result.text) == (0, "")
    assert "cmtool distill" in result.err
    assert json.loads(cmtool("runs", "list", "--json").text) == {"runs": []}
    missing = cmtool("runs", "list", "nowhere")
    assert (missing.code, "cannot list nowhere" in missing.err) == (3, True)


def test_what_differs_is_a_line_a_key_and_so_is_what_became(cmtool, tmp_path):
    a = make(tmp_path / "runs/a", metric=[3.0, 2.0, 2.5], losses=[1.0, 0.5, 0.25])
    b = make(tmp_path / "runs/b", losses=[2.0], state="failed", step=1)
    text = (b / "preset.toml").read_text()
    (b / "preset.toml").write_text(text.replace("lr = 0.0005", "lr = 0.25"))
    assert cells(cmtool("runs", "compare", "runs/a", "runs/b")) == [
        ["", "a", "b"],
        ["train.lr", "0.0005", "0.25"],
        ["step", "9", "1"],
        ["state", "done", "failed"],
        ["loss", "0.25", "2"],
        ["best fd-digits", "2", "-"],
    ]
    found = json.loads(cmtool("runs", "compare", str(a), str(b), "--json").text)
    assert found["runs"] == [str(a), str(b)]
    assert found["presets"] == {"train.lr": [0.0005, 0.25]}
    assert found["numbers"]["best fd-digits"] == [2.0, None]


def test_runs_of_one_name_are_told_apart(cmtool, tmp_path):
    for folder in ("x", "y"):
        make(tmp_path / folder / "a")
    assert cells(cmtool("runs", "compare", "x/a", "y/a"))[0] == ["", "x/a", "y/a"]


def test_the_curves_are_one_picture_that_is_never_replaced_unasked(cmtool, tmp_path):
    for name in ("_a$", "b$"):
        make(tmp_path / name, metric=[3.0, 2.0])
    command = ["runs", "compare", "_a$", "b$", "--out", "new/c.png"]
    result = cmtool(*command)
    assert result.code == 0, result.err
    assert "curves: new/c.png" in result.err
    assert read_image(tmp_path / "new/c.png").shape[0] == 3
    assert cmtool(*command).code == 2
    assert cmtool(*command, "--overwrite").code == 0
    assert cmtool(*command[:-1], "c.jpg").code == 2
    assert cmtool("runs", "compare", "b$").code == 3


def test_a_name_has_one_colour_in_all_plots(tmp_path):
    from matplotlib.figure import Figure

    runs = [make(tmp_path / "a"), make(tmp_path / "b", metric=[1.0])]
    logs = {run.name: read_history(run).log for run in runs}
    figure, drawn = Figure(), {}
    for plot in plots.overlaid(logs):
        axis = figure.add_subplot()
        plots.draw(axis, plot, {"a": 0, "b": 1})
        drawn[plot.title] = {line.get_label(): line.get_color() for line in axis.lines}
        assert axis.get_yscale() == ("log" if plot.title == "loss" else "linear")
    assert drawn == {
        "loss": {"a": "C0", "b": "C1"}, "fd-digits, lower is better": {"b": "C1"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "units", "text"),
    [(0, AGES, "0 s"), (59, AGES, "59 s"), (90, AGES, "1.5 min"), (86_400, AGES, "1 d"),
     (1023, SIZES, "1023 B"), (1536, SIZES, "1.5 KiB"), (1 << 40, SIZES, "1024 GiB")],
)  # fmt: skip
def test_numbers_are_rounded_for_people(number, units, text):
    assert rounded(number, units) == text


def test_the_best_value_is_the_least_one_that_was_measured(tmp_path):
    """Also of more than a curve shows, and beside one that is no number."""
    values = [float("nan"), *range(900, 100, -1), 7.5, 300.0]
    lines = [{"eval": {"metric": "fd-x", "step": k, "value": v}} for k, v in enumerate(values)]
    history = History(tmp_path, None, 0.0)
    history.__dict__["log"] = [{"loss": 0.0}, *lines]
    assert history.best == {"fd-x": 7.5}
    assert history.loss == 0.0
