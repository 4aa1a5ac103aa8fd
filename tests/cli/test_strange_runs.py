"""Run folders that someone else made: nothing outside is written, and nothing hangs."""

import json
import os
import shutil
import socket
from functools import partial
from types import SimpleNamespace

import pytest
from torch.amp import GradScaler

from cmtool.cli._options import newest_run
from cmtool.errors import InputError
from cmtool.system.files import write_atomic
from cmtool.training.checkpoint import read_counters
from cmtool.training.folder import refuse_strange
from cmtool.training.log import LogFile, read_log, trim_log
from cmtool.training.plots import run_plots
from cmtool.training.report import write_run_report
from cmtool.training.state import set_counters
from tests.cli.conftest import TINY

SECRET = "what belongs to somebody else\n"


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run, beside a file and a folder that are none of its business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/step-0000001.png").write_text(SECRET)
    (tmp_path / "secret").write_text(SECRET)
    return shutil.copytree(tiny_run, tmp_path / "r")


def listener(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


KINDS = {
    "link": lambda path: path.symlink_to("../secret"),
    "link to a folder": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "socket": listener,
}
PLACES = [
    "log.jsonl", "log.superseded.jsonl", "status.json", "run.json", "preset.toml", ".lock",
    ".summary.png.1.tmp", "samples", "samples/step-0000001.png", "checkpoints", "failed",
    "checkpoints/best.json", "checkpoints/step-0000006/state.json", "tensorboard", "notes/mine",
]  # fmt: skip


def everything(folder):
    """Every path under a folder, with its kind, and the content of regular files."""
    return {
        path: path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else path.lstat().st_mode
        for path in sorted(folder.rglob("*"))
    }


def plant(path, make):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_folder_with_what_is_no_regular_file_is_refused_as_it_is(
    cmtool, tmp_path, run, kind, place, how
):
    plant(run / place, KINDS[kind])
    before = everything(tmp_path)
    result = cmtool("train", "--preset", "digits-ct", *TINY, "--out", "r", how)
    assert result.code == 3, result.err
    assert f"error: r/{place} is a {kind}" in result.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "how", [["--resume"], ["--overwrite", "--preset", "digits-ct", *TINY, "--set", "train.steps=1"]]
)
@pytest.mark.usefixtures("bare_runs")
def test_a_copy_by_hard_links_leaves_the_original_as_it_is(cmtool, tmp_path, run, how):
    """As `cp -al` makes it, and tools of backups."""
    shutil.copytree(run, tmp_path / "copy", copy_function=os.link)
    before = everything(run)
    result = cmtool("train", "--out", "copy", "--device", "cpu", *how)
    assert result.code == 0, result.err
    assert everything(run) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_special_file_is_refused_by_name(cmtool, tmp_path, run, kind):
    plant(run / "tensorboard", KINDS[kind])
    before = everything(tmp_path)
    result = cmtool("train", "--out", "r", "--resume", "--device", "cpu")
    assert result.code == 3, result.err
    assert "error: r/tensorboard is a " in result.err
    assert everything(tmp_path) == before


def test_the_folder_itself_may_be_reached_by_a_link(cmtool, tmp_path, run):
    (tmp_path / "runs").symlink_to(tmp_path)
    result = cmtool("train", "--out", "runs/r", "--resume", "--device", "cpu")
    assert result.code == 0, result.err
    assert "resumed from runs/r/checkpoints/step-0000006" in result.err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place", ["samples/step-0000006.png", "summary.png", "preset.toml", "status.json", "run.json"]
)
def test_a_report_shows_nothing_from_outside_the_folder(run, tmp_path, monkeypatch, kind, place):
    monkeypatch.chdir(tmp_path)
    (run / "log.jsonl").unlink()  # curves take their time
    plant(run / place, KINDS[kind])
    write_run_report(run)
    page = (run / "report.html").read_text()
    assert SECRET.strip() not in page
    shown = {"samples/step-0000006.png": "samples at step", "summary.png": "images at the end"}
    assert shown.get(place, SECRET) not in page


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_is_read_and_written_in_its_folder_only(run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    plant(run / "log.jsonl", KINDS[kind])
    before = everything(tmp_path)
    for use in (read_log, lambda path: LogFile(path).write({"step": 7})):
        with pytest.raises(InputError, match="is not a regular file"):
            use(run / "log.jsonl")
    assert everything(tmp_path) == before
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").write_text('{"step": 7}\n')
    plant(run / "log.superseded.jsonl", KINDS[kind])
    with pytest.raises(InputError, match="is not a regular file"):
        trim_log(run, 6)
    assert everything(tmp_path / "outside") | {tmp_path / "secret": SECRET.encode()} == {
        tmp_path / "outside/step-0000001.png": SECRET.encode(),
        tmp_path / "secret": (tmp_path / "secret").read_bytes(),
    }


def test_a_temporary_name_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    temporary = tmp_path / f".a.json.{os.getpid()}.tmp"
    temporary.symlink_to("secret")
    write_atomic(tmp_path / "a.json", b"ours")
    assert (tmp_path / "a.json").read_bytes() == b"ours"
    assert (tmp_path / "secret").read_text() == SECRET
    assert not temporary.is_symlink()


def test_a_picture_that_no_step_names_is_passed_over(run):
    (run / "log.jsonl").unlink()
    for name in ("step-x.png", "step-.png", "step-²³.png", f"step-{'9' * 200}.png"):
        (run / "samples" / name).write_bytes(b"")
    (run / "samples/step-0000005.png").mkdir()
    write_run_report(run)
    assert (run / "report.html").read_text().count("<figcaption>") == 1


DAMAGED = {
    "a list": "[]",
    "a number": "7",
    "not JSON": "{",
    "not UTF-8": b'{"a": "\xff"}',
    "nested deep": '{"a":' * 100_000,
    "a number of 5,000 digits": '{"a": 1' + "0" * 5000 + "}",
    "wrong types": '{"state": 3, "versions": 4, "best": 5, "metric": {}, "step": "6"}',
    "no processes": '{"versions": {"cmtool": "0"}, "processes": 0}',
    "fewer than none": '{"versions": {"cmtool": "0"}, "processes": -3}',
    "a list of versions": '{"versions": ["cmtool"]}',
    "a time without end": '{"state": "running", "seconds_left": 1e999}',
    "a huge value": '{"metric": "m", "num": 4, "best": {"step-1": 1' + "0" * 400 + "}}",
    "two megabytes": " " * (2 << 20) + "{}",
}


def damage(path, kind):
    content = DAMAGED[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("place", ["run.json", "status.json", "checkpoints/best.json"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_when_its_run_is_resumed(cmtool, tmp_path, run, kind, place):
    damage(run / place, kind)
    before = everything(tmp_path)
    result = cmtool("train", "--out", "r", "--resume", "--device", "cpu")
    assert result.code == 3, result.err
    assert f"error: r/{place} " in result.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_report_is_written_beside_damaged_files(run, kind):
    (run / "log.jsonl").unlink()
    for place in ("run.json", "status.json", "preset.toml", "checkpoints/best.json"):
        damage(run / place, kind)
    write_run_report(run)
    assert "<b>not started</b>" in (run / "report.html").read_text()


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\n"])
def test_a_status_that_a_power_cut_emptied_is_none(run, content):
    (run / "status.json").write_bytes(content)
    refuse_strange(run, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 5), ("step", -1), ("step", "6"), ("step", 1e400), ("bad_steps", None),
        ("unlogged", []), ("unlogged", {"loss": [1.0]}), ("scaler", [1]),
        ("unlogged", {"loss": [1.0], "images": [], "grad_norm": 1.0, "steps": 1, "skipped": 0}),
    ],
)  # fmt: skip
def test_a_checkpoint_says_nothing_strange(run, key, value):
    state = run / "checkpoints/step-0000006/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {key: value}))
    with pytest.raises(InputError, match=r"step-0000006/state\.json"):
        read_counters(state.parent)


@pytest.mark.parametrize("scaler", [{}, {"scale": 2.0}, {"scale": "x", "growth_factor": 1}])
def test_a_strange_state_of_the_scaler_is_refused(scaler):
    state = SimpleNamespace(scaler=GradScaler("cpu"))
    with pytest.raises(InputError, match="scaler"):
        set_counters(state, {"step": 3, "scaler": scaler})


@pytest.mark.parametrize(
    "strange",
    [
        '{"step": 1e999}', '{"step": "4"}', '{"step": -1}', '{"step": 1' + "0" * 400 + "}",
        '{"step": 4, "loss": "low"}', '{"step": 4, "loss_by_sigma": [1]}', '{"step": 4, "lr": {}}',
        '{"step": 4, "n": 1' + "0" * 400 + "}", '{"step": 4, "eval": {"metric": 1}}',
        '{"step": 4, "eval": 5}', '{"step": 4, "x": ' + "[" * 100_000, '{"step": 4, "mu": true}',
    ],
)  # fmt: skip
def test_a_strange_line_of_a_log_is_left_out(tmp_path, strange):
    whole = '{"step": 2, "loss": 0.5, "loss_by_sigma": {"<1": null}, "eval": null, "lr": 1}'
    (tmp_path / "log.jsonl").write_text(f"{whole}\n{strange}\n")
    assert read_log(tmp_path / "log.jsonl") == [json.loads(whole)]
    trim_log(tmp_path, 1)
    run_plots(read_log(tmp_path / "log.jsonl"))


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", *DAMAGED])
def test_the_newest_run_is_looked_for_past_a_strange_one(tmp_path, monkeypatch, tiny_run, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "runs/good")
    (tmp_path / "runs/strange").mkdir()
    status = tmp_path / "runs/strange/status.json"
    (KINDS[kind] if kind in KINDS else partial(damage, kind=kind))(status)
    assert newest_run() == "runs/good"


def test_a_killed_run_is_told_when_it_is_resumed(cmtool, run):
    status = json.loads((run / "status.json").read_text()) | {"state": "running", "step": 5}
    (run / "status.json").write_text(json.dumps(status))
    result = cmtool("train", "--out", "r", "--resume", "--device", "cpu")
    assert result.code == 0, result.err
    assert "the run in r was killed, or the machine went down, after step 5\n" in result.err
    assert json.loads((run / "status.json").read_text())["state"] == "done"
