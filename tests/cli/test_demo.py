"""The tour: each of its commands runs and leaves what it promises."""

import os
from pathlib import Path

import pytest

from cmtool.cli import demo


@pytest.fixture
def tour(cmtool, tmp_path, monkeypatch):
    """The folder of a tour: that of CMTOOL_TOUR, where one was taken, else of a few steps."""
    if "CMTOOL_TOUR" in os.environ:
        return Path(os.environ["CMTOOL_TOUR"])
    run = demo.Tour.run

    def quick(self, command, *arguments):
        few = ["--set", "train.steps=2", "--device", "cpu"] if command == "distill" else []
        return run(self, command, *arguments, *few)

    monkeypatch.setattr(demo.Tour, "run", quick)
    monkeypatch.setattr(demo, "NUM", "40")
    done = cmtool("demo", "--out", "tour")
    assert done.code == 0, done.err
    assert done.text == "tour/report.html\n"
    return tmp_path / "tour"


@pytest.mark.slow
def test_the_tour_ends_with_its_report_and_is_never_replaced_unasked(cmtool, tour):
    left = {path.name for path in tour.iterdir()}
    assert left >= {
        "report.html",
        "teacher.png",
        "one-step.png",
        "two-steps.png",
        "digit-inpainting.png",
        "emoji-inpainting.png",
    }
    report = (tour / "report.html").read_text()
    assert "student, 2 steps" in report
    again = cmtool("demo", "--out", tour)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert (tour / "report.html").read_text() == report
