import dataclasses
import math
import re

import pytest
import torch

from cmtool.data.drawing import png_bytes
from cmtool.errors import UserError
from cmtool.models import load_model
from cmtool.presets.toml import is_method_preset, load_preset, preset_names
from cmtool.training import cost, planning
from cmtool.training.cost import step_memory
from cmtool.training.planning import (
    SIZES,
    Facts,
    Wish,
    facts_of,
    network_for,
    picture_size,
    planned,
    rounded,
    scaled,
    spoken,
)
from cmtool.training.start import check_components

METHODS = [name for name in preset_names() if is_method_preset(name)]
FACTS = Facts("photos", 1000, None, 300, 3, 4, 0.43)


@pytest.fixture
def quick(monkeypatch):
    """Two seconds a step, time for many of them, and 16 GiB free."""
    monkeypatch.setattr(planning, "seconds_a_step", lambda *_: 2.0)
    monkeypatch.setattr(planning, "free_memory", lambda _: 16 << 30)
    monkeypatch.setattr(planning, "MANY_STEPS", 10)


def test_there_is_a_preset_for_each_method_that_users_start_with():
    assert {"edm", "cd", "ct", "ict", "ect", "pd"} <= set(METHODS)


def write(folder, shape, count=3, grey=False):
    folder.mkdir(parents=True)
    for index in range(count):
        image = torch.full((1 if grey else 3, *shape), 50 * index, dtype=torch.uint8)
        (folder / f"{index}.png").write_bytes(png_bytes(image))


def test_facts_are_those_of_the_images(tmp_path):
    write(tmp_path / "a" / "cat", (16, 20))
    write(tmp_path / "a" / "dog", (16, 20))
    facts = facts_of(str(tmp_path / "a"))
    assert facts[1:6] == (6, (16, 20), 16, 3, 2)
    assert facts.sigma_data == pytest.approx(50 / 127.5 * (2 / 3) ** 0.5, abs=1e-3)
    write(tmp_path / "b" / "one", (16, 20), grey=True)
    write(tmp_path / "b" / "two", (40, 12), grey=True)
    assert facts_of(str(tmp_path / "b"))[1:5] == (6, None, 12, 1)


@pytest.mark.parametrize(
    ("size", "shortest", "device", "side", "expected"),
    [
        ((28, 28), 28, "cpu", None, (28, 28)),
        ((24, 32), 24, "cpu", None, (24, 32)),
        ((64, 64), 64, "cpu", None, (32, 32)),
        ((64, 64), 64, "cuda:1", None, (64, 64)),
        ((64, 64), 64, "cpu", 64, (64, 64)),
        (None, 300, "cpu", None, (32, 32)),
        (None, 30, "cpu", None, (28, 28)),
        ((25, 25), 25, "cpu", None, (24, 24)),
        (None, 300, "cpu", 50, (48, 48)),
    ],
)
def test_pictures_keep_their_size_where_the_device_can_take_it(
    size, shortest, device, side, expected
):
    facts = FACTS._replace(size=size, shortest=shortest)
    assert picture_size(facts, device, side) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [4, 12, 28, 32, 48, 100])
def test_a_network_halves_down_to_few_pixels_and_can_be_built(size, side):
    network = network_for((side, side), SIZES[size])
    depth = len(network["channel_mult"])
    assert side % 2 ** (depth - 1) == 0
    assert side >> (depth - 1) <= 12 or depth == 6 or side % 2**depth
    if size == "small":
        expected = {4: [1, 2], 12: [1, 1, 2], 28: [1, 1, 2], 32: [1, 1, 2, 2], 48: [1, 1, 1, 2, 2]}
        assert network["channel_mult"] == expected.get(side, [1, 1, 2])
        assert side != 32 or network["attention_levels"] == [2, 3]
    assert all(side >> level <= 16 or level == depth - 1 for level in network["attention_levels"])
    preset = load_preset("edm", {"model.network": network, "model.image_size": [side, side]})
    check_components(preset)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_takes_the_time_it_is_given(name, quick):
    given = (
        {"facts": FACTS} if name in ("edm", "ct", "ict") else {"teacher": load_model("digits-edm")}
    )
    fitted, _ = planned(name, "cpu", {}, wish=Wish(hours=5), **given)
    assert fitted.preset.train.steps == 9000
    assert fitted.origins["train.steps"] == "about 5.0 hours on this cpu"
    check_components(fitted.preset)
    own = {"--set": {"train.steps": 7, "train.lr": 0.5}}
    again, _ = planned(name, "cpu", own, **given)
    assert (again.preset.train.steps, again.preset.train.lr) == (7, 0.5)


def test_a_plan_is_that_of_the_images(quick):
    preset = planned("edm", "cpu", {}, facts=FACTS)[0].preset
    assert (preset.model.num_classes, preset.model.sigma_data) == (4, 0.43)
    assert (preset.data.path, preset.data.fit) == ("photos", "adm")
    assert preset.description == "edm of photos"
    exact = planned("edm", "cpu", {}, facts=FACTS._replace(size=(32, 32)))[0].preset
    assert exact.data.fit == "exact"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (FACTS, "pixels"),
        (FACTS._replace(path="digits:train", size=(8, 8)), "digits"),
        (FACTS._replace(path="digits:train", size=(8, 8), channels=1), "pixels"),
        (FACTS._replace(path="emoji", size=(32, 32)), "emoji"),
        (FACTS._replace(path="somewhere/digits", size=(8, 8)), "pixels"),
    ],
)
def test_a_plan_measures_what_the_images_allow(quick, facts, name):
    preset = planned("edm", "cpu", {}, facts=facts)[0].preset
    assert preset.run.eval_metric.name == f"fd-{name}"


def test_a_student_takes_images_and_batch_of_its_teacher(quick):
    teacher = load_model("digits-edm")
    preset = planned("ect", "cpu", {}, teacher=teacher)[0].preset
    assert preset.data.path == "digits"
    assert preset.train.batch == teacher.preset.train.batch
    assert preset.model.image_size == (8, 8)
    other = planned("ect", "cpu", {"--data": {"data.path": "x"}}, teacher=teacher)[0].preset
    assert other.data.path == "x"


def test_little_memory_splits_the_batch(quick, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda _: 400 << 20)
    fitted, _ = planned("edm", "cpu", {}, facts=FACTS)
    assert fitted.preset.train.accumulate > 1
    assert fitted.origins["train.accumulate"] == "memory at hand"


def test_what_is_counted_in_steps_or_images_keeps_its_share():
    preset = load_preset("ect", {"train.warmup_steps": 80})
    values = scaled(preset, 4000, 4000 * 32)
    assert values["train.steps"] == 4000
    assert values["train.warmup_steps"] == 40
    assert values["loss.levels.stage_images"] == 16_000
    assert values["train.ema"] == [{"name": "ema", "halflife_images": 12_500, "rampup": 0.1}]
    for steps, each in ((800, 160), (1002, 201), (1, 1)):  # the last stage is entered by no run
        assert scaled(load_preset("pd"), steps, 64 * steps)["loss.curriculum.stage_steps"] == each


def test_steps_that_the_user_chose_have_their_share_too(quick):
    preset = planned("edm", "cpu", {"--set": {"train.steps": 150}}, facts=FACTS)[0].preset
    whole = load_preset("edm").train
    assert preset.train.steps == 150
    assert preset.train.warmup_steps == math.ceil(whole.warmup_steps * 150 / whole.steps) < 150
    assert preset.run.checkpoint_every == load_preset("edm").run.checkpoint_every


def test_wrong_wishes_are_refused(quick):
    with pytest.raises(UserError, match="--size 'tiny'"):
        planned("edm", "cpu", {}, facts=FACTS, wish=Wish(size="tiny"))


@pytest.mark.parametrize(
    ("number", "text"), [(0.4, 0), (7.6, 8), (87, 87), (1234, 1200), (98765, 99000)]
)
def test_steps_have_two_digits(number, text):
    assert rounded(number) == text


def digits_teacher(**changes):
    model = load_model("digits-edm")
    return dataclasses.replace(model, preset=load_preset("digits-edm", changes))


def test_a_student_learns_as_its_teacher_did(quick):
    seen = {"flip": True, "background": "black", "label_dropout": 0.1, "balanced": True}
    changes = {f"data.{key}": value for key, value in seen.items()}
    teacher = digits_teacher(**changes, **{"train.lr": 5e-4})
    preset = planned("cd", "cpu", {}, teacher=teacher)[0].preset
    assert {key: getattr(preset.data, key) for key in seen} == seen
    assert preset.train.lr == load_preset("cd").train.lr / 2  # as its teacher's to that of edm
    assert planned("cd", "cpu", {}, teacher=digits_teacher())[0].preset.train.lr == 5e-4
    few = planned("cd", "cpu", {}, teacher=digits_teacher(**{"train.batch": 16}))[0].preset.train
    assert (few.batch, few.lr) == (16, pytest.approx(2.5e-4))


def test_fine_tuning_keeps_what_the_model_is_but_for_its_classes(quick):
    changes = {
        "model.sigma_data": 0.7,
        "noise.sigma_max": 50.0,
        "train.batch": 12,
        "train.lr": 3e-4,
    }
    preset = planned("edm", "cpu", {}, facts=FACTS, start=digits_teacher(**changes))[0].preset
    assert (preset.model.sigma_data, preset.noise.sigma_max) == (0.7, 50.0)
    assert (preset.train.batch, preset.train.lr) == (12, 3e-4)
    assert (preset.model.image_size, preset.model.num_classes) == ((8, 8), FACTS.classes)
    assert preset.model.network.options["channel_mult"] == [1, 2]


@pytest.mark.parametrize("size", SIZES)
def test_larger_networks_learn_at_lower_rates(quick, size):
    preset = planned("edm", "cpu", {}, facts=FACTS, wish=Wish(size=size))[0].preset
    assert preset.train.lr == pytest.approx(1e-3 * SIZES[size].rate)
    assert preset.train.batch == SIZES[size].batch
    assert preset.model.network.options["dropout"] == SIZES[size].dropout


def test_a_plan_leaves_memory_to_others(quick, monkeypatch):
    whole = planned("edm", "cpu", {}, facts=FACTS)[0].preset
    needed = step_memory(whole, None, "cpu").of(whole.train.batch)
    for free, parts in ((needed, 2), (2 * needed, 1)):
        monkeypatch.setattr(planning, "free_memory", lambda _, free=free: free)
        assert planned("edm", "cpu", {}, facts=FACTS)[0].preset.train.accumulate == parts


def test_a_short_run_takes_many_steps_of_a_smaller_batch(quick, monkeypatch):
    """As many images in the same time, at the same rate."""
    monkeypatch.setattr(planning, "MANY_STEPS", 4000)
    whole = planned("edm", "cpu", {}, facts=FACTS, wish=Wish(hours=4))[0].preset.train
    assert (whole.batch, whole.steps, whole.lr) == (64, 7200, 1.5e-3)
    short = planned("edm", "cpu", {}, facts=FACTS)[0]
    assert (short.preset.train.batch, short.preset.train.steps) == (16, 7200)
    assert short.preset.train.lr == 1.5e-3
    assert short.origins["train.batch"] == "many steps"
    least = planned("edm", "cpu", {}, facts=FACTS, wish=Wish(hours=0.01))[0].preset.train
    assert least.batch == planning.LEAST_BATCH == 16
    own = {"--set": {"train.batch": 64}}
    assert planned("edm", "cpu", own, facts=FACTS)[0].preset.train.batch == 64
    taught = planned("cd", "cpu", {}, teacher=load_model("digits-edm"))[0].preset.train
    assert taught.batch == 64


def test_grids_of_samples_take_a_small_part_of_a_run():
    """40 images of 36 calls are 480 images of training."""
    preset = load_preset("edm")
    assert scaled(preset, 7200, 7200 * 16)["run.sample_every"] == 720
    assert scaled(preset, 300, 300 * 64)["run.sample_every"] == 150
    assert scaled(preset, 300, 300 * 8)["run.sample_every"] == 300
    assert scaled(preset, 300, 300 * 8)["run.checkpoint_every"] == 30
    assert scaled(load_preset("cd"), 300, 300 * 8)["run.sample_every"] == 33


def test_a_method_with_a_teacher_is_timed_with_one_that_is_not_trained(monkeypatch):
    """Its step needs one, and a user who plans a distillation may have none yet."""
    monkeypatch.setattr(cost, "PROBE", 2)
    small = Facts("digits", 100, (8, 8), 8, 3, 10, 0.5)
    resolved, _ = planned("cd", "cpu", {}, facts=small, wish=Wish(hours=0.001))
    assert resolved.preset.train.steps >= 100
    assert re.fullmatch(r"about \d+ minutes? on this cpu", resolved.origins["train.steps"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2, "1 minute"),
        (95, "2 minutes"),
        (3569, "59 minutes"),
        (3599, "60 minutes"),
        (3600, "1.0 hours"),
        (9000, "2.5 hours"),
    ],
)
def test_a_short_time_is_told_in_minutes(seconds, text):
    assert spoken(seconds) == text
