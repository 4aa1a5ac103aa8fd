from types import SimpleNamespace

import pytest

from cmtool.presets.schema import RunSection
from cmtool.presets.toml import load_preset
from cmtool.system.dist import ALONE, Group
from cmtool.training import run
from cmtool.training.observers import OBSERVERS, News

EVERY = RunSection(log_every=2, checkpoint_every=3, sample_every=5, eval_every=7)


def due(step, *, section=EVERY, group=ALONE, skipped=False, diverged=None, stop=0, **more):
    """The names of what is done after a step of a run of 100, without what always is."""
    info = SimpleNamespace(step=step, skipped=skipped)
    news = News(info, step == 100, diverged, stop, **more)
    about = SimpleNamespace(preset=SimpleNamespace(run=section), group=group)
    found = [do.__name__ for is_due, do in OBSERVERS if is_due(about, news)]
    return [name for name in found if name not in ("measure", "tend_saver", "show_progress")]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, []), (2, ["log"]), (3, ["save"]), (5, ["draw_samples"]), (7, ["evaluate_model"]),
     (30, ["log", "save", "draw_samples"])],
)  # fmt: skip
def test_each_observer_is_due_every_so_many_steps(step, expected):
    assert due(step) == expected


def test_after_the_last_step_everything_is_due_in_the_order_in_which_it_is_needed():
    assert due(100) == ["evaluate_model", "log", "save", "draw_samples"]


def test_zero_means_never_even_at_the_last_step():
    assert "evaluate_model" not in due(100, section=EVERY.model_copy(update={"eval_every": 0}))


def test_an_evaluation_is_worth_a_log_line_and_perhaps_a_checkpoint():
    assert due(7, verdict=object()) == ["evaluate_model", "log", "save"]


def test_a_run_that_diverged_is_logged_and_neither_evaluated_nor_saved_nor_sampled():
    assert due(1, diverged=ValueError()) == due(210, diverged=ValueError()) == ["log"]


def test_a_run_that_stops_is_saved_and_not_evaluated():
    assert due(1, stop=15) == ["save"]
    assert due(7, stop=15) == ["save"]


def test_all_processes_do_the_same_but_for_remarks():
    for step in range(1, 101):
        other = Group(rank=1, world_size=2)
        assert due(step) == due(step, group=other)
        assert due(step, skipped=True) == ["note_skipped", *due(step, group=other, skipped=True)]


def test_an_observer_is_a_function_and_a_line(tmp_path):
    seen = []

    def see(run, tools, news):
        seen.append((news.step, tools.line["step"]))

    OBSERVERS.append((lambda run, news: news.is_every(3), see))
    try:
        preset = load_preset("digits-ct", {
            "train.steps": 7, "train.batch": 8, "train.precision": "fp32", "run.log_every": 2,
            "model.network.model_channels": 16,
        })  # fmt: skip
        watcher = SimpleNamespace(
            progress=lambda news: None, note=lambda text: None, working=lambda *news: None
        )
        final = run.train(preset, tmp_path / "run", watcher)
    finally:
        OBSERVERS.pop()
    assert final == tmp_path / "run/checkpoints/step-0000007"
    assert seen == [(3, 2), (6, 6), (7, 7)]
