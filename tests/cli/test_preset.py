import json
import tomllib

import pytest
import torch

from cmtool.data.drawing import png_bytes
from cmtool.errors import UserError
from cmtool.presets.keys import meaning
from cmtool.presets.manual import REGISTRIES, explained
from cmtool.presets.schema import Preset, Section
from cmtool.presets.toml import flat, load_preset, preset_names, published
from cmtool.training import planning


def test_list_names_every_preset_with_its_description(cmtool):
    rows = [line.split("\t") for line in cmtool("preset", "list").text.splitlines()]
    assert [row[0] for row in rows] == preset_names()
    assert all(len(row) == 7 and all(row) for row in rows)
    ect = next(row for row in rows if row[0] == "cifar10-ect")
    assert ect[1:6] == ["consistency_training", "cifar10", "3.86", "2.15", "25.6"]


def test_the_list_is_sorted_by_what_the_papers_report(cmtool):
    by_fid = [
        line.split("\t") for line in cmtool("preset", "list", "--sort", "fid").text.splitlines()
    ]
    values = [float(row[3]) for row in by_fid if row[3] != "-"]
    assert values == sorted(values)
    assert by_fid[0][0] == "cifar10-tcm"
    told = json.loads(cmtool("preset", "list", "--sort", "mimg", "--json").text)["presets"]
    assert [row["mimg"] for row in told] == sorted(row["mimg"] for row in told)
    wrong = cmtool("preset", "list", "--sort", "fdi")
    assert wrong.code == 2
    assert "fid" in wrong.err


def test_a_preset_does_not_inherit_what_another_reports(tmp_path):
    assert published("cifar10-ect").fid_1 == 3.86
    assert published("cifar10-ecd").fid_1 is None
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "cifar10-ect"\n[published]\nfid_1 = -1.0\n')
    with pytest.raises(UserError, match=r"published\.fid_1"):
        published(str(mine))


def test_show_gives_toml_with_origins_that_can_be_used_again(cmtool, tmp_path):
    first = cmtool("preset", "show", "digits-cd", "--set", "train.lr=0.5")
    assert tomllib.loads(first.text)["train"]["lr"] == 0.5
    assert "lr = 0.5 # --set" in first.text
    assert "# digits-edm.toml" in first.text
    assert "# default" in first.text
    assert "learning rate after the warm-up" in first.text
    (tmp_path / "mine.toml").write_text(first.text)
    again = cmtool("preset", "show", "mine.toml")
    assert tomllib.loads(again.text) == tomllib.loads(first.text)


def test_show_explains_a_key(cmtool):
    shown = cmtool("preset", "show", "digits-ict", "loss.distance", "train.lr", "train.precision")
    assert 'loss.distance = "pseudo_huber" # digits-ict.toml' in shown.text
    assert "  lpips: " in shown.text
    assert "Options: c." in shown.text
    assert "A number above 0." in shown.text
    assert "One of auto, fp32, bf16, fp16." in shown.text
    source = cmtool("preset", "show", "digits-cmt", "loss.source").text
    assert "  images: " in source
    assert (
        "Options: mixed, points, rho, walk." in source
        or "Options: points, walk, rho, mixed." in source
    )
    unknown = cmtool("preset", "show", "digits-ict", "loss.distanc")
    assert unknown.code == 2
    assert "loss.distance" in unknown.err


def test_a_table_is_explained_key_by_key(cmtool):
    shown = cmtool("preset", "show", "digits-ct", "train", "data.fit")
    assert shown.code == 0, shown.err
    assert shown.text.count("train.") >= 15
    assert 'train.ema = [{name = "ema", halflife_images = 5000.0' in shown.text
    assert "A whole number at most 1,048,576." in shown.text
    assert "train.max_grad_norm" not in shown.text  # it has no value
    assert "data.fit" in shown.text


def test_every_key_of_a_preset_has_a_meaning():
    tables = {
        key: section.annotation for key, section in Preset.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
    }  # fmt: skip
    assert len(tables) >= 7
    for table, section in tables.items():
        for key in section.model_fields:
            assert meaning(f"{table}.{key}"), f"{table}.{key}"


@pytest.mark.parametrize("key", REGISTRIES)
def test_what_a_key_may_be_is_said_in_sentences(key):
    values = dict(flat(load_preset("digits-cd").model_dump()))
    for line in explained(key, values).text:
        assert "partial(" not in line
        assert len(line) > 4


def test_a_key_that_is_not_set_is_explained_too(cmtool):
    shown = cmtool("preset", "show", "digits-cd", "data.held_out")
    assert shown.code == 0, shown.err
    assert "# data.held_out is not set" in shown.text
    assert "A number above 0 and below 1 or a text." in shown.text


def test_new_writes_a_preset_that_fits_the_images(cmtool, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "seconds_a_step", lambda *_: 0.1)
    for name in ("cats/a", "cats/b", "dogs/c"):
        file = tmp_path / "my pets" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png_bytes(torch.full((3, 20, 24), 9, dtype=torch.uint8)))
    made = cmtool("preset", "new", "--data", "my pets", "--hours", "0.5")
    assert made.code == 0, made.err
    assert made.text == "my-pets-edm.toml\n"
    assert "next: cmtool train --preset my-pets-edm.toml" in made.err
    preset = load_preset(str(tmp_path / "my-pets-edm.toml"))
    assert preset.model.num_classes == 2
    assert preset.model.image_size == (20, 24)
    assert preset.train.steps == 18_000
    assert preset.data.path == str(tmp_path / "my pets")
    text = (tmp_path / "my-pets-edm.toml").read_text()
    assert all(
        "#" in line
        for line in text.splitlines()
        if " = " in line and "extends" not in line and "description" not in line
    )
    again = cmtool("preset", "new", "--data", "my pets")
    assert again.code == 2
    assert "--overwrite" in again.err
    piped = cmtool("preset", "new", "--data", "my pets", "--out", "-")
    assert tomllib.loads(piped.text)["train"]["steps"] == 36_000


def test_a_new_preset_names_what_it_cannot_extend(cmtool, tmp_path):
    assert "edm" in cmtool("preset", "new", "--data", "digits", "--method", "emd").err


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Two pictures in ~/pets, and no timing of steps."""
    monkeypatch.setattr(planning, "seconds_a_step", lambda *_: 0.1)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").mkdir()
    for name in "ab":
        picture = torch.full((3, 8, 8), 9, dtype=torch.uint8)
        (tmp_path / f"pets/{name}.png").write_bytes(png_bytes(picture))
    return tmp_path / "pets"


def test_new_takes_a_home_makes_its_folder_and_quotes_its_path(cmtool, tmp_path, pets):
    for data in ("--data=~/pets", "--data ~/pets"):
        made = cmtool("preset", "new", *data.split(), "--out", "new/my file.toml", "--overwrite")
        assert made.code == 0, made.err
        assert made.err.splitlines()[-1] == "next: cmtool train --preset 'new/my file.toml'"
    path = tmp_path / "new/my file.toml"
    assert load_preset(str(path)).data.path == str(pets)
    assert path.read_text().startswith("# cmtool train --preset 'new/my file.toml'\n")


def test_new_on_stdout_names_no_command_that_does_not_work(cmtool, tmp_path, pets):
    made = cmtool("preset", "new", "--data", "pets", "--out", "-")
    assert made.code == 0, made.err
    assert tomllib.loads(made.text)["extends"] == "edm"
    assert made.text.startswith("# cmtool train --preset FILE\n")
    assert "next:" not in made.err
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]


def test_a_folder_that_cannot_be_made_is_told_before_the_survey(cmtool, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "facts_of", lambda *_: pytest.fail("surveyed"))
    (tmp_path / "file").touch()
    refused = cmtool("preset", "new", "--data", "digits", "--out", "file/x.toml")
    assert refused.code == 3
    assert "error: cannot make file" in refused.err


@pytest.mark.parametrize("hours", ["nan", "inf", "1e305", "-1"])
def test_hours_that_are_none_are_refused(cmtool, hours):
    refused = cmtool("preset", "new", "--data", "digits", "--hours", hours)
    assert (refused.code, len(refused.err.splitlines())) == (2, 2)
    assert "--hours" in refused.err
