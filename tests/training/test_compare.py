"""The core of a comparison: equal time, the points of a run, and the picture of methods."""

import itertools

import pytest
import torch

from cmtool.cli._watching import LineWatcher
from cmtool.data.datasets import digits
from cmtool.data.decoding import read_image
from cmtool.models import load_model
from cmtool.presets.toml import is_method_preset, load_preset
from cmtool.training import compare, plots
from cmtool.training import run as runs
from cmtool.training.compare import Bench, begun, default_presets, point_steps
from cmtool.training.comparison import Asked, read_comparison
from cmtool.training.fair import Terms
from cmtool.training.history import time_spent
from cmtool.training.plots import Reached, mean_curve, short_number, write_methods

LAPS = {"cd": 3.0, "ict": 1.5, "digits-ect": 0.9}
BEFORE = {"cd": 0.0, "ict": 45.0, "digits-ect": 0.0}  # seconds that are not for steps


def test_each_method_gets_the_steps_that_fill_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "lap_times", lambda terms, presets: LAPS)
    monkeypatch.setattr(compare, "work_before", lambda terms, name, preset, data: BEFORE[name])
    monkeypatch.setattr(compare, "split_by_memory", lambda terms, preset: preset)
    asked = Asked(
        presets=list(LAPS), teacher=None, data=None, seeds=[0], seconds=90.0, num=9,
        protocol=None, values={},
    )  # fmt: skip
    terms = Terms(asked, load_model("digits-edm"), "cpu")
    bench = Bench(
        out=tmp_path, terms=terms, note=lambda text: None, watching=lambda steps: None,
        showing=lambda: None,
    )  # fmt: skip
    comparison = begun(bench, digits("train"), "digits")
    assert {name: each.steps for name, each in comparison.methods.items()} == {
        "cd": 30, "ict": 30, "digits-ect": 100
    }  # fmt: skip
    assert {each.batch for each in comparison.methods.values()} == {64}
    assert read_comparison(tmp_path) == comparison


def test_the_presets_of_default_need_no_data_and_make_consistency_models():
    found = default_presets()
    assert {"cd", "ict"} <= set(found)
    assert all(is_method_preset(name) for name in found)
    assert {load_preset(name).kind for name in found} == {"consistency"}


@pytest.mark.parametrize("steps", [1, 2, 7, 800, 123_457])
def test_points_end_with_the_last_step_and_are_even_in_the_logarithm(steps):
    found = sorted(point_steps(steps))
    assert found[-1] == steps
    assert found[0] >= 1
    if steps > 500:
        assert found[0] == round(steps * compare.FIRST_SHARE)
        ratios = [b / a for a, b in itertools.pairwise(found)]
        assert len(found) == compare.POINTS
        assert max(ratios) / min(ratios) < 1.02


LOG = [
    {"step": 10, "step_seconds": 2.0, "step_cpu_seconds": 3.0},
    {"step": 20, "step_seconds": 1.0, "step_cpu_seconds": 0.5},
]


@pytest.mark.parametrize(
    ("step", "spent"), [(0, (0, 0)), (5, (10, 15)), (10, (20, 30)), (14, (24, 32)), (20, (30, 35))]
)
def test_the_time_of_a_step_is_summed_up_over_the_log(step, spent):
    assert time_spent(LOG, step) == pytest.approx(spent)


def test_a_log_without_times_takes_none():
    assert time_spent([{"step": 3}], 3) == (0, 0)


def test_the_curve_of_seeds_is_their_mean():
    runs = [[Reached(1.0, 8, [2.0, 4.0])], [Reached(3.0, 8, [6.0, 5.0])]]
    assert mean_curve(runs) == [Reached(2.0, 8, [4.0, 4.5])]


def test_numbers_below_an_axis_are_short():
    numbers = [0.5, 200, 9000, 20_000, 5e6]
    assert [*map(short_number, numbers)] == ["0.5", "200", "9000", "20k", "5M"]


def test_the_picture_has_all_methods_in_both_plots(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "_draw_method",
        lambda axis, key, place, name, runs, lines: drawn.setdefault(key, []).append((place, name)),
    )  # fmt: skip
    run = [Reached(1.0, 8, [9.0, 8.0]), Reached(2.0, 16, [5.0, 4.0])]
    samples = {name: torch.zeros(3, 1, 8, 8) for name in ("_a$", "b", "teacher")}
    curves = {"_a$": [run, run], "b": [run]}
    write_methods(tmp_path / "c.png", curves, ("teacher", 2.0), samples, (1, 2), "fd-digits")
    assert drawn == {key: [(0, "_a$"), (1, "b")] for key in ("seconds", "images")}
    assert read_image(tmp_path / "c.png").shape[0] == 3


def test_several_seeds_are_faint_lines_beside_their_mean():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    run = [Reached(1.0, 8, [9.0, 8.0]), Reached(2.0, 16, [5.0, 4.0])]
    plots._draw_method(axis, "images", 0, "a", [run, run], 2)
    looks = [(line.get_alpha(), line.get_linestyle()) for line in axis.lines]
    assert looks == [(0.3, "-")] * 2 + [(None, "-")] + [(0.3, "-")] * 2 + [(None, "--")]
    assert {line.get_color() for line in axis.lines} == {"C0"}


def test_an_observer_sees_a_step_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ideal_seconds", lambda *_: None)
    small = {"model.network.model_channels": 16, "model.network.norm_groups": 4}
    small |= {"model.network.head_channels": 16, "train.batch": 4, "train.steps": 2}
    preset = load_preset("digits-ct", small | {"run.sample_grid": 1, "run.checkpoint_every": 1})
    seen = []

    def observe(run, tools, news):
        seen.append((news.step, sorted(p.name for p in tmp_path.glob("checkpoints/step-*"))))

    last = runs.train(
        preset, tmp_path, LineWatcher(), observers=[(lambda run, news: True, observe)]
    )
    assert [step for step, _ in seen] == [1, 2]
    assert all(f"step-000000{step}" not in found for step, found in seen)
    assert last.name == "step-0000002"
