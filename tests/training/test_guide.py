"""What a report tells people: what was done, what is good, what to type next."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from cmtool.core.methods import METHODS, MethodRow
from cmtool.data.datasets import Dataset, examples, load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.presets.toml import load_preset, resolve, to_toml
from cmtool.training.folder import clear_run
from cmtool.training.guide import GOOD_LOSS, good_loss, next_commands, short
from cmtool.training.records import Record, Status
from cmtool.training.report import TRAINING_IMAGES, write_run_report
from tests.test_readme import parse

OWN = "my images/it's"


def preset_of(name, **overrides):
    return load_preset(name, {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_a_good_loss_is(name):
    assert METHODS[name].good_loss.endswith(".")
    preset = SimpleNamespace(loss=SimpleNamespace(method=SimpleNamespace(name=name)))
    assert good_loss(preset) == METHODS[name].good_loss


def test_a_method_without_a_word_has_a_general_one(monkeypatch):
    monkeypatch.setitem(METHODS, "denoising", MethodRow(None, "teacher"))
    assert good_loss(preset_of("digits-edm")) == good_loss(None) == GOOD_LOSS


@pytest.mark.parametrize(
    "name", ["digits-edm", "digits-cd", "digits-ct", "digits-ect", "digits-pd"]
)
def test_every_proposed_command_can_be_typed(name, tmp_path):
    for state, path in itertools.product(["done", "stopped", "killed"], ["digits", OWN]):
        preset = preset_of(name, data__path=path)
        found = next_commands(tmp_path / "a run's", preset, Status(state=state))
        assert found
        for command in found:
            parse(command.line)


def test_what_comes_next_depends_on_what_was_made(tmp_path):
    def lines(name, state="done", **overrides):
        found = next_commands(tmp_path, preset_of(name, **overrides), Status(state=state))
        return [command.line for command in found]

    assert lines("digits-edm")[0] == f"cmtool distill --teacher {tmp_path}"
    own = lines("digits-edm", data__path=OWN)
    assert own[0].endswith("""--data 'my images/it'"'"'s'""")
    assert "--reference" in own[-1]
    assert [line.split()[1] for line in lines("digits-cd")] == ["sample", "edit", "eval"]
    assert [line.split()[1] for line in lines("digits-pd")] == ["sample", "eval"]
    assert lines("digits-cd", "stopped") == [f"cmtool distill --resume --out {tmp_path}"]
    assert lines("digits-ct", "failed") == [f"cmtool train --resume --out {tmp_path}"]
    assert lines("digits-ct", "running") == []
    assert next_commands(tmp_path, None, Status(state="done")) == []


def report(out, preset="digits-cd", **record):
    """The page of a run that is done, from a folder made by hand, in one line."""
    out.mkdir(parents=True, exist_ok=True)
    resolved = resolve(preset, {})
    (out / "preset.toml").write_text(to_toml(resolved.preset, resolved.origins))
    facts = {"versions": {"cmtool": "1"}, "data": None, **record}
    (out / "run.json").write_text(json.dumps(facts))
    (out / "status.json").write_text(json.dumps({"state": "done", "step": 3, "steps": 3}))
    write_run_report(out)
    return " ".join((out / "report.html").read_text().split())


DATA = {"name": "<images>", "images": 3, "fingerprint": "0"}


def test_a_report_says_what_was_distilled_and_shows_what_was_learned_from(tmp_path):
    (tmp_path / "r").mkdir()
    picture = png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8))
    (tmp_path / "r" / TRAINING_IMAGES).write_bytes(picture)
    page = report(
        tmp_path / "r", data=DATA, teacher={"source": "runs/a&b", "sha256": ""},
        class_names=["cat", "<b>dog"],
    )  # fmt: skip
    assert "<h1>Run r: consistency distillation of runs/a&amp;b on &lt;images&gt;</h1>" in page
    assert ">training images</figcaption>" in page
    assert "Classes in turn, row by row: cat, &lt;b&gt;dog." in page
    assert METHODS["consistency_distillation"].good_loss in page
    assert f"<code>cmtool eval fid -c {tmp_path}/r</code>" in page
    assert set(re.findall(r'src="(.{15})', page)) == {"data:image/png;"}


def test_a_student_that_starts_from_a_teacher_is_from_it(tmp_path):
    page = report(tmp_path / "r", "digits-ect", teacher={"source": "x" * 99, "sha256": ""})
    assert f"Run r: consistency training from ...{'x' * 27}<" in page


def test_names_that_are_no_text_are_shown_all_the_same(tmp_path):
    name = b"\xff<r".decode(errors="surrogateescape")
    assert "Run \\udcff&lt;r" in report(tmp_path / name)
    assert short(name) == "\\udcff<r"
    assert short(f"{'a' * 50}{name}").endswith("a\\udcff<r")


def test_overwriting_a_run_removes_its_training_images(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / TRAINING_IMAGES).write_bytes(b"")
    clear_run(tmp_path)
    assert not (tmp_path / TRAINING_IMAGES).exists()


def dataset(labels, num_classes):
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Dataset("x", images, torch.tensor(labels), num_classes)


def test_examples_are_of_the_classes_in_turn():
    found = examples(dataset([2, 0, 0, 2, 0], 3), 8).flatten().tolist()
    assert found == [1, 255, 0, 2, 255, 3, 4, 255]  # class 1 has none, class 0 three
    assert examples(dataset([1, 0, 1], 2), 1).flatten().tolist() == [1]
    assert examples(dataset([0], 1), 3).flatten().tolist() == [0, 0, 0]


def test_examples_without_classes_are_spread():
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    found = examples(Dataset("x", images, None, 0), 4).flatten().tolist()
    assert found == [0, 25, 50, 75]
    assert len(examples(Dataset("x", images[:2], None, 0), 4)) == 4


def test_the_digits_are_named():
    assert load_dataset("digits").class_names[9] == "9"


def test_a_record_of_an_older_run_names_no_classes():
    assert Record.model_validate({"versions": {"cmtool": "0.1"}}).class_names == []
