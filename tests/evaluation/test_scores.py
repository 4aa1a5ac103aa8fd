from dataclasses import replace

import pytest
import torch

from cmtool.core.methods import Models
from cmtool.data.datasets import load_dataset
from cmtool.errors import MissingError, UserError
from cmtool.evaluation.during_training import Given, build_evaluation, build_score, evaluate
from cmtool.evaluation.features import INCEPTION
from cmtool.evaluation.measure import measure
from cmtool.evaluation.request import ModelImages, Request
from cmtool.models import load_model
from cmtool.presets.schema import Choice
from cmtool.sampling import plan
from cmtool.system.dist import ALONE
from cmtool.system.files import file_sha256
from tests.published import write_detector


def test_the_training_images_are_at_distance_zero_from_themselves():
    data = load_dataset("digits")
    score = build_score("fd-digits", data, "cpu")
    assert score(data.chunks(700)) == pytest.approx(0, abs=1e-6)
    assert score([data.images[:500] // 2]) > 10


@pytest.mark.parametrize("classes", ["uniform", "reference"])
def test_the_number_of_training_is_that_of_eval_for_classes_that_differ_in_number(
    classes, monkeypatch
):
    data, model = load_dataset("digits:held-out"), load_model("digits-cd")
    few = torch.cat([(data.labels == 0).nonzero()[:200, 0], (data.labels > 0).nonzero()[:20, 0]])
    data = replace(data, images=data.images[few], labels=data.labels[few])
    choice = Choice(name="fd-pixels", classes=classes)
    run = model.preset.run.model_copy(
        update={"eval_every": 1, "eval_num": 40, "eval_metric": choice}
    )
    preset = model.preset.model_copy(update={"run": run})
    found = build_evaluation(Given(preset, data, None, None, "cpu"))
    number = evaluate(found, Models(model.f, model.f), 0, ALONE).value
    images = ModelImages(model, plan(preset), 40)
    for where in ("measure.open_set", "shares.load_dataset"):
        monkeypatch.setattr(f"cmtool.evaluation.{where}", lambda *_, **__: data)
    request = Request(images=lambda: images, reference="these", protocol="pixels", classes=classes)
    assert measure(request).content["value"] == pytest.approx(number, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "data", "size"), [("fd-emoji", "digits", "32x32"), ("fd-digits", "emoji", "8x8")]
)
def test_a_score_of_images_of_another_size_names_both_and_one_that_takes_them(name, data, size):
    with pytest.raises(UserError, match=f"{name} measures RGB images of {size}; {data}") as caught:
        build_score(name, load_dataset(data), "cpu")
    for option in ("--set run.eval_metric=fd-pixels", "--metric fd-pixels"):
        assert option in caught.value.hint


def test_fid_needs_its_weights_before_training_and_is_zero_on_the_training_images(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path))
    data = load_dataset("digits")
    few = data.__class__(data.name, data.images[:6], None, 0)
    with pytest.raises(MissingError, match="is missing"):
        build_score("fid", few, "cpu")
    path = tmp_path / "weights" / INCEPTION.name
    path.parent.mkdir()
    write_detector(path)
    known = INCEPTION._replace(sha256=file_sha256(path))
    monkeypatch.setattr("cmtool.evaluation.features.INCEPTION", known)
    assert build_score("fid", few, "cpu")([few.images]) == pytest.approx(0, abs=1e-3)
