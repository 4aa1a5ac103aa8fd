"""What a run tells those who watch it: evaluations, the report, TensorBoard."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
from cmtool.evaluation.metrics import METRICS, Estimate
from cmtool.training.stop import Stop
from tests.cli.conftest import TINY
from tests.cli.test_train import assert_equal

EVERY_STEP = ["--eval-every", "1", "--set", "run.eval_num=4", "--set", "run.sample_every=100"]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def script(monkeypatch, values):
    """Have the metric `scripted` give these values in turn."""
    row = replace(
        METRICS["fid"],
        compute=lambda images, reference, extractor: {"fid": Estimate(next(values), 0.0)},
        names={"digits": "scripted"},
    )
    monkeypatch.setitem(METRICS, "scripted", row)


@pytest.mark.parametrize(
    "preset", ["digits-ct", pytest.param("digits-edm", marks=pytest.mark.slow)]
)
def test_evaluation_leaves_training_bit_equal(cmtool, tmp_path, preset):
    """With dropout, and without a weights EMA, so that the student itself is sampled."""
    arguments = ["train", "--preset", preset, *TINY, "--set", "train.steps=2",
                 "--set", "train.ema=[]", "--set", "model.network.dropout=0.3"]  # fmt: skip
    assert cmtool(*arguments, "--out", "plain").code == 0
    assert cmtool(*arguments, "--out", "judged", *EVERY_STEP).code == 0
    final = "checkpoints/step-0000002"
    assert_equal(tmp_path / "plain" / final, tmp_path / "judged" / final)


def test_the_value_is_that_of_the_eval_command(cmtool, tmp_path):
    result = cmtool("train", *TINY, "--preset", "digits-ct", "--out", "r", "--eval-every", "2",
                    "--set", "train.steps=3", "--set", "run.eval_num=300")  # fmt: skip
    assert result.code == 0, result.err
    assert "fd-digits=" in result.err
    later = json.loads(cmtool("eval", "fid", "-c", "r", "--num", "300", "--device", "cpu").text)
    lines = log(tmp_path / "r")
    assert [line["step"] for line in lines if "eval" in line] == [2, 3]
    found = lines[-1]["eval"]
    assert found == {"metric": "fd-digits", "value": later["value"], "num": 300, "step": 3}
    assert json.loads((tmp_path / "r/status.json").read_text())["eval"] == found


def test_data_that_the_metric_does_not_know_is_refused_before_training(cmtool, tmp_path):
    larger = ["--set", "model.image_size=[16,16]", "--set", "data.fit=box"]
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png_bytes(picture))
    result = cmtool("train", *TINY, *larger, "--set", "model.num_classes=0", "--data", "images",
                    "--out", "r", *EVERY_STEP, "--set", "run.eval_metric=fd-digits")  # fmt: skip
    assert result.code == 2, result.err
    assert "fd-digits measures RGB images of 8x8; images has 16x16 with 3 channels" in result.err
    assert not (tmp_path / "r").exists()
    unknown = cmtool("train", *TINY, *EVERY_STEP, "--set", "run.eval_metric=fd-digit")
    assert unknown.code == 2
    assert "did you mean 'fd-digits'?" in unknown.err


def test_the_best_checkpoint_is_kept_and_minus_c_means_the_newest(cmtool, tmp_path, monkeypatch):
    values = iter([5.0, 2.0, 4.0, 3.0, 6.0, 7.0])
    script(monkeypatch, values)
    run = ["train", *TINY, "--preset", "digits-ct", "--out", "r", *EVERY_STEP,
           "--set", "run.eval_metric=scripted", "--set", "run.checkpoint_every=1"]  # fmt: skip
    result = cmtool(*run, "--set", "train.steps=6")
    assert result.code == 0, result.err
    names = sorted(p.name for p in (tmp_path / "r/checkpoints").glob("step-*"))
    assert names == ["step-0000002", "step-0000005", "step-0000006"]
    assert json.loads((tmp_path / "r/checkpoints/best.json").read_text()) == {
        "metric": "scripted", "num": 4, "checkpoint": "step-0000002", "best": {"step-0000002": 2.0}
    }  # fmt: skip
    pictures = {}
    for model in ("r", "r/checkpoints/step-0000002", "r/checkpoints/step-0000006"):
        sampled = cmtool("sample", "-c", model, "--seeds", "0-3", "--out", f"{len(pictures)}.png")
        assert sampled.code == 0, sampled.err
        pictures[model] = read_image(tmp_path / f"{len(pictures)}.png")
    newest, best, last = pictures.values()
    assert torch.equal(newest, last)
    assert not torch.equal(newest, best)


def test_a_best_value_is_worth_a_checkpoint_of_its_own(cmtool, tmp_path, monkeypatch):
    values = iter([5.0, 6.0, 4.0, 9.0, 9.0])
    script(monkeypatch, values)
    run = ["train", *TINY, "--preset", "digits-ct", "--out", "r", *EVERY_STEP,
           "--set", "run.eval_metric=scripted"]  # fmt: skip
    assert cmtool(*run, "--set", "train.steps=5").code == 0
    names = sorted(p.name for p in (tmp_path / "r/checkpoints").glob("step-*"))
    assert names == ["step-0000003", "step-0000005"]


def sources(page):
    return re.findall(r'(?:src|href)="([^"]*)', page)


def test_a_stopped_run_is_reported_and_tensorboard_has_each_step_once(
    cmtool, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = [
        "train", "--preset", "digits-ct", *TINY, "--out", "r", "--set", "train.steps=8",
        "--set", "run.sample_every=4", "--set", "run.checkpoint_every=4",
        "--set", "run.tensorboard=true", "--eval-every", "8", "--set", "run.eval_num=4",
    ]  # fmt: skip
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "reason", lambda self: 15 if next(asked) == 7 else 0)
        assert cmtool(*run).code == 143
    page = (tmp_path / "r/report.html").read_text()
    assert "<b>stopped</b>, step 7 of 8, exit code 143" in " ".join(page.split())
    assert all(source.startswith("data:image/") for source in sources(page))
    shutil.rmtree(tmp_path / "r/checkpoints/step-0000007")  # so that step 6 is logged again
    resumed = cmtool("train", "--resume", "--out", "r", "--device", "cpu")
    assert resumed.code == 0, resumed.err
    page = (tmp_path / "r/report.html").read_text()
    assert "<b>done</b>" in page
    assert page.count("<figcaption>") == 2
    found = EventAccumulator(str(tmp_path / "r/tensorboard"))
    found.Reload()
    lines = log(tmp_path / "r")
    assert [event.step for event in found.Scalars("loss")] == [2, 4, 6, 8]
    told = [event.value for event in found.Scalars("loss_by_sigma/0.2-2")]
    logged = [line["loss_by_sigma"]["0.2-2"] for line in lines]
    assert told == pytest.approx([loss for loss in logged if loss is not None])
    assert [event.step for event in found.Scalars("eval/fd-digits")] == [8]
    assert [event.step for event in found.Images("samples")] == [4, 8]


def test_without_tensorboard_nothing_is_trained(cmtool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = cmtool("train", *TINY, "--out", "r", "--set", "run.tensorboard=true")
    assert result.code == 4
    assert "pip install 'cmtool[tensorboard]'" in result.err
    assert not (tmp_path / "r").exists()
