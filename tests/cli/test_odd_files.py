"""Pipes, devices and sparse files of gigabytes where a command expects a file: no wait, no read."""

import io
import json
import os
import sys

import pytest
import torch

from cmtool.cli._output import read_stdin
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError

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


@pytest.mark.parametrize("line", ["d.png\0d.png", "fifo", "x"])
def test_a_list_of_what_is_no_file_names_it(cmtool, tmp_path, line):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "x").mkdir()
    (tmp_path / "d.png").write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    result = cmtool("eval", "fid", "-", stdin=f"d.png\n{line}\n".encode())
    assert result.code == 3
    assert ("NUL bytes" if "\0" in line else f"error: {line} ") in result.err


@pytest.mark.parametrize("command", [["eval", "fid", "-"], ["edit", "colorize"]])
def test_a_stream_without_end_is_left(cmtool, monkeypatch, command):
    monkeypatch.setattr("cmtool.data.decoding.MAX_FILE", 1000)
    result = cmtool(*command, stdin=bytes(1001))
    assert result.code == 3
    assert "more than 1,000 bytes on stdin" in result.err


def test_a_stdin_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    with (tmp_path / "x").open("wb") as file:
        reader = io.BufferedReader(io.FileIO(file.fileno(), closefd=False))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(reader))
        with pytest.raises(InputError, match="cannot read stdin: Bad file descriptor"):
            read_stdin()


def test_names_that_are_no_text_are_told_in_every_output(cmtool, tmp_path):
    folder = os.fsencode(tmp_path / "x") + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"good.png", b"b\xff\x1b.png"):
        with open(folder + b"/" + name, "wb") as file:
            picture = png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8))
            file.write(picture if name == b"good.png" else b"bad")
    told = cmtool("data", "info", "x", "--json")
    assert told.code == 3
    (bad,) = json.loads(told.out)["unreadable"]
    assert "x/caf\udce9/b\udcff\x1b.png is not an image" in bad
    for command in (["data", "info", "x"], ["data", "prepare", "x", "y.zip"], ["eval", "fid", "x"]):
        result = cmtool(*command)
        assert result.code == 3
        assert "b\\udcff\\x1b.png is not an image" in result.err + result.text
    os.rename(folder + b"/good.png", folder + b"/" + "caf\u00e9.png".encode("latin-1"))
    made = cmtool("edit", "colorize", os.fsdecode(folder + b"/caf\xe9.png"), "-c", "digits-cd",
                  "--steps", "1", "--out", os.fsdecode(b"o\xff.png"))  # fmt: skip
    assert (made.code, made.out) == (0, b"o\xff.png\n"), made.err
