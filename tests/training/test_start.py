import json

import pytest

from cmtool.errors import UserError
from cmtool.presets.toml import load_preset, preset_names, to_toml
from cmtool.training.start import check_components, split_as_before

SAME, OTHER = "parts as before", "the noise is different"


@pytest.mark.parametrize(
    ("processes", "accumulate", "now", "asked", "expected", "words"),
    [
        (2, 1, 2, None, 1, None),
        (2, 1, 1, None, 2, SAME),
        (2, 3, 1, None, 6, SAME),
        (1, 4, 2, None, 2, SAME),
        (1, 2, 4, None, 1, OTHER),  # more processes than parts
        (2, 1, 3, None, 1, OTHER),
        (4, 1, 3, None, 2, OTHER),  # no part larger than before
        (8, 1, 3, None, 4, OTHER),  # 9 parts of 120 would not be equal
        (2, 1, 1, 1, 1, OTHER),  # asked for
        (2, 1, 1, 2, 2, SAME),
    ],
)
def test_a_resumed_run_keeps_the_parts_of_its_batch_where_it_can(
    processes, accumulate, now, asked, expected, words, tmp_path
):
    preset = load_preset("digits-ct", {"train.batch": 120})
    stored = {"versions": {"cmtool": "0"}, "processes": processes}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    train = preset.train.model_copy(update={"accumulate": accumulate})
    started = preset.model_copy(update={"train": train})
    (tmp_path / "preset.toml").write_text(to_toml(started))
    if asked is not None:
        train = preset.train.model_copy(update={"accumulate": asked})
    given = preset.model_copy(update={"train": train})
    found, note = split_as_before(tmp_path, given, now, asked=asked is not None)
    assert found.train.accumulate == expected
    assert found.model_copy(update={"train": given.train}) == given
    assert words in note if words else note is None


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_names_components_that_exist(name):
    check_components(load_preset(name))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss.levels": "on_grid"}, "makes no grid"),
        ({"loss.levels": "above_transition"}, "a transition of None"),
        ({"loss.levels": {"name": "tightening", "stage_images": 0}}, "stages of 0 images"),
    ],
)
def test_levels_that_cannot_be_drawn_are_refused_before_the_first_step(values, said):
    with pytest.raises(UserError, match=said):
        check_components(load_preset("digits-ect", values))


@pytest.mark.parametrize("transition", [80.0, 100.0])
def test_a_transition_above_all_levels_is_refused(transition):
    preset = load_preset("digits-tcm", {"model.transition": transition})
    with pytest.raises(UserError, match="levels above a transition"):
        check_components(preset)
