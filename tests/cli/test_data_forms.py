"""Commands on data as people have it: tar shards, parquet, `datasets`, classes by name."""

import hashlib
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from cmtool.cli import _completion
from cmtool.data import datasets as data_module
from cmtool.data.datasets import load_dataset
from cmtool.models import load_model
from tests.cli.conftest import TINY
from tests.data.forms import (
    FILES,
    FORMS,
    KINDS,
    LABELS,
    PICTURES,
    N,
    as_folder,
    as_parquet,
    as_shards,
    as_tar,
    member,
)
from tests.processes import run
from tests.training.test_torchrun import tensors

CLASSES = ["--set", "model.num_classes=3"]
TRAIN = ["train", "--preset", "digits-ct", *TINY, *CLASSES, "--set", "data.workers=0"]


@pytest.mark.usefixtures("bare_runs")
def test_training_and_evaluation_see_the_same_images_in_every_form(cmtool, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    weights, marks, values = {}, set(), set()
    (tmp_path / "other").mkdir()
    other = as_tar(tmp_path / "other", dict(list(FILES.items())[:5]))
    for form, write in FORMS.items():
        path = write(tmp_path)
        result = cmtool(*TRAIN, "--data", path, "--set", "train.steps=2", "--out", f"r/{form}")
        assert result.code == 0, result.err
        weights[form] = tensors(tmp_path / f"r/{form}")
        marks.add(json.loads((tmp_path / f"r/{form}/run.json").read_text())["data"]["fingerprint"])
        told = cmtool("eval", "fid", path, "--reference", other, "--protocol", "pixels")
        assert told.code == 0, told.err
        values.add(json.loads(told.out)["value"])
    assert len(marks) == 1
    assert len(values) == 1
    for form in FORMS:
        assert weights[form].keys() == weights["folder"].keys()
        for name, tensor in weights["folder"].items():
            assert torch.equal(tensor, weights[form][name]), (form, name)


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("form", ["shards", "parquet"])
def test_a_run_that_streams_resumes_bit_for_bit_in_this_form_and_another(
    form, cmtool, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    steps = ["--set", "train.steps=4", "--set", "run.checkpoint_every=2"]
    assert cmtool(*TRAIN, *steps, "--data", FORMS[form](tmp_path), "--out", "r").code == 0
    straight = tensors(tmp_path / "r")
    for again in (FORMS[form](tmp_path / "b"), as_folder(tmp_path)):
        shutil.rmtree(tmp_path / "r/checkpoints/step-0000004")
        resumed = cmtool(*TRAIN, *steps, "--data", again, "--out", "r", "--resume")
        assert resumed.code == 0, resumed.err
        assert "resumed from" in resumed.err
        for name, tensor in tensors(tmp_path / "r").items():
            assert torch.equal(tensor, straight[name]), name
    other = as_tar(tmp_path, FILES | {"cat/000.png": FILES["cat/001.png"]})
    refused = cmtool(*TRAIN, *steps, "--data", other, "--out", "r", "--resume")
    assert refused.code == 2
    assert "was started with another data" in refused.err


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_run_of_version_0_1_that_streams_resumes(form, cmtool, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    path = FORMS[form](tmp_path)
    steps = ["--data", path, "--out", "r", "--set", "train.steps=1"]
    assert cmtool(*TRAIN, *steps).code == 0
    record = json.loads((tmp_path / "r/run.json").read_text())
    digest = hashlib.sha256()
    for name, content in FILES.items():
        fact = zlib.crc32(content) if form == "zip" else len(content)
        digest.update(f"{name} {fact}\n".encode())
    digest.update(repr(LABELS).encode())
    for mark, code in ((digest.hexdigest()[:16], 0), ("0" * 16, 2)):
        assert mark != record["data"]["fingerprint"]
        changed = {**record, "data": {**record["data"], "fingerprint": mark}}
        (tmp_path / "r/run.json").write_text(json.dumps(changed))
        assert cmtool(*TRAIN, *steps, "--resume").code == code


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "parquet"])
def test_two_processes_that_stream_are_one_with_two_rounds(form, tmp_path):
    path = str(FORMS[form](tmp_path))
    arguments = [*TRAIN, "--data", path, "--set", "train.steps=3", "--out"]
    jobs = [
        {"processes": 2, "arguments": [*arguments, str(tmp_path / "two")]},
        {"processes": 1, "arguments": [*arguments, str(tmp_path / "one"), "--accumulate", "2"]},
    ]
    ends, _, stderr = run(*({**job, "bare": True, "stream": True} for job in jobs))
    assert [codes for codes, _ in ends] == [[0, 0], [0]], stderr
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.fixture
def of_kinds(cmtool, tmp_path, bare_runs):
    """A run whose training images have classes with names."""
    command = [*TRAIN, "--data", as_shards(tmp_path), "--set", "train.steps=1", "--out", "r"]
    result = cmtool(*command)
    assert result.code == 0, result.err
    return tmp_path / "r"


def test_a_class_is_asked_for_by_its_name(cmtool, tmp_path, of_kinds):
    draw = ["sample", "-c", "r", "--seeds", "0-1", "--device", "cpu", "--out"]
    for name, number in (("dog", "1"), ("dog,cat", "1,0"), ("dog, 0", "1,0")):
        assert cmtool(*draw, "a.png", "--overwrite", "--class", name).code == 0
        assert cmtool(*draw, "b.png", "--overwrite", "--class", number).code == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    refused = cmtool(*draw, "c.png", "--class", "dgo")
    assert refused.code == 2
    assert "the model has no class 'dgo'" in refused.err
    assert "did you mean 'dog'?" in refused.err
    assert cmtool(*draw, "c.png", "--class", "3").code == 2
    numbers = cmtool("sample", "-c", "digits-cd", "--class", "dog", "--out", "c.png")
    assert "knows its classes by number alone" in numbers.err
    assert json.loads(cmtool("checkpoint", "info", "r", "--json").out)["class_names"] == [*KINDS]
    assert list(_completion.known_classes(Line({"checkpoint": "r"}))) == [*KINDS]


class Line:
    def __init__(self, params):
        self.params = params


def test_edits_take_a_class_by_name(cmtool, tmp_path, of_kinds):
    picture = str(as_folder(tmp_path) / "fox/011.png")
    edit = ["edit", "inpaint", picture, "--box", "1,1,3,3", "-c", "r", "--device", "cpu", "--out"]
    assert cmtool(*edit, "a.png", "--class", "dog").code == 0
    assert cmtool(*edit, "b.png", "--class", "1").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for given in ("dog,cat", "dgo"):
        assert cmtool(*edit, "c.png", "--class", given).code == 2


def test_names_of_classes_go_with_the_weights(cmtool, tmp_path, of_kinds):
    assert cmtool("checkpoint", "convert", "r", "m.safetensors").code == 0
    assert load_model(tmp_path / "m.safetensors").class_names == KINDS
    for file in (of_kinds / "checkpoints").rglob("*.safetensors"):
        assert b"class_names" in file.read_bytes() or file.stem in ("optimizer", "method")


def test_names_of_a_run_of_version_0_1_are_in_its_record(tmp_path, of_kinds, monkeypatch):
    monkeypatch.setattr("cmtool.models.class_names_in", FromRecord(("class_names", "versions")))
    assert load_model(of_kinds).class_names == KINDS


class FromRecord:
    """What reads names of classes only where it is asked about a run.json."""

    def __init__(self, keys):
        self.keys = keys

    def __call__(self, about):
        return tuple(about["class_names"]) if all(key in about for key in self.keys) else ()


def prefixed(root):
    (root / "pets").mkdir()
    for (name, content), label in zip(FILES.items(), LABELS, strict=True):
        (root / "pets" / f"{KINDS[label]}_{name[-7:]}").write_bytes(content)
    return "pets"


def test_the_note_about_prefixes_names_commands_that_work(cmtool, tmp_path):
    told = cmtool("data", "info", prefixed(tmp_path))
    assert told.code == 0
    assert "cmtool data info pets --labels prefix. In training, add --set data.labels" in told.err
    facts = json.loads(cmtool("data", "info", "pets", "--labels", "prefix", "--json").out)
    assert (facts["classes"], facts["class_names"]) == (3, [*KINDS])
    assert cmtool("data", "prepare", "pets", "p.zip", "--labels", "prefix").code == 0
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert [label for _, label in labels] == LABELS
    made = cmtool("preset", "new", "--data", "pets", "--labels", "prefix", "--hours", "0")
    assert made.code == 0, made.err
    text = Path("pets-edm.toml").read_text()
    assert 'labels = "prefix"' in text
    assert "num_classes = 3" in text
    dry = ["train", "--data", "pets", "--set", "train.steps=9", "--dry-run", "--device", "cpu"]
    assert "num_classes = 3" in cmtool(*dry, "--set", "data.labels=prefix").text
    assert "num_classes = 0" in cmtool(*dry).text


@pytest.mark.parametrize("preset", ["digits-edm", "edm"])
def test_a_wrong_rule_is_refused_before_the_run(preset, cmtool, tmp_path):
    command = ["train", "--preset", preset, "--data", prefixed(tmp_path), "--dry-run"]
    refused = cmtool(*command, "--set", "data.labels=prefx", "--set", "train.steps=1")
    assert refused.code == 3
    assert "data.labels = 'prefx'" in refused.err
    assert "did you mean 'prefix'?" in refused.err
    known = ["train", "--preset", preset, "--data", as_parquet(tmp_path), "--dry-run"]
    named = cmtool(*known, "--set", "data.labels=label", "--set", "train.steps=1")
    assert named.code == 0, named.err


def test_a_column_is_chosen_as_the_hint_says(cmtool, tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"left": list(FILES.values()), "right": list(FILES.values()), "kind": LABELS}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    refused = cmtool("data", "info", "x.parquet")
    assert refused.code == 3
    assert "choose one: cmtool data info x.parquet --column left." in refused.err
    chosen = ["--column", "left", "--labels", "kind"]
    facts = json.loads(cmtool("data", "info", "x.parquet", *chosen, "--json").out)
    assert (facts["images"], facts["images_per_class"]) == (N, [4, 4, 4])
    assert cmtool("data", "prepare", "x.parquet", "x.zip", *chosen).code == 0
    assert torch.equal(load_dataset(str(tmp_path / "x.zip")).images, PICTURES)


def test_a_pickle_in_a_tar_is_left_out_of_what_is_prepared(cmtool, tmp_path):
    import tarfile

    path = as_tar(tmp_path)
    with tarfile.open(path, "a") as archive:
        member(archive, "0.pickle", b"cos\nsystem\n(S'touch canary'\ntR.")
    told = cmtool("data", "prepare", path, "x.zip")
    assert told.code == 0
    assert "1 other files are left out: 1 .pickle" in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.zip"]
