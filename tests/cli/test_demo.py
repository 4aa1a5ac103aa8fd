"""The tour, with a few steps and images: each of its commands runs and leaves what it promises."""

import pytest

from cmtool.cli import demo


@pytest.mark.slow
def test_the_tour_ends_with_its_report(cmtool, tmp_path, monkeypatch):
    run = demo.Tour.run

    def quick(self, command, *arguments):
        few = ["--set", "train.steps=2", "--device", "cpu"] if command == "distill" else []
        return run(self, command, *arguments, *few)

    monkeypatch.setattr(demo.Tour, "run", quick)
    monkeypatch.setattr(demo, "NUM", "40")
    done = cmtool("demo", "--out", "tour")
    assert done.code == 0, done.err
    assert done.text == "tour/report.html\n"
    left = {path.name for path in (tmp_path / "tour").iterdir()}
    assert left >= {"report.html", "teacher.png", "one-step.png", "two-steps.png", "inpainting.png"}
    report = (tmp_path / "tour" / "report.html").read_text()
    assert "student, 2 steps" in report
    again = cmtool("demo", "--out", "tour")
    assert again.code == 2
    assert "--overwrite" in again.err
