import json

import pytest

from cmtool.errors import InputError, Paused, ResourceError, Stopped
from cmtool.training import folder
from cmtool.training.folder import keep_status, launched_by, launcher


def read(out):
    return json.loads((out / "status.json").read_text())


@pytest.mark.parametrize(
    ("end", "state", "code", "error"),
    [
        (Stopped("by a signal", "", 15), "stopped", 143, None),
        (Paused("the time is up"), "stopped", 75, None),
        (InputError("no such image"), "failed", 3, "no such image"),
        (SystemExit(130), "stopped", 130, "stopped without saving"),
        (ValueError("a bug"), "failed", 1, "ValueError('a bug')"),
    ],
)
def test_status_says_how_a_run_ended_and_at_which_step(tmp_path, end, state, code, error):
    def run():
        with keep_status(tmp_path) as write:
            assert read(tmp_path)["state"] == "running"
            write(step=7)
            raise end

    with pytest.raises(type(end)):
        run()
    found = read(tmp_path)
    assert (found["state"], found["exit_code"], found["step"]) == (state, code, 7)
    assert found.get("error") == error


def test_status_is_true_on_a_full_disk_too(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise ResourceError("no room")

    with keep_status(tmp_path) as write:
        write(step=1234567, loss=0.5)
        monkeypatch.setattr(folder, "write_json", full)
        write(step=8)
    assert read(tmp_path)["step"] == 8


def test_a_run_knows_the_torchrun_that_began_it(tmp_path, monkeypatch):
    assert launcher() == ""
    with keep_status(tmp_path, ["", ""]):
        assert not launched_by(tmp_path, [""])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with keep_status(tmp_path, [launcher(), "node:1"]):
        assert launched_by(tmp_path, ["", launcher()])
        assert not launched_by(tmp_path, ["node:2"])


def test_a_disk_that_is_full_at_the_start_is_told(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise ResourceError("no room")

    monkeypatch.setattr(folder, "write_json", full)
    with pytest.raises(ResourceError, match="no room"), keep_status(tmp_path):
        pass


def test_a_run_that_overwrites_another_is_another_to_its_trackers(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("wandb.id", "mlflow.id"):
        (tmp_path / name).write_text("0123")
    folder.clear_run(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoints"}
