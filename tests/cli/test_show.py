"""--show: what a terminal gets, read back as pictures."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli import _show
from cmtool.data.drawing import contact_sheet, narrowed, png_bytes


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator))


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80x24 in full colour without a protocol for images."""
    stream = Terminal()
    monkeypatch.setattr(_show, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (80, 24))
    for name in ("TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    return stream


def pixels(text):
    """The colours of a drawing of half blocks, (H, W, 3)."""
    rows = []
    for line in text.splitlines():
        cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(\u2580+)", line)
        both = [(c[:3], c[3:6]) for c in cells for _ in c[6]]
        rows += [[upper for upper, _ in both], [lower for _, lower in both]]
    return np.array(rows).astype(int)


def test_half_blocks_are_the_pixels(terminal, pictures):
    _show.show(pictures)
    drawn = pixels(terminal.getvalue())
    assert drawn.shape[1] == 8 * 9 + 1  # as many beside each other as fit into 80 columns
    for number, picture in enumerate(pictures):
        top, left = 1 + number // 8 * 9, 1 + number % 8 * 9
        assert (drawn[top : top + 8, left : left + 8] == picture.permute(1, 2, 0).numpy()).all()


def test_a_picture_that_is_too_wide_is_narrowed():
    wide = np.arange(4 * 12 * 3, dtype=np.uint8).reshape(4, 12, 3)
    assert narrowed(wide, 12) is wide
    small = narrowed(wide, 6)
    assert small.shape == (2, 6, 3)
    assert abs(int(small[0, 0, 0]) - wide[:2, :2, 0].mean()) <= 1


@pytest.mark.parametrize(
    ("variables", "protocol"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM_PROGRAM": "vscode"}, None),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "socket,1,0"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "screen-256color"}, None),
        ({}, None),
    ],
)
def test_the_protocol_is_what_the_terminal_says(variables, protocol):
    assert _show.image_protocol(variables) == protocol


@pytest.mark.parametrize(("name", "value"), [("KITTY_WINDOW_ID", "1"), ("TERM_PROGRAM", "WezTerm")])
def test_a_protocol_carries_the_png(terminal, pictures, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    pictures = [picture.repeat(1, 4, 4) for picture in pictures]  # more than one chunk
    _show.show(pictures)
    text = terminal.getvalue()
    kitty = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    iterm = re.findall(r"\x1b\]1337;File=inline=1;size=\d+:([^\a]*)\a", text)
    goes_on = [head.split(",")[-1] for head, _ in kitty]
    assert goes_on == ["m=1"] * (len(kitty) - 1) + ["m=0"] * bool(kitty)
    content = base64.standard_b64decode("".join(part for _, part in kitty) or iterm[0])
    assert content == png_bytes(contact_sheet(torch.stack(pictures)))
    Image.open(io.BytesIO(content)).load()


def test_where_there_is_no_terminal_or_no_colour_a_note_says_so(
    terminal, pictures, monkeypatch, capsys
):
    monkeypatch.setenv("NO_COLOR", "1")
    _show.show(pictures)
    assert "needs colours" in capsys.readouterr().err
    terminal.isatty = lambda: False
    _show.show(pictures)
    assert "stderr is none" in capsys.readouterr().err
    assert not terminal.getvalue()


def test_sample_and_edit_show_what_they_write(terminal, tmp_path):
    from cmtool.cli import main

    out, one = tmp_path / "a.png", tmp_path / "one/seed000000.png"
    sample = ["sample", "-c", "digits-cmt", "--seeds", "0", "--out", str(one.parent)]
    edit = ["edit", "colorize", "-c", "digits-cmt", str(one), "--out", str(out)]
    for words in (sample, sample, edit):  # the second finds its file there
        terminal.truncate(terminal.seek(0))
        with pytest.raises(SystemExit) as end:
            main([*words, "--show"])
        assert not end.value.code
        drawn = pixels(terminal.getvalue())[1:9, 1:9]
        written = np.asarray(Image.open(out if words is edit else one))
        assert (drawn == written).all()


@pytest.mark.parametrize("columns", [0, None])
def test_a_terminal_that_does_not_say_its_size_counts_as_one_of_80_columns(
    terminal, pictures, monkeypatch, columns
):
    def size(*_):
        if columns is None:
            raise OSError("Inappropriate ioctl for device")
        return columns, 0

    monkeypatch.setattr("os.get_terminal_size", size)
    _show.show(pictures)
    assert pixels(terminal.getvalue()).shape[1] == 8 * 9 + 1
