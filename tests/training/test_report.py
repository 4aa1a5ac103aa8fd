import itertools
import json
import re

import pytest
import torch

from cmtool.data.drawing import png_bytes
from cmtool.training.log import scalars
from cmtool.training.plots import MAX_POINTS, curve, run_plots
from cmtool.training.report import (
    MAX_BYTES,
    MAX_FRAMES,
    Figure,
    Row,
    frames,
    write_report,
    write_run_report,
)


def line(step, **more):
    return {"step": step, "loss": 1 / step, "loss_by_sigma": {"<1": 0.5, ">1": None}, **more}


def sources(page):
    return re.findall(r'(?:src|href)="([^"]*)', page)


def test_a_curve_has_few_points_the_mean_of_all_and_the_last_step():
    points = [(step, float(step % 7)) for step in range(1, 10_001)] + [(10_001, None)]
    found = curve("x", points)
    assert len(found.values) <= MAX_POINTS
    assert found.steps[-1] == 10_000
    assert sum(found.values) / len(found.values) == pytest.approx(
        sum(v for _, v in points[:-1]) / 10_000
    )


def test_what_was_not_logged_is_not_plotted():
    assert run_plots([]) == []
    log = [line(1, n=18, mu=0.0), line(2, n=18, mu=0.0)]
    assert [plot.title for plot in run_plots(log)] == ["loss", "loss by noise level sigma"]
    log.append(line(3, n=19, eval={"metric": "m", "value": 2.0, "num": 8, "step": 3}))
    titles = [plot.title for plot in run_plots(log)]
    assert titles[2:] == ["m, lower is better", "points of the noise grid, N"]


@pytest.mark.parametrize("count", [1, 2, MAX_FRAMES, 100])
def test_frames_are_even_over_time_and_end_with_the_last(tmp_path, count):
    for step in range(10, 10 * count + 1, 10):
        (tmp_path / f"step-{step:07d}.png").write_bytes(b"")
    chosen = [step for step, _ in frames(tmp_path)]
    assert len(chosen) == min(count, MAX_FRAMES)
    assert chosen[-1] == 10 * count
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 10


def test_of_large_pictures_there_are_fewer(tmp_path):
    for step in (1, 2, 3):
        with (tmp_path / f"step-{step:07d}.png").open("wb") as file:
            file.truncate(MAX_BYTES // 2)
    assert [step for step, _ in frames(tmp_path)] == [1, 3]


def test_a_failed_run_is_reported_from_its_folder_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    picture = png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8))
    (tmp_path / "samples/step-0000002.png").write_bytes(picture)
    (tmp_path / "log.jsonl").write_text(json.dumps(line(2)) + "\n" + '{"step": 4, "lo')
    (tmp_path / "preset.toml").write_text('description = "<script>alert(1)</script>"')
    state = {"state": "failed", "step": 2, "steps": 9, "exit_code": 6, "error": "not finite"}
    (tmp_path / "status.json").write_text(json.dumps(state))
    write_run_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<b>failed</b>" in page
    assert "exit code 6: not finite" in page
    assert "<script>" not in page
    assert [source[:15] for source in sources(page)] == ["data:image/svg+"] * 2 + [
        "data:image/png;"
    ]


def test_the_page_of_the_tour_needs_nothing_else(tmp_path):
    (tmp_path / "a.png").write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    rows = [Row("teacher", 35, 1.434), Row("held out", None, 3.6)]
    figures = [Figure("a & b", tmp_path / "a.png")]
    write_report(tmp_path / "p.html", rows=rows, figures=figures, commands=["cmtool x"], seconds=7)
    page = (tmp_path / "p.html").read_text()
    assert [source[:15] for source in sources(page)] == ["data:image/png;"]
    for part in ("<title>cmtool demo", "<td>35</td>", "<td>1.43</td>", "<td>-</td>", "a &amp; b"):
        assert part in page


def test_an_empty_folder_has_a_report(tmp_path):
    write_run_report(tmp_path)
    assert "Nothing was logged yet" in (tmp_path / "report.html").read_text()


def test_event_names_are_what_tensorboard_takes():
    found = dict(scalars(line(3, time="12:00", eval={"metric": "m", "value": 2.0})))
    assert found == {
        "loss": 1 / 3, "loss_by_sigma/below_1": 0.5, "eval/m": 2.0,
    }  # fmt: skip
