import itertools

import pytest
import torch

from cmtool.errors import ResourceError
from cmtool.presets.build import needs_teacher
from cmtool.presets.toml import load_preset, preset_names
from cmtool.training import bench as benches
from cmtool.training import cost
from cmtool.training.bench import Timed, bench
from cmtool.training.cost import Memory
from cmtool.training.laps import (
    START,
    Lap,
    Stopwatch,
    laps,
    random_teacher,
    rig,
    seconds_before,
    short_laps,
    times_before,
)

TINY = {
    "train.batch": 4, "model.network.model_channels": 16, "model.network.norm_groups": 4,
    "model.network.head_channels": 16, "train.precision": "fp32",
}  # fmt: skip


def tiny(name, **more):
    return load_preset(name, TINY | {key.replace("__", "."): v for key, v in more.items()})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benches, "SECONDS", 0.1)
    monkeypatch.setattr(benches, "ideal_seconds", lambda *_: 0.001)
    return monkeypatch


def test_the_update_of_a_larger_batch_takes_no_longer():
    lap = Lap(data=1.0, forward=2.0, backward=3.0, update=4.0)
    assert lap.whole == 10
    assert lap.of(8) == Lap(8.0, 16.0, 24.0, 4.0)


SLOW = ("data", "forward", "backward", "update")


@pytest.mark.parametrize("slow", SLOW)
def test_time_goes_to_the_phase_that_takes_it(monkeypatch, slow):
    """Each phase in turn is made slow by a clock that it moves on."""
    now = itertools.count()
    late = {"by": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: next(now) * 1e-6 + late["by"])

    def delay():
        late["by"] += 5.0

    made = rig(tiny("digits-edm"), None, "cpu")
    objective = made.objective
    draws = made.draws
    if slow == "data":
        made = made._replace(draws=lambda size: lambda *at: (delay(), draws(size)(*at))[1])
    if slow == "forward":
        made = made._replace(objective=lambda *given: (delay(), objective(*given))[1])
    if slow == "backward":
        next(made.state.student.parameters()).register_hook(lambda _: delay())
    if slow == "update":
        made.state.optimizer.register_step_post_hook(lambda *_: delay())
    for lap in itertools.islice(laps(made, 2), 2):
        assert getattr(lap, slow) == pytest.approx(5.0, abs=0.01)
        assert lap.whole == pytest.approx(5.0, abs=0.01)


class Event:
    """An event of a GPU that ends one mark late, and whose clock runs twice as fast."""

    recorded: list = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = len(self.recorded)
        self.recorded.append(self)

    def query(self):
        return self.at < len(self.recorded) - 1

    def elapsed_time(self, other):
        return 2000.0 * (other.at - self.at)


def test_on_a_gpu_events_share_out_the_time_of_the_host(monkeypatch):
    """Of a step the host saw 4 s: the events say 1 part each to data and forward, 2 to backward."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "recorded", [])
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    watch = Stopwatch("cuda")
    for phase in (START, "data", "forward", "backward", "backward", "update", START):
        watch.mark(phase)
    assert list(watch.finished()) == []  # the device is still at it
    watch.mark("data")
    lap = Lap(data=1.0, forward=1.0, backward=2.0, update=2.0)
    assert list(watch.finished()) == [lap]
    assert list(watch.finished()) == []  # only once


def test_a_step_of_two_rounds_has_both():
    made, seen = rig(tiny("digits-edm"), None, "cpu"), []
    draws = made.draws
    made = made._replace(draws=lambda size: lambda *at: (seen.append(at), draws(size)(*at))[1])
    next(laps(made, 2, rounds=2))
    assert seen == [(0, 0), (0, 1)]


def test_a_step_that_takes_points_of_paths_has_its_share_of_walking_them():
    preset = tiny("digits-cmt")
    made = rig(preset, random_teacher(preset, "cpu"), "cpu")
    first, *later = itertools.islice(laps(made, 2), 3)
    assert all(0 < lap.data < first.data / 32 for lap in later)  # of 128 steps, 16 levels of 8


def test_steps_of_an_adaptive_grid_do_not_wait_for_it_and_it_is_timed_apart(monkeypatch):
    made, counted = rig(tiny("digits-adcm"), None, "cpu"), []
    made = made._replace(before=lambda *given: counted.append(given[2]()[0].shape))
    assert len(list(itertools.islice(laps(made, 2), 2))) == 2
    assert counted == []
    monkeypatch.setattr("time.perf_counter", iter([5.0, 12.0]).__next__)
    assert seconds_before(made, 3) == 7
    assert counted == [(3, 3, 8, 8)]


@pytest.mark.parametrize(("steps", "times"), [(800, 2), (801, 3), (1, 1), (400, 1), (401, 2)])
def test_a_grid_is_made_at_the_first_step_of_each_stage(steps, times):
    given = {"train.steps": steps, "loss.method.every_images": 25_600}
    assert times_before(load_preset("digits-adcm", given)) == times
    assert times_before(load_preset("digits-ect", {"train.steps": steps})) == 0


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("digits")])
def test_every_method_is_timed_without_a_trained_teacher(name):
    preset = tiny(name)
    teacher = random_teacher(preset, "cpu")
    assert (teacher is not None) == needs_teacher(preset)
    first, again = itertools.islice(short_laps(preset, teacher, "cpu", 2), 2)
    assert min(first.whole, again.whole) > 0
    assert again.forward > 0
    assert again.backward > 0


def test_figures_are_consistent(quick):
    preset = tiny("digits-cd", train__steps=100)
    found = bench(preset, random_teacher(preset, "cpu"), "cpu", steps=3)
    assert (found.laps, found.images, found.rounds) == (3, 4, 1)
    assert found.images_per_second == pytest.approx(4 / found.lap.whole)
    assert found.hours == pytest.approx(100 * 4 / found.images_per_second / 3600)
    assert found.mfu == pytest.approx(0.001 / found.lap.whole)
    assert found.held.estimate == cost.step_memory(preset, random_teacher(preset, "cpu"), "cpu").of(
        4
    )
    assert found.largest > 100
    assert not found.is_tried


def test_steps_are_timed_for_a_while_if_nobody_says_how_many(quick):
    assert 1 <= bench(tiny("digits-edm"), None, "cpu").laps <= benches.MOST_LAPS


def test_a_slow_step_is_timed_with_fewer_images(quick):
    quick.setattr(benches, "SECONDS_OF_STEP", 1e-9)
    told = []
    found = bench(tiny("digits-edm", train__batch=64), None, "cpu", steps=1, tell=told.append)
    assert found.images == 1
    assert told == ["steps of 1 images are timed; each image of 64 takes as long"]


def test_a_batch_for_which_memory_is_short_is_split(quick):
    for module in (benches, cost):
        quick.setattr(module, "free_memory", lambda _: 1000)
        quick.setattr(module, "step_memory", lambda *_: Memory(100, 100))
    told = []
    found = bench(tiny("digits-edm", train__batch=32), None, "cpu", steps=1, tell=told.append)
    assert (found.preset.train.accumulate, found.images, found.rounds) == (4, 8, 2)
    assert found.largest == 9
    assert "--accumulate 4" in told[0]


def test_networks_that_do_not_fit_are_refused(quick):
    for module in (benches, cost):
        quick.setattr(module, "free_memory", lambda _: 1000)
        quick.setattr(module, "step_memory", lambda *_: Memory(2000, 100))
    with pytest.raises(ResourceError, match="training needs about"):
        bench(tiny("digits-edm"), None, "cpu")


def of_room_for(most, made):
    """The rig with draws that run out of memory above so many images."""
    draws = made.draws

    def limited(size):
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draws(size)

    return made._replace(draws=limited)


def test_the_largest_batch_is_found_by_doubling():
    timed = Timed(of_room_for(40, rig(tiny("digits-edm"), None, "cpu")), 4)
    timed.begin()
    assert timed.images == 4
    assert timed.largest() == 32


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    timed = Timed(of_room_for(3, rig(tiny("digits-edm"), None, "cpu")), 12)
    timed.begin()
    assert timed.images == 3
    none = Timed(of_room_for(0, rig(tiny("digits-edm"), None, "cpu")), 2)
    with pytest.raises(torch.OutOfMemoryError):
        none.begin()


def test_another_error_is_no_lack_of_memory():
    made = rig(tiny("digits-edm"), None, "cpu")

    def broken(*_):
        raise RuntimeError("of another kind")

    timed = Timed(made._replace(objective=broken), 2)
    with pytest.raises(RuntimeError, match="another kind"):
        timed.begin()
