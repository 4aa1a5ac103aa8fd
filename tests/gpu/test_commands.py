"""Commands on the pretended card: they end well, so no tensor was on the wrong side."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli.edit import EDITS

pytestmark = pytest.mark.pretend_gpu

CARD = ["--device", "cuda"]
STUDENT = ["-c", "digits-cd", *CARD]
TEACHER = ["-c", "digits-edm", *CARD]
OF_EDITS = {
    "colorize": [],
    "deblur": ["--gaussian", "1.0"],
    "denoise": [],
    "inpaint": ["--box", "4,0,4,8"],
    "outpaint": ["--by", "4"],
    "stroke": [],
    "superres": ["--factor", "2"],
    "variations": [],
}
"""What each edit needs beside a picture."""
EVALUATIONS = {
    "fid": ["eval", "fid", *STUDENT, "--num", "24"],
    "fid of a teacher": ["eval", "fid", *TEACHER, "--num", "24"],
    "kid": ["eval", "kid", *STUDENT, "--num", "24"],
    "precision and recall": ["eval", "pr", *STUDENT, "--num", "24"],
    "consistency": ["eval", "consistency", *STUDENT],
}
FEW = str(1 << 27)
"""Bytes of a small card: enough for the digits' models, and not for a thousand images at once."""


@pytest.fixture
def picture(tmp_path):
    """Write a picture of the model's size into the folder of the commands."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    return "a.png"


def assert_done(result):
    assert (result.code, "error" in result.err) == (0, False), result.err
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sampling(precision, cmtool):
    seeds = ["--seeds", "0-5", "--precision", precision]
    assert_done(cmtool("sample", *STUDENT, *seeds, "--out", "o"))
    assert_done(cmtool("sample", *TEACHER, "--seeds", "0-5", "--steps", "4", "--out", "grid.png"))


def test_every_edit_is_here():
    assert OF_EDITS.keys() == EDITS.keys()


@pytest.mark.parametrize("edit", sorted(OF_EDITS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_edits(edit, precision, picture, cmtool):
    more = [*OF_EDITS[edit], *STUDENT, "--precision", precision]
    assert_done(cmtool("edit", edit, picture, *more, "--out", "o.png"))
    assert_done(cmtool("edit", edit, picture, *more, "--class", "3", "--out", "class.png"))


def test_interpolation_between_pictures_and_between_seeds(picture, cmtool):
    assert_done(cmtool("edit", "interpolate", picture, "b.png", *STUDENT, "--out", "pictures.png"))
    assert_done(cmtool("edit", "interpolate", "--seeds", "3,7", *STUDENT, "--out", "seeds.png"))


@pytest.mark.parametrize("name", sorted(EVALUATIONS))
def test_evaluation(name, cmtool):
    json.loads(assert_done(cmtool(*EVALUATIONS[name])).text)


def test_the_search_for_levels(cmtool):
    search = ["search", *STUDENT, "--steps", "2", "--num", "24", "--out", "levels.json"]
    assert_done(cmtool(*search))


def test_a_card_that_is_not_there_is_told_in_two_lines(cmtool):
    result = cmtool("sample", "-c", "digits-cd", "--device", "cuda:9", "--out", "o.png")
    assert result.code == 2
    assert [line.split(":")[0] for line in result.err.splitlines()[-2:]] == ["error", "hint"]


def test_a_batch_too_large_for_the_card_is_drawn_in_parts_or_told(cmtool, monkeypatch):
    torch.cuda.empty_cache()
    monkeypatch.setenv("PRETEND_GPU_BYTES", FEW)
    many = ["--seeds", "0-4095", "--batch", "4096", "--out", "o.npz"]
    result = cmtool("sample", *STUDENT, *many)
    assert result.code in (0, 5), result.err
    assert "Traceback" not in result.err
