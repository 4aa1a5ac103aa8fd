"""Pipes, devices and sparse files of gigabytes where a command expects a file: no wait, no read."""

import os

import pytest
import torch

from cmtool.data.drawing import png_bytes

ODD = {
    "a fifo": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "20 GiB of nothing": lambda path: (path.touch(), os.truncate(path, 20 << 30)),
}
PLACES = {
    "x/odd.png": ["data", "info", "x"],
    "x/labels.csv": ["data", "info", "x"],
    "x/dataset.json": ["data", "prepare", "x", "y.zip"],
    "odd": ["data", "info", "odd"],
    "odd.npz": ["data", "info", "odd.npz"],
    "odd.png": ["edit", "colorize", "odd.png"],
    "mask.png": ["edit", "inpaint", "d.png", "--mask", "mask.png"],
    "e.png": ["edit", "interpolate", "d.png", "e.png", "--out", "o.png"],
    "b.png": ["eval", "fid", "-"],
    "ref.npz": ["eval", "fid", "x", "--reference", "ref.npz"],
    "ref.pkl": ["eval", "fid", "x", "--reference", "ref.pkl"],
    "odd.toml": ["preset", "show", "./odd.toml"],
    "base.toml": ["preset", "show", "./child.toml"],
    "model.pt": ["sample", "-c", "model.pt", "--seeds", "0"],
    "levels.json": ["search", "-c", "digits-cd", "--steps", "2", "--out", "levels.json"],
    "s/seed000000.png": ["sample", "-c", "digits-cd", "--seeds", "0", "--out", "s"],
}
WRITTEN = {"s/seed000000.png": "holds another image", "levels.json": "no earlier search"}
"""What a command writes: it must be given another name, which is wrong usage."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", PLACES)
def test_an_odd_file_is_named_at_once(cmtool, tmp_path, place, name):
    (tmp_path / "s").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "child.toml").write_text("extends = 'base'")
    picture = png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8))
    for path in ("d.png", "x/a.png", "x/b.png"):
        (tmp_path / path).write_bytes(picture)
    ODD[name](tmp_path / place)
    result = cmtool(*PLACES[place], stdin=b"d.png\nb.png\n")
    assert result.code == (2 if place in WRITTEN else 3), result.err
    error, hint = result.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert WRITTEN.get(place, place) in result.err + result.text


@pytest.mark.parametrize("command", [["eval", "fid", "-"], ["edit", "colorize"]])
def test_a_stream_without_end_is_left(cmtool, monkeypatch, command):
    monkeypatch.setattr("cmtool.data.decoding.MAX_FILE", 1000)
    result = cmtool(*command, stdin=bytes(1001))
    assert result.code == 3
    assert "more than 1,000 bytes on stdin" in result.err
