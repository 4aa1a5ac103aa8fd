"""What the page answers is what the shown command makes, byte for byte."""

import base64
import resource
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from cmtool.data.decoding import read_image
from cmtool.errors import InputError, UserError
from cmtool.models import ASSETS
from cmtool.page.asked import AskedEdit, AskedHarm, AskedMorph, AskedSamples
from cmtool.page.desk import Desk, Interrupted
from cmtool.page.rows import EDITS
from cmtool.system.files import file_facts, write_json

MASK = torch.zeros(8, 8, dtype=torch.uint8)
MASK[:, 4:] = 255


def bytes_of(text):
    return base64.b64decode(text)


def typed(cmtool, command, files):
    """What a shell makes of the command that the page shows, beside the files that it names."""
    for name, content in files.items():
        Path(name).write_bytes(bytes_of(content))
    program, *words = shlex.split(command)
    result = cmtool(*words)
    assert (program, result.code) == ("cmtool", 0), result.err
    return Path(words[-1]).read_bytes()


def asked(name, digit, **more):
    picture = digit
    mask = MASK.numpy().tobytes() if EDITS[name].draws == "mask" else None
    return AskedEdit.model_construct(edit=name, picture=picture, mask=mask, **more)


@pytest.mark.parametrize("name", EDITS)
def test_the_command_of_an_edit_makes_its_bytes(name, desk, digit, cmtool):
    steps = [1, 3] if EDITS[name].has_steps else [None]
    amount = 1.0 if name == "outpaint" else None
    made = desk.edit(asked(name, digit, steps=steps, seed=5, amount=amount))
    assert len(made["answers"]) == len(steps)
    for number, answer in enumerate(made["answers"]):
        assert answer["steps"] == (steps[number] or len(answer["way"]))
        assert typed(cmtool, answer["command"], made["files"]) == bytes_of(answer["png"])


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("inpaint", {"variations": 3, "label": 7, "steps": [2]}),
        ("denoise", {"amount": 0.25}),
        ("variations", {"amount": 3.0, "variations": 2}),
        ("superres", {"amount": 4.0, "steps": [None]}),
    ],
)
def test_so_it_does_with_every_control_turned(name, more, desk, digit, cmtool):
    made = desk.edit(asked(name, digit, **more))
    (answer,) = made["answers"]
    assert typed(cmtool, answer["command"], made["files"]) == bytes_of(answer["png"])


@pytest.mark.parametrize("label", [None, 4])
def test_the_command_of_samples_makes_their_grid(label, desk, cmtool):
    made = desk.samples(AskedSamples(first=3, count=5, sigmas=[80, 1.143], label=label))
    assert typed(cmtool, made["command"], {}) == bytes_of(made["grid"])
    assert made["labels"] == ([4] * 5 if label else made["labels"])
    single = desk.samples(AskedSamples(first=6, count=1, sigmas=[80, 1.143], label=label))
    assert single["pictures"][0] == made["pictures"][3]


def test_the_command_of_a_morph_makes_its_animation(desk, cmtool):
    made = desk.morph(AskedMorph(start=3, end=7, frames=4, sigmas=[80.0], label=2))
    assert typed(cmtool, made["command"], {}) == bytes_of(made["animation"])
    assert len(made["pictures"]) == 4


def test_known_pixels_are_those_given(desk, digit):
    made = desk.edit(asked("inpaint", digit, variations=2))
    answer = read_image(bytes_of(made["answers"][0]["png"]))
    given = read_image(bytes_of(made["files"]["picture.png"]))
    assert answer.shape == (3, 8, 16)
    for part in answer.split(8, 2):
        assert torch.equal(part[:, :, :4], given[:, :, :4])
        assert not torch.equal(part[:, :, 4:], given[:, :, 4:])
    assert bytes(given.permute(1, 2, 0).flatten().tolist()) == digit


def test_the_way_goes_from_noisy_to_clean_and_ends_in_the_answer(desk, digit):
    (answer,) = desk.edit(asked("inpaint", digit, steps=[20]))["answers"]
    levels = [step["sigma"] for step in answer["way"]]
    assert levels == sorted(levels, reverse=True)
    assert 2 <= len(levels) <= 8
    end = read_image(bytes_of(answer["way"][-1]["png"]))
    assert torch.equal(end, read_image(bytes_of(answer["png"])))


def test_a_picture_that_was_harmed_can_be_mended(desk, digit):
    for how, amount in (("noise", 0.3), ("blur", 1.0)):
        harmed = desk.harmed(AskedHarm.model_construct(picture=digit, how=how, amount=amount))
        assert bytes_of(harmed["pixels"]) != digit
        assert len(bytes_of(harmed["pixels"])) == len(digit)


@pytest.mark.parametrize("fit", ["centre", "whole"])
def test_a_picture_of_any_size_is_brought_to_the_models(fit, desk):
    from cmtool.data.drawing import png_bytes

    large = png_bytes(torch.full((3, 16, 32), 200, dtype=torch.uint8))
    got = desk.picture(large, fit)
    small = read_image(bytes_of(got["png"]))
    assert small.shape == (3, 8, 8)
    is_white = (small > 250).all(0).all(1)
    assert is_white.tolist() == [fit == "whole" and row in (0, 1, 6, 7) for row in range(8)]
    with pytest.raises(UserError, match="unknown fit"):
        desk.picture(large, "stretch")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"edit": "impaint"}, "no edit"),
        ({"picture": b"123"}, "the picture has 3 bytes, not 192"),
        ({"mask": b"123"}, "no mask of 8x8"),
        ({"mask": None}, "no mask of 8x8"),
        ({"mask": bytes(64)}, "nothing is painted"),
        ({"label": 10}, "no class 10"),
    ],
)
def test_what_cannot_be_made_is_said(change, what, desk, digit):
    request = asked("inpaint", digit).model_copy(update=change)
    with pytest.raises(UserError, match=what):
        desk.edit(request)


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("superres", 3.0),
        ("superres", 99.0),
        ("superres", 2.5),
        ("outpaint", 1.5),
        ("outpaint", 0),
        ("deblur", 4.0),
    ],
)
def test_so_is_a_number_beyond_its_range(name, amount, desk, digit):
    with pytest.raises(UserError):
        desk.edit(asked(name, digit, amount=amount))


@pytest.mark.parametrize("change", ["gone", "another", "emptied"])
def test_a_model_that_is_gone_or_another_is_said(change, desk, digit, tmp_path):
    path = tmp_path / "m.safetensors"
    shutil.copy(ASSETS / "digits-cd.safetensors", path)
    mine = Desk(desk.model, str(path))
    work = [
        lambda: mine.edit(asked("inpaint", digit)),
        lambda: mine.samples(AskedSamples(sigmas=[80.0], count=1)),
        lambda: mine.morph(AskedMorph(start=0, end=1, sigmas=[80.0], frames=2)),
    ]
    assert all(each() for each in work)
    if change == "another":
        shutil.copy(ASSETS / "digits-cmt.safetensors", path)
    else:
        path.unlink()
    if change == "emptied":
        path.mkdir()
    for each in work:
        with pytest.raises(InputError, match="another now" if change == "another" else "is gone"):
            each()


def test_work_ends_at_the_next_call_of_the_network(desk, digit):
    desk.interrupt.set()
    try:
        with pytest.raises(Interrupted):
            desk.edit(asked("inpaint", digit))
    finally:
        desk.interrupt.clear()
    assert desk.edit(asked("inpaint", digit))


def test_a_line_of_pixels_takes_no_memory(desk):
    """As large as it is in one direction: it is not filled up to a square first."""
    from cmtool.data.drawing import png_bytes

    line = png_bytes(torch.zeros(1, 1, 60_000, dtype=torch.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_image(bytes_of(desk.picture(line, "whole")["png"])).shape == (3, 8, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_the_page_is_told_what_the_model_is(desk):
    about = desk.about()
    assert (about["width"], about["height"], about["channels"]) == (8, 8, 3)
    assert about["classes"] == [str(i) for i in range(10)]
    assert [len(levels) for levels in about["levels"]] == [1, 2, 3, 4]
    assert set(about["edits"]) == set(EDITS)


def checkpoint(run, step):
    """A checkpoint of the bundled model in a run folder."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    shutil.copy(ASSETS / "digits-cd.safetensors", weights)
    write_json(folder / "manifest.json", {"files": {weights.name: file_facts(weights)}})
    return folder


def test_a_request_hashes_no_weights_and_sees_another_checkpoint(desk, tmp_path, monkeypatch):
    """With hundreds of MB each request took a second more."""
    first = checkpoint(tmp_path, 1)
    monkeypatch.setattr("cmtool.formats.checkpoints.file_sha256", lambda _: pytest.fail("hashed"))
    of_run, of_checkpoint = Desk(desk.model, str(tmp_path)), Desk(desk.model, str(first))
    assert of_run.first_seen[0] == first / "model.safetensors"
    for mine in (of_run, of_checkpoint):
        mine.check_model()
    checkpoint(tmp_path, 2)
    of_checkpoint.check_model()
    with pytest.raises(InputError, match="another now"):
        of_run.check_model()
    shutil.rmtree(tmp_path / "checkpoints")
    for mine in (of_run, of_checkpoint):
        with pytest.raises(InputError, match="is gone"):
            mine.check_model()
