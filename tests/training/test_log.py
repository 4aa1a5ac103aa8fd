import json
import subprocess
import sys

import pytest
import torch

from cmtool.core.noise import NoiseRange
from cmtool.presets.toml import load_preset
from cmtool.system.dist import ALONE
from cmtool.training import log as progress
from cmtool.training.fit import StepInfo
from cmtool.training.log import Clock, Meter, band_edges, band_names, log_line, read_log, trim_log


def info(step, loss, sigma, *, norm=1.0, skipped=False):
    return StepInfo(
        step=step, loss=torch.tensor(loss), sigma=torch.tensor(sigma, dtype=torch.float64),
        grad_norm=torch.tensor(norm), lr=0.1, n=18, mu=0.9, skipped=skipped, waited=0.0,
    )  # fmt: skip


def test_bands_of_the_published_range_are_decades():
    edges = band_edges(NoiseRange())
    assert edges == pytest.approx([0.02, 0.2, 2, 20])
    assert band_names(edges) == ["<0.02", "0.02-0.2", "0.2-2", "2-20", ">20"]


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0.002, 80, 5), (0.02, 100, 4), (0.1, 10, 2), (0.01, 0.1, 1)]
)
def test_bands_cover_the_range_and_none_is_empty(low, high, count):
    edges = band_edges(NoiseRange(low, high))
    bounds = [low, *edges, high]
    assert bounds == sorted(set(bounds))
    assert len(band_names(edges)) == count == len(bounds) - 1


def test_means_by_noise_are_those_of_the_images_in_each_band():
    meter = Meter(NoiseRange(0.1, 50), "cpu")  # edges 1, 10
    meter.add(info(1, [1.0, 2.0, 4.0], [0.1, 1.0, 0.9999], norm=3.0))
    meter.add(info(2, [8.0, 16.0, 32.0], [50.0, 1.1, 9.9], norm=5.0))
    means = meter.take(ALONE)
    assert means.loss_by_sigma == {"<1": 2.5, "1-10": pytest.approx(50 / 3), ">10": 8.0}
    assert means.images_by_sigma == {"<1": 2, "1-10": 3, ">10": 1}
    assert means.loss == 63 / 6
    assert means.grad_norm == 4


def test_each_line_averages_its_own_steps_only():
    meter = Meter(NoiseRange(0.1, 50), "cpu")
    meter.add(info(1, [100.0], [2.0]))
    meter.take(ALONE)
    meter.add(info(2, [3.0], [0.5]))
    means = meter.take(ALONE)
    assert (means.loss, means.loss_by_sigma["1-10"]) == (3.0, None)


def test_a_skipped_step_counts_in_no_mean():
    meter = Meter(NoiseRange(), "cpu")
    meter.add(info(1, [1.0], [1.0]))
    meter.add(info(2, [float("nan")], [1.0], norm=float("inf"), skipped=True))
    means = meter.take(ALONE)
    assert (means.loss, means.grad_norm, means.skipped) == (1.0, 1.0, 1)
    meter.add(info(3, [float("nan")], [1.0], norm=float("inf"), skipped=True))
    means = meter.take(ALONE)
    assert (means.loss, means.grad_norm, means.skipped) == (None, None, 1)


def test_an_interrupted_line_goes_on_where_it_was_whatever_the_number_of_processes():
    whole, first, resumed, beside = (Meter(NoiseRange(0.1, 50), "cpu") for _ in range(4))
    before = [info(1, [1.0, 0.1], [0.5, 2.0]), info(2, [0.3, 0.7], [0.5, 20.0], skipped=True)]
    after = info(3, [0.3, 0.2], [0.5, 20.0], norm=0.1)
    for each in before:
        whole.add(each)
        first.add(each)
    resumed.restore(json.loads(json.dumps(first.sums(ALONE))), leads=True)
    beside.restore(first.sums(ALONE), leads=False)
    whole.add(after)
    resumed.add(after)
    assert beside.sums(ALONE)["images"] == [0, 0, 0]
    assert whole.take(ALONE) == resumed.take(ALONE)


def test_a_log_line_is_strict_json_whatever_the_loss():
    preset = load_preset("digits-ct")
    meter, clock = Meter(NoiseRange(), "cpu"), Clock(0, preset)
    meter.add(info(1, [float("inf"), 1.0], [1.0, 10.0]))
    line = log_line(info(1, [1.0], [1.0]), meter, clock, ALONE, "cpu")
    json.dumps(line, allow_nan=False)
    assert line["loss"] is None
    assert line["loss_by_sigma"]["2-20"] == 1.0


def test_the_share_of_time_spent_waiting_for_images(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    meter, clock = Meter(NoiseRange(), "cpu"), Clock(0, load_preset("digits-ct"))
    meter.add(info(2, [1.0], [1.0]))
    clock.waited = 0.75
    now = 3.0
    assert log_line(info(2, [1.0], [1.0]), meter, clock, ALONE, "cpu")["data_wait"] == 0.25


def test_pauses_are_in_the_time_left_and_not_in_the_speed(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = Clock(10, load_preset("digits-ct", {"train.steps": 40}))
    now = 5.0
    with clock.pause():
        now = 15.0
    now = 20.0
    assert clock.lap(20)[0] == 1.0
    assert clock.seconds_left(20) == 40.0
    now = 30.0
    assert clock.lap(25)[0] == 2.0


def test_a_line_has_the_seconds_of_a_step_without_pauses(monkeypatch):
    now, cpu = 0.0, 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress.time, "process_time", lambda: cpu)
    meter, clock = Meter(NoiseRange(), "cpu"), Clock(0, load_preset("digits-ct"))
    meter.add(info(4, [1.0], [1.0]))
    with clock.pause():
        now, cpu = 10.0, 20.0
    now, cpu = 12.0, 23.0
    line = log_line(info(4, [1.0], [1.0]), meter, clock, ALONE, "cpu")
    assert (line["step_seconds"], line["step_cpu_seconds"]) == (0.5, 0.75)


def test_peak_memory_is_what_the_process_once_held():
    program = (  # in a process of its own, whose memory nobody else has used before
        "import os; from pathlib import Path; from cmtool.training.log import peak_memory\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1])\n"
        "held = bytearray(b'x') * (512 << 20)\n"
        "del held\n"
        "print(peak_memory('cpu'), resident() * os.sysconf('SC_PAGE_SIZE'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    peak, left = map(int, done.stdout.split())
    assert peak > 512 << 20
    assert peak - left > 256 << 20


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def test_curves_are_ordered_by_step_though_the_clock_jumped_back_and_the_tail_was_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": s, "time": t} for s, t in ((10, "12:00"), (30, "11:00"), (20, "11:30"))]
    write(log, *map(json.dumps, lines), "17", "[]", "")
    with log.open("ab") as file:
        file.write(b'{"step": 40, "time": "11\xff')
    assert [line["step"] for line in read_log(log)] == [10, 20, 30]


def test_superseded_lines_are_moved_not_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    write(log, *(json.dumps({"step": s, "loss": 0.1 * s}) for s in (2, 4, 6)))
    with log.open("a") as file:
        file.write('{"step": 8, "lo')
    trim_log(tmp_path, 4)
    trim_log(tmp_path, 2)
    assert [line["step"] for line in read_log(log)] == [2]
    superseded = (tmp_path / "log.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [6, 4]
