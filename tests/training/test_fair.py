"""What is compared is comparable: the same images, network, batch and seed, and the same time."""

import dataclasses
import itertools

import pytest

from cmtool.data.datasets import digits
from cmtool.errors import UserError
from cmtool.models import load_model
from cmtool.presets.schema import Card
from cmtool.presets.toml import load_preset, preset_names
from cmtool.training import compare, fair
from cmtool.training.comparison import Asked
from cmtool.training.fair import Terms, lap_times, picked_protocol, resolved
from cmtool.training.start import OF_STUDENT

ASKED = Asked(
    presets=["cd"], teacher=None, data=None, seeds=[0], seconds=60.0, num=100, protocol=None,
    values={},
)  # fmt: skip
PRESETS = [
    name
    for name in preset_names()
    if not (path := load_preset(name).data.path) or path.startswith("digits")
]


@pytest.fixture(scope="module")
def teacher():
    return load_model("digits-edm")


def terms(teacher, **asked):
    return Terms(ASKED.model_copy(update=asked), teacher, "cpu")


def fitted(preset, steps):
    return compare.fitted("", preset, steps, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_all_presets_have_the_same_images_network_batch_and_seed(teacher, name):
    train = teacher.preset.train.model_copy(update={"batch": 24})
    theirs = teacher.preset.model_copy(update={"train": train})
    chosen = terms(dataclasses.replace(teacher, preset=theirs))
    first = resolved(chosen, name).preset
    preset = resolved(chosen, name, fitted(first, 30), seed=5).preset
    networks = [dict(each.model.network.options) for each in (preset, theirs)]
    for key in OF_STUDENT:
        for network in networks:
            network.pop(key, None)
    assert networks[0] == networks[1]
    kept = {"network", "scalings", "transition"}
    assert preset.model.model_dump(exclude=kept) == theirs.model.model_dump(exclude=kept)
    assert (preset.noise, preset.data) == (theirs.noise, theirs.data)
    assert (preset.train.batch, preset.train.seed, preset.train.steps) == (24, 5, 30)
    assert preset.kind == load_preset(name).kind


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_keep_their_share_of_the_run(teacher, name):
    chosen, before = terms(teacher), load_preset(name)
    steps = 3 * before.train.steps
    preset = resolved(chosen, name, fitted(resolved(chosen, name).preset, steps)).preset
    assert preset.train.warmup_steps == 3 * before.train.warmup_steps
    images = 3 * 64 / before.train.batch
    for now, average in zip(preset.train.ema, before.train.ema, strict=True):
        if average.halflife_images is not None:
            assert now.halflife_images == round(images * average.halflife_images)
    options = before.loss.curriculum.options
    if "stage_steps" in options:
        found = preset.loss.curriculum.options["stage_steps"]
        assert found == 3 * options["stage_steps"]


def test_what_the_user_sets_goes_over_all_presets(teacher):
    chosen = terms(teacher, values={"train.batch": 16, "loss.distance": "l1"}, data="photos")
    for name in ("cd", "digits-ict"):
        preset = resolved(chosen, name, fitted(resolved(chosen, name).preset, 9)).preset
        assert (preset.train.batch, preset.loss.distance.name) == (16, "l1")
        assert preset.data.path == "photos"


def test_a_teacher_from_elsewhere_takes_the_images_of_the_first_preset_or_those_given(teacher):
    shown = {key: getattr(teacher.preset, key) for key in ("kind", "model", "noise", "sample")}
    foreign = dataclasses.replace(teacher, preset=Card(**shown))
    assert resolved(terms(foreign, presets=["digits-cd"]), "cd").preset.data.path == "digits"
    assert resolved(terms(foreign, data="photos"), "cd").preset.data.path == "photos"
    with pytest.raises(UserError, match="names no images") as error:
        resolved(terms(foreign), "cd")
    assert error.value.hint == "add --data DIR"


def test_laps_are_medians_of_rounds_in_turn_without_the_first(teacher, monkeypatch):
    asked = []

    def step_times(preset, own, device, images):
        asked.append((preset.description, own, images))
        return itertools.chain([1000.0], itertools.cycle([3.0, 2.0, 1.0]))

    monkeypatch.setattr(fair, "step_times", step_times)
    chosen = terms(teacher, seconds=1e-6)
    presets = {name: resolved(chosen, name).preset for name in ("cd", "ict")}
    train = presets["cd"].train.model_copy(update={"accumulate": 4})
    presets["cd"] = presets["cd"].model_copy(update={"train": train})
    assert lap_times(chosen, presets) == {"cd": 8.0, "ict": 2.0}
    named = [(presets["cd"].description, teacher, 16), (presets["ict"].description, None, 64)]
    assert asked == named * fair.ROUNDS


def test_the_time_of_a_method_before_its_steps_is_taken_from_them(teacher, monkeypatch):
    monkeypatch.setattr(fair, "seconds_before", lambda made, images: images / 64 * 20.0)
    chosen = terms(teacher, seconds=60.0)
    preset, data = resolved(chosen, "digits-adcm").preset, digits()
    assert fair.work_before(chosen, "digits-adcm", preset, data) == 40
    assert fair.work_before(chosen, "cd", resolved(chosen, "cd").preset, data) == 0
    short = chosen._replace(asked=chosen.asked.model_copy(update={"seconds": 40.0}))
    with pytest.raises(UserError, match=r"2 times, 20\.0 s each: no time is left") as error:
        fair.work_before(short, "digits-adcm", preset, data)
    assert error.value.hint == "leave it out, or give more than --max-time 40s"


def test_the_protocol_is_that_of_the_images(teacher):
    digits = resolved(terms(teacher), "cd").preset
    photos = resolved(terms(teacher, data="photos"), "cd").preset
    assert [picked_protocol(None, preset) for preset in (digits, photos)] == ["digits", "pixels"]
    assert picked_protocol("edm", digits) == "edm"
    wide = photos.model_copy(update={"model": photos.model.model_copy(update={"channels": 1})})
    for name, preset in [("vgg16", digits), ("digit", digits), ("digits", wide)]:
        with pytest.raises(UserError, match=f"--protocol '{name}'"):
            picked_protocol(name, preset)
