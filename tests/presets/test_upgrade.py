"""Presets and cards of version 0.1 are read as those of today."""

import json

import pytest

from cmtool.errors import UserError
from cmtool.presets.schema import Preset
from cmtool.presets.toml import load_preset, resolve
from cmtool.presets.upgrade import METHOD_OF, of_kind, upgraded
from tests.golden import GOLDEN

OLD = json.loads((GOLDEN / "presets_0_1.json").read_text())


@pytest.mark.parametrize("name", OLD)
def test_every_preset_of_0_1_is_the_one_of_today(name):
    before, now = Preset.model_validate(upgraded(OLD[name])), load_preset(name)
    if "continuous" in name:  # there the grid of sampling stood among the choices of training
        same = {"curriculum": before.loss.curriculum}
        now = now.model_copy(update={"loss": now.loss.model_copy(update=same)})
        now = now.model_copy(update={"sample": before.sample})
    assert before == now


def test_a_preset_of_today_stays_as_it_is():
    tables = load_preset("digits-cd").model_dump()
    assert upgraded(tables) == tables


@pytest.mark.parametrize(("old", "method"), METHOD_OF.items(), ids=str)
def test_pair_continuous_and_live_are_a_method(old, method, tmp_path):
    pair, continuous, live = old
    (tmp_path / "own.toml").write_text(f"""
extends = "digits-cd"
[loss]
pair = "{pair}"
continuous = {str(continuous).lower()}
target = "{"live" if live else "student"}"
""")
    found = resolve(str(tmp_path / "own.toml"), {}).preset
    assert (found.loss.method.name, found.loss.target) == (method, "student")


def test_overrides_of_0_1_still_mean_what_they_meant():
    near = {"loss.continuous": True, "loss.levels": "ramp"}
    assert load_preset("digits-cd", near).loss.method.name == "continuous_distillation"
    assert load_preset("digits-ct", near).loss.method.name == "continuous_training"
    assert load_preset("digits-cd", {"loss.pair": "noise"}).loss.method.name == (
        "consistency_training"
    )


def test_what_0_1_refused_is_refused():
    with pytest.raises(UserError, match=r"with loss\.continuous = true") as caught:
        load_preset("digits-cd", {"loss.pair": "none", "loss.continuous": True})
    assert "live_distillation" in caught.value.hint


@pytest.mark.parametrize("text", ['loss = "l1"', "loss = 5", "[[loss]]", "[loss]\npair = [1]"])
def test_a_loss_that_is_no_table_of_0_1_is_refused_by_its_name(text, tmp_path):
    """Tracebacks."""
    (tmp_path / "own.toml").write_text(f'extends = "digits-cd"\n{text}\n')
    with pytest.raises(UserError, match=r"^loss"):
        load_preset(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("model", ["adm", 5, [{}]])
def test_a_model_that_is_no_table_is_left_to_fail_as_what_it_is(model):
    assert of_kind({"model": model}, "teacher")["model"] == model
    with pytest.raises(UserError, match=r"^model = "):
        load_preset("digits-cd", {"model": model, "loss.pair": "teacher"})


def test_a_card_of_0_1_had_the_scalings_of_its_kind():
    card = {"model": {"scalings": {"name": "edm"}}}
    assert of_kind(card, "consistency")["model"]["scalings"] == "consistency"
    assert of_kind(card, "teacher")["model"]["scalings"] == {"name": "edm"}
    vp = {"model": {"scalings": {"name": "vp"}}}
    assert of_kind(vp, "teacher") == vp | {"kind": "teacher"}
