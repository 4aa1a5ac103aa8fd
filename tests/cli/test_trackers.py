"""A run shown elsewhere: what trackers are told, that they go on with it, and never end it."""

import json
import sys

import pytest

from cmtool.training import trackers
from cmtool.training.trackers import TRACKERS

TINY = ["train", "--preset", "digits-ct", "--set", "train.steps=4", "--set", "train.batch=4",
        "--set", "run.log_every=2", "--set", "run.sample_every=4", "--set", "run.sample_grid=2",
        "--set", "run.checkpoint_every=2", "--device", "cpu", "--out", "r"]  # fmt: skip


class Kept:
    """A tracker that keeps what it is told."""

    made = []

    def __init__(self, told):
        self.told, self.steps, self.shown, self.closed = told, [], [], False
        Kept.made.append(self)

    def scalars(self, values, step):
        self.steps.append((step, sorted(values)[:1], values["loss"]))

    def picture(self, name, image, step):
        self.shown.append((name, step, image.shape[0]))

    def close(self):
        self.closed = True


@pytest.fixture
def kept(monkeypatch):
    Kept.made = []
    monkeypatch.setitem(TRACKERS, "wandb", (Kept, "wandb"))
    monkeypatch.setattr(trackers, "_imported", lambda _: None)
    return Kept.made


def test_it_is_told_the_preset_numbers_and_grids(cmtool, kept):
    assert cmtool(*TINY, "--set", 'run.trackers=["wandb"]').code == 0
    (tracker,) = kept
    assert tracker.told.preset["train.batch"] == 4
    assert [step for step, _, _ in tracker.steps] == [2, 4]
    assert tracker.shown == [("samples", 4, 3)]
    assert tracker.closed


@pytest.mark.parametrize("fails", ["__init__", "scalars", "picture", "close"])
def test_whatever_it_raises_the_run_ends_well_and_says_so_once(cmtool, kept, monkeypatch, fails):
    def broken(*_):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(Kept, fails, broken)
    done = cmtool(*TINY, "--set", 'run.trackers=["wandb"]')
    assert done.code == 0, done.err
    assert done.err.count("no route to host") == 1


def test_without_its_package_nothing_is_trained(cmtool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    result = cmtool(*TINY, "--set", 'run.trackers=["mlflow"]')
    assert result.code == 4
    assert "pip install 'cmtool[mlflow]'" in result.err
    assert not (tmp_path / "r").exists()


def test_an_unknown_tracker_is_refused(cmtool):
    assert cmtool(*TINY, "--set", 'run.trackers=["comet"]').code == 2


def test_mlflow_keeps_a_run_over_a_resume(cmtool, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked = [*TINY, "--set", 'run.trackers=["mlflow"]']
    assert cmtool(*tracked, "--set", "train.steps=2").code == 0
    assert cmtool(*tracked, "--resume", "--set", "train.steps=4").code in (0, 2)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'cmtool'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["train.batch"] == "4"
    assert client.get_metric_history(run.info.run_id, "loss")[0].step == 2


def test_weights_and_biases_writes_offline(cmtool, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    done = cmtool(*TINY, "--set", 'run.trackers=["wandb"]')
    assert done.code == 0, done.err
    assert "cannot be written" not in done.err
    assert list((tmp_path / "r").glob("wandb/offline-run-*/*.wandb"))
    assert len((tmp_path / "r" / "wandb.id").read_text()) == 32
    json.loads((tmp_path / "r" / "run.json").read_text())
