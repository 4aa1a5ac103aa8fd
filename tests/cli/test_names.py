"""Names and words from elsewhere: bytes that are not UTF-8, escape sequences, dollars."""

import html
import io
import os
import sys
import tomllib

import pytest
import torch
from matplotlib.figure import Figure

from cmtool.cli._output import shown
from cmtool.cli._watching import BarWatcher
from cmtool.data.drawing import png_bytes
from cmtool.presets.toml import load_preset, to_toml
from cmtool.system.text import printable
from cmtool.training.plots import Curve, Plot, svgs, write_curves, write_plots, write_summary
from cmtool.training.report import write_run_report
from tests.cli.conftest import TINY

BYTES = os.fsdecode(b"caf\xe9")
"""A name as Latin-1 has it."""
STRANGE = {
    "escape": "\x1b[2Jgone",
    "C1": "\x9b2Jgone",
    "bell": "\x07",
    "bidi": "\u202egnp.exe",
    "isolate": "\u2067x",
    "newline": "a\nerror: b",
    "return": "a\rb",
    "zero width": "a\u200bb",
    "not UTF-8": BYTES,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_message_shows_strange_characters_escaped(kind):
    told = shown(f"before {STRANGE[kind]} after")
    assert told.isprintable()
    assert told.startswith("before ")
    assert told.endswith(" after")
    assert "\\" in told


@pytest.mark.parametrize("kind", STRANGE)
def test_the_name_of_a_missing_model_is_shown_escaped(cmtool, kind):
    result = cmtool("sample", "-c", STRANGE[kind])
    assert result.code == 3
    first, second = result.err.splitlines()
    assert first.startswith("error: no model '")
    assert first.isprintable()
    assert second.startswith("hint: ")


def test_a_run_folder_whose_name_is_not_utf8_is_refused_at_once(cmtool, tmp_path):
    """Its weights could be written, and not read again."""
    for how in ([], ["--resume"], ["--overwrite"]):
        result = cmtool("train", *TINY, "--out", f"out/{BYTES}", *how)
        assert result.code == 2, result.err
        assert "error: the name of the run folder 'out/caf\\udce9' is not UTF-8" in result.err
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8_are_printed_byte_for_byte(cmtool):
    for text in ("", "2 of 2 images are there already"):
        drawn = cmtool("sample", "-c", "digits-cd", "--seeds", "0-1", "--out", f"{BYTES}s")
        assert drawn.code == 0, drawn.err
        assert drawn.out.splitlines() == [b"caf\xe9s/seed%06d.png" % seed for seed in (0, 1)]
        assert text in drawn.err


@pytest.mark.parametrize("kind", STRANGE)
def test_a_report_of_a_folder_of_any_name_is_written(tmp_path, kind):
    out = tmp_path / STRANGE[kind]
    out.mkdir()
    write_run_report(out)
    assert shown(out.name) in html.unescape((out / "report.html").read_text())


def test_data_whose_name_is_not_utf8_are_refused_at_once(cmtool, tmp_path):
    (tmp_path / BYTES).mkdir()
    (tmp_path / BYTES / "a.png").write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    for more in ([], ["--dry-run"]):
        result = cmtool("train", *TINY, "--data", BYTES, "--out", "r", *more)
        assert result.code == 2, result.err
        assert "error: data.path = 'caf\\udce9' is not UTF-8" in result.err
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", STRANGE)
def test_where_a_value_came_from_is_a_comment_whatever_the_name(kind):
    preset = load_preset("digits-ct")
    text = to_toml(preset, {"train.lr": STRANGE[kind], "model": f"teacher {STRANGE[kind]}"})
    assert tomllib.loads(text.encode().decode()) == tomllib.loads(to_toml(preset))


LETTERS = "\u6570\u5b57"
"""matplotlib's own font lacks them."""
DOLLARS = [
    "$x", "$$", "$\\frac{$", "costs $5 or $6", "\\$", "a_b^c $\\alpha", LETTERS, *STRANGE.values()
]  # fmt: skip


@pytest.mark.parametrize("words", DOLLARS)
def test_words_are_drawn_as_they_are(tmp_path, words):
    log = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    images = {words: torch.zeros(2, 3, 8, 8)}
    write_summary(tmp_path / "s.png", log, images, words)
    write_curves(tmp_path / "c.png", {words: [(1, 2), (2, 3)]}, words, words)
    plot = Plot(words, [Curve(words, [1, 2], [1.0, 2.0]), Curve("b", [1], [2.0])])
    write_plots(tmp_path / "m.png", [plot])
    (page,) = svgs([plot])
    assert printable(words) in page


def test_a_name_that_begins_with_a_line_stands_in_the_legend(monkeypatch, tmp_path):
    """matplotlib leaves such names out, as those of curves of no interest."""
    told = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: told.append(figure))
    write_curves(tmp_path / "c.png", {"_mine": [(1, 2), (2, 3)], "b": [(1, 1), (2, 2)]}, "x", "y")
    legend = told[0].axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_mine", "b"]


def test_a_description_with_dollars_ends_no_run(cmtool, tmp_path):
    preset = cmtool("preset", "show", "digits-ct").text
    first = next(line for line in preset.splitlines() if line.startswith("description"))
    strange = 'description = "costs $\\\\frac{ \\u001b[2J and $"'
    (tmp_path / "mine.toml").write_text(preset.replace(first, strange))
    result = cmtool("train", "--preset", "mine.toml", *TINY, "--set", "train.steps=1", "--out", "r")
    assert result.code == 0, result.err
    assert "cannot be written" not in result.err
    assert (tmp_path / "r/summary.png").exists()


@pytest.mark.parametrize("kind", STRANGE)
def test_a_note_above_a_bar_is_shown_escaped(monkeypatch, kind):
    seen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", seen)
    watcher = BarWatcher(7)
    watcher.live.console.width = 200
    watcher.note(f"[bold]before {STRANGE[kind]}")
    (line,) = seen.getvalue().splitlines()
    assert line.startswith("[bold]before ")
    assert line.isprintable()
