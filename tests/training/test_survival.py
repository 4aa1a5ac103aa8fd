"""A run is killed, starved, damaged, mistaken and told to stop; it loses no finished checkpoint.

Each fault is a real one: a signal, a full disk, a cut file. `test_fault_03_...` is fault 3 of the
table of faults this project wants to survive:

|  1 | killed while saving                      | 11 | resumed with another preset            |
|  2 | killed between a checkpoint and latest   | 12 | SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C      |
|  3 | the disk is full when a run saves        | 15 | Ctrl-C twice                           |
|  4 | the disk is full when images are written | 23 | a data worker is killed, or hangs      |
|  5 | a bit of a checkpoint flips              | 30 | a teacher that does not fit            |
|  6 | a checkpoint is cut, or half there       | 38 | read-only packages, no HOME, no cache  |
|  7 | two runs in one folder                   |    |                                        |
|  8 | the lock of a dead run                   |    | 10, 13, 14, 18 to 22: test_torchrun.py |
|  9 | resumed, bit for bit                     |    | 16, 17, 39: cli/test_numerics.py       |

24 to 29 are in cli/test_data_faults.py, 31 to 33 in core/formats/test_hostile.py.
"""

import contextlib
import io
import json
import os
import platform
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
from cmtool.errors import BusyError
from cmtool.formats.checkpoints import verify
from cmtool.formats.native import write_weights
from cmtool.presets.build import build_network
from cmtool.presets.toml import load_preset
from cmtool.training.lock import locked
from tests.cli.conftest import TINY
from tests.faults import (
    Command,
    assert_same_run,
    contents,
    fast_disk,
    fill,
    final_tensors,
    leftovers,
    log_lines,
    logged,
    small_disk,
    state,
    status,
    steps,
    written,
)

pytestmark = pytest.mark.slow

EVERY_STEP = ["--set", "run.checkpoint_every=1"]
BARE = ["--set", "train.batch=8", "--set", "run.log_every=2", "--device", "cpu"]
"""For students, which have their teacher's network."""
ENDLESS = ["--set", "train.steps=100000"]


@pytest.fixture(scope="session")
def root():
    with fast_disk() as folder:
        yield folder


@pytest.fixture
def place(root):
    return Path(tempfile.mkdtemp(dir=root))


@pytest.fixture(scope="session")
def methods(root):
    """The arguments of each method; a student's teacher is as tiny as the others."""
    teacher = ["train", "--preset", "digits-edm", "--out", "teacher", *TINY]
    Command(*teacher, "--set", "train.steps=1", folder=root).done()
    return {
        "edm": ["train", "--preset", "digits-edm", *TINY],
        "ct": ["train", "--preset", "digits-ct", *TINY],
        "cd": ["distill", "--preset", "digits-cd", "--teacher", str(root / "teacher"), *BARE],
    }


@pytest.fixture(scope="session")
def finished(root, methods):
    """A run of four steps, with checkpoints of the third and fourth; to be copied."""
    arguments = [*methods["ct"], *EVERY_STEP, "--out", "finished"]
    Command(*arguments, "--set", "train.steps=4", folder=root).done()
    return root / "finished"


@pytest.fixture
def copied(finished, place):
    return shutil.copytree(finished, place / "run")


def resume(place, *more, **options):
    return Command(
        "train", "--resume", "--out", "run", "--device", "cpu", *more, folder=place, **options
    )


def running(methods, place, *more, method="ct", **options):
    """A run without end that has a checkpoint and a log line."""
    arguments = [*methods[method], *EVERY_STEP, *ENDLESS, "--out", "run", *more]
    command = Command(*arguments, folder=place, **options)
    command.wait_for(lambda: steps(place / "run") and logged(place / "run"))
    return command


KILLS = 14
LENGTH = 50


@pytest.mark.parametrize("method", ["ct", "edm", "cd"])
def test_fault_01_killed_at_random_moments_a_run_ends_bit_equal(place, methods, method):
    """Half of the kills are to meet a checkpoint that is being written, at any of its files."""
    arguments = [*methods[method], *EVERY_STEP, "--set", f"train.steps={LENGTH}"]
    straight = Command(*arguments, "--out", "straight", folder=place, bare=True)
    straight.done()
    run, moments = place / "run", random.Random(method)
    while_writing = 0
    for kill in range(KILLS):
        more = ["--resume"] if (run / "run.json").exists() else []
        before = steps(run)
        command = Command(*arguments, "--out", "run", *more, folder=place, bare=True)
        if kill % 2:
            files = moments.randrange(5)
            command.suspend_when(lambda c=command, n=files: written(run, c) >= n)
        elif kill % 4:
            command.wait_for(lambda before=before: steps(run)[-1:] > before[-1:])
            time.sleep(moments.uniform(0, 0.1))
        else:  # at any moment of the start
            time.sleep(moments.uniform(0, 0.5))
        said = command.said()
        if before and kill % 4:  # it came to a step
            assert f"resumed from run/checkpoints/step-{before[-1]:07d}" in said
        command.kill()
        while_writing += written(run, command) >= 0
        for number in steps(run):
            verify(run / "checkpoints" / f"step-{number:07d}")
    assert while_writing >= KILLS // 2
    command = Command(*arguments, "--out", "run", "--resume", folder=place, bare=True)
    assert "resumed from" in command.done()
    assert_same_run(place / "straight", run)
    assert leftovers(run) == []
    assert (status(run)["state"], status(run)["exit_code"]) == ("done", 0)


def test_fault_02_a_checkpoint_that_latest_does_not_name_is_found(place, methods):
    run = place / "run"

    command = running(methods, place)
    command.suspend_when(lambda: latest(run) < newest(run))
    found, named = newest(run), latest(run)
    command.kill()
    assert latest(run) == named < found == newest(run)
    again = resume(place, "--max-time", "0s")
    err = again.failed(75, "the time is up")
    assert f"resumed from run/checkpoints/{found.name}" in err


def newest(run):
    return run / "checkpoints" / f"step-{steps(run)[-1]:07d}"


def latest(run):
    """The checkpoint that latest.json names."""
    return (
        run
        / "checkpoints"
        / json.loads((run / "checkpoints/latest.json").read_text())["checkpoint"]
    )


def test_a_run_killed_before_it_is_one_starts_with_the_same_command(place, methods):
    run = place / "run"
    arguments = [*methods["ct"], "--set", "train.steps=1", "--out", "run"]
    command = Command(*arguments, folder=place)
    command.suspend_when(lambda: (run / "checkpoints").exists())
    early = not (run / "run.json").exists()
    command.kill()
    more = [] if early else ["--resume"]
    Command(*arguments, *more, folder=place).done()
    assert steps(run) == [1]


def test_a_run_killed_before_its_first_step_resumes_at_step_0(place, methods):
    run = place / "run"
    arguments = [*methods["ct"], "--set", "train.steps=2", "--out", "run"]
    command = Command(*arguments, folder=place)
    command.suspend_when(lambda: (run / "run.json").exists())
    assert steps(run) == []
    command.kill()
    assert "no checkpoint yet: starting at step 0" in resume(place).done()
    assert steps(run) == [2]


def test_runs_that_start_together_take_a_folder_each(place, methods):
    arguments = [*methods["ct"], "--set", "train.steps=1"]
    commands = [Command(*arguments, folder=place) for _ in range(4)]
    found = {command.finish()[1] for command in commands}
    names = ["digits-ct", "digits-ct-2", "digits-ct-3", "digits-ct-4"]
    assert found == {f"runs/{name}/checkpoints/step-0000001\n" for name in names}


@pytest.fixture
def disk():
    """A small disk, with room for three checkpoints of 4.4 MB."""
    with small_disk(16_000_000) as folder:
        if folder is None:
            pytest.skip("a disk of a few MB, to fill it, can be mounted by root alone")
        yield folder


def test_fault_03_a_full_disk_is_told_and_training_goes_on(disk, methods):
    """And so do, in a way, its log and its sample grids (fault 4)."""
    run = disk / "run"
    arguments = [*methods["ct"], *ENDLESS, "--out", "run", "--set", "run.checkpoint_every=15"]
    command = Command(*arguments, "--set", "run.sample_every=15", folder=disk)
    command.wait_for(lambda: len(steps(run)) == 2)
    filler = fill(disk)
    before = contents(run / "checkpoints")
    command.wait_for(lambda: "going on without it; free disk space: it needs" in command.said())
    assert contents(run / "checkpoints") == before
    assert leftovers(run) == []
    filler.unlink()
    last = steps(run)[-1]
    command.wait_for(lambda: steps(run)[-1] > last)
    command.send(signal.SIGTERM)
    code, _, err = command.finish()
    assert code == 143, err
    for text in ("for checkpoint step-", "log.jsonl", "the sample grid"):
        assert f"{text}" in err
    assert [line["step"] for line in log_lines(run)] == list(range(2, status(run)["step"] + 1, 2))


def test_fault_03_a_disk_that_stays_full_ends_a_run_with_code_5(disk, methods):
    command = running(methods, disk)
    run = disk / "run"
    command.suspend_when(
        lambda: written(run, command) < 0 and len(steps(run)) == 2 and latest(run) == newest(run)
    )
    fill(disk)
    before = contents(run / "checkpoints")
    command.send(signal.SIGCONT)
    err = command.failed(5, "error: no room on the disk for checkpoint step-", "are intact")
    assert err.count("going on without it; free disk space: it needs") == 2
    assert contents(run / "checkpoints") == before
    assert leftovers(run) == []
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 5)


def test_fault_03_without_room_for_the_last_checkpoint_a_run_ends_with_code_5(copied, place):
    """A limit on the size of files, where no disk may be mounted; like a quota, a surprise."""
    before = contents(copied / "checkpoints")
    size = min(f.stat().st_size for f in newest(copied).glob("*.safetensors"))
    free = ["--set", "run.checkpoint_every=9", "--set", "train.steps=6"]
    text = (copied / "preset.toml").read_text()
    (copied / "preset.toml").write_text(text.replace("steps = 4", "steps = 6", 1))
    command = resume(place, *free, max_file=size - 1000)
    command.failed(5, "error: no room on the disk for checkpoint step-0000006", "are intact")
    assert contents(copied / "checkpoints") == before
    assert leftovers(copied) == []
    assert (status(copied)["state"], status(copied)["step"]) == ("failed", 6)


def test_fault_04_a_full_disk_leaves_whole_images_and_says_how_many():
    with small_disk(200_000) as folder:
        if folder is None:
            pytest.skip("a disk of a few MB, to fill it, can be mounted by root alone")
        command = Command("sample", "-c", "digits-cd", "--seeds", "0-199", folder=folder)
        code, out, err = command.finish()
        assert code == 5, err
        images = sorted((folder / "samples").iterdir())
        assert [f"samples/{path.name}" for path in images] == out.splitlines()
        assert 0 < len(images) < 200
        for path in images:
            assert read_image(path).shape == (3, 8, 8)
        assert f"error: no room on the disk for samples/seed{len(images):06d}.png" in err
        assert f"{len(images)} of 200 images are there" in err
        assert "hint: free disk space; then the same command draws the rest" in err


DAMAGES = {
    "05 flipped": ("model.safetensors", lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:]),
    "05 flipped in a moment": ("optimizer.safetensors", lambda b: b[:-9] + b"\1" + b[-8:]),
    "06 cut": ("model.safetensors", lambda b: b[:-1000]),
    "06 emptied": ("ema.safetensors", lambda b: b""),
    "06 manifest cut": ("manifest.json", lambda b: b[:-30]),
    "06 manifest gone": ("manifest.json", None),
    "06 state gone": ("state.json", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_05_06_a_damaged_checkpoint_is_passed_over_and_named(copied, place, damage):
    name, change = DAMAGES[damage]
    before = contents(copied / "checkpoints")
    file = copied / "checkpoints/step-0000004" / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    weights = name.partition(".")[0] if name.startswith(("model", "ema")) else "ema"
    explicit = Command(
        "checkpoint", "info", str(newest(copied)), "--weights", weights, folder=place
    )
    if name == "optimizer.safetensors" and "flipped" in damage:  # no file of the model is damaged
        explicit.done()
    else:
        explicit.failed(3, "step-0000004")
    err = resume(place).done()
    bad = "is not a whole checkpoint: no manifest" if "manifest" in name else f"{name} is damaged"
    assert "not used: run/checkpoints/step-0000004" in err
    assert bad in err
    assert "resumed from run/checkpoints/step-0000003" in err
    assert contents(copied / "checkpoints") == before  # the fourth step again, to the last bit


def test_fault_05_a_damaged_checkpoint_named_by_the_user_is_refused(copied, place):
    file = newest(copied) / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))
    before = contents(place)
    for arguments in (
        ["sample", "-c", newest(copied), "--out", "x.png"],
        ["eval", "fid", "-c", newest(copied), "--num", "8"],
        ["checkpoint", "convert", newest(copied), "y.safetensors"],
        ["distill", "--teacher", newest(copied), "--out", "student"],
    ):
        Command(*arguments, folder=place).failed(3, "ema.safetensors is damaged", "give an earlier")
    assert contents(place) == before


def test_fault_07_the_second_run_in_a_folder_is_refused_at_once(place, methods):
    command = running(methods, place)
    run = place / "run"
    holder = status(run)
    assert holder["pid"] == command.pid
    for more in (["--resume"], ["--overwrite"], []):
        second = Command(*methods["ct"], "--out", "run", *more, folder=place)
        second.failed(
            7, f"run is in use by process {command.pid} on {platform.node()}",
            f"since {holder['since']}", "give another --out",
        )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(BusyError, match=f"process {command.pid}"), locked(run):
        pass
    assert time.monotonic() - start < 1
    before = steps(run)[-1]
    command.wait_for(lambda: steps(run)[-1] > before)  # it takes no notice
    command.kill()


def test_fault_08_a_dead_run_leaves_no_lock_and_its_rubbish_is_cleared(place, methods):
    command = running(methods, place)
    run = place / "run"
    command.suspend_when(lambda: written(run, command) >= 2)
    command.kill()
    (run / f".status.json.{command.pid}.tmp").write_text("{")
    assert len(leftovers(run)) >= 2
    kept = contents(newest(run))
    err = resume(place, "--max-time", "0s").failed(75, "the time is up")  # after one step
    assert "resumed from" in err
    assert leftovers(run) == []
    assert contents(run / "checkpoints" / f"step-{steps(run)[-2]:07d}") == kept


@pytest.fixture(scope="session")
def images(root):
    """Images to stream, 60 of ten classes, in a zip."""
    path = root / "images.zip"
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(60):
            image = torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8)
            archive.writestr(f"{i % 10}/{i}.png", png_bytes(image))
    return path


STREAMED = [
    "--set", "data.flip=true", "--set", "model.network.dropout=0.1", "--set", "train.steps=40",
    "--set", "run.checkpoint_every=17",
]  # fmt: skip


@pytest.fixture(scope="session")
def straight(root, methods, images):
    """Forty steps on streamed images without workers."""
    arguments = [*methods["ct"], *STREAMED, "--data", images, "--set", "data.workers=0"]
    Command(*arguments, "--out", "straight", folder=root, streamed=True).done()
    return root / "straight"


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (2, 2)])
def test_fault_09_17_steps_and_23_are_40(place, methods, images, straight, first, then):
    """With any number of workers: order, mirrors, noise and dropout are functions of the step."""
    run = place / "run"
    arguments = [*methods["ct"], *STREAMED, "--data", images, "--out", "run"]
    command = Command(*arguments, "--set", f"data.workers={first}", folder=place, streamed=True)
    command.wait_for(lambda: steps(run) == [17])
    command.kill()
    again = resume(place, "--set", f"data.workers={then}", streamed=True)
    assert "step-0000017" in again.done()
    assert_same_run(straight, run)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("model.network.model_channels=32", "'model_channels': 16"),
        ("train.lr=0.5", "train had {'lr': 0.001}, now {'lr': 0.5}"),
        ("train.batch=4", "train had {'batch': 8}, now {'batch': 4}"),
        ("train.seed=7", "train had {'seed': 0}, now {'seed': 7}"),
        ("loss.distance=l1", "distance"),
        ("data.flip=true", "data had {'flip': False}, now {'flip': True}"),
        ("train.steps=900", "train.steps = 4, now 900: N(k), mu(k) or the learning rate"),
    ],
)
def test_fault_11_a_resumed_run_with_another_preset_is_refused(copied, place, change, difference):
    before = contents(copied)
    resume(place, "--set", change).failed(2, "the run in run was started with", difference)
    assert contents(copied) == before


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
)
def test_fault_12_a_signal_saves_and_ends_with_its_code(place, methods, number):
    command = running(methods, place)
    start = time.monotonic()
    command.send(number)
    err = command.failed(128 + number, "go on with --resume --out run", patience=30)
    assert time.monotonic() - start < 30
    run = place / "run"
    assert f"stopped by signal {number} after saving step {status(run)['step']}, in 0." in err
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 128 + number)
    assert steps(run)[-1] == status(run)["step"]
    verify(newest(run))
    assert leftovers(run) == []


def test_fault_12_a_signal_while_a_checkpoint_is_written(place, methods):
    command = running(methods, place)
    run = place / "run"
    command.suspend_when(lambda: written(run, command) >= 1)
    number = steps(run)[-1]
    command.send(signal.SIGTERM)
    command.send(signal.SIGCONT)
    command.failed(143, "after saving step")
    assert steps(run)[-1] == status(run)["step"] > number
    for number in steps(run):
        verify(run / "checkpoints" / f"step-{number:07d}")
    assert leftovers(run) == []


@pytest.fixture(scope="session")
def slow_images(root):
    """Images that take half a minute to decode."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(content, "PNG")
    with zipfile.ZipFile(root / "slow.zip", "w") as archive:
        for i in range(500):
            archive.writestr(f"{i % 10}/{i}.png", content.getvalue())
    return root / "slow.zip"


@pytest.mark.parametrize("streamed", [False, True])
def test_fault_12_a_signal_while_images_are_loaded(place, methods, slow_images, streamed):
    arguments = [*methods["ct"], "--data", slow_images, "--set", "data.fit=box", "--out", "run"]
    command = Command(*arguments, folder=place, streamed=streamed)
    sign = "decoding all 500 images" if streamed else "run folder: run"
    command.wait_for(lambda: sign in command.said())
    time.sleep(0.3)
    start = time.monotonic()
    command.send(signal.SIGTERM)
    command.failed(143, "stopped by signal 15", patience=30)
    assert time.monotonic() - start < 5
    assert not (place / "run").exists()


def test_fault_12_a_signal_while_images_are_waited_for(place, methods, images):
    """The workers are stopped, so that the next image never comes."""
    command = running(methods, place, "--data", images, streamed=True)
    run, workers = place / "run", command.children()
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    last = logged(run)
    time.sleep(0.5)
    while logged(run) > last:  # what was decoded ahead
        last = logged(run)
        time.sleep(0.5)
    command.send(signal.SIGTERM)
    command.failed(143, "stopped by signal 15 after saving step", patience=30)
    assert steps(run)[-1] == status(run)["step"] >= last
    verify(newest(run))
    assert all(state(pid) == "Z" for pid in workers)


def test_fault_15_a_second_ctrl_c_ends_at_once(place, methods):
    """On a terminal, 50 ms after the first one, in the midst of a long step."""
    ours, theirs = pty.openpty()
    arguments = [*methods["ct"], *EVERY_STEP, *ENDLESS, "--set", "train.batch=1024"]
    command = Command(*arguments, "--out", "run", folder=place, tty=os.ttyname(theirs))
    run, shown = place / "run", b""
    command.wait_for(lambda: steps(run))
    for _ in range(2):
        os.write(ours, b"\x03")
        time.sleep(0.05)
    start = time.monotonic()
    code, _, _ = command.finish(20)
    assert code == 130
    assert time.monotonic() - start < 5
    os.set_blocking(ours, False)
    with contextlib.suppress(BlockingIOError):
        shown = os.read(ours, 1 << 20)
    for end in (ours, theirs):
        os.close(end)
    assert b"Traceback" not in shown
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 130)
    assert status(run)["error"] == "stopped without saving"
    for number in steps(run):
        verify(run / "checkpoints" / f"step-{number:07d}")
    assert "resumed from" in resume(place, "--max-time", "0s").failed(75)
    assert leftovers(run) == []


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGKILL, "error: a data worker died (out of memory?) at step"),
        (signal.SIGSTOP, "error: the data workers hang: they gave nothing for 2 s, at step"),
    ],
)
def test_fault_23_a_data_worker_that_dies_or_hangs(place, methods, images, number, what):
    more = ["--data", images, "--set", "data.timeout=2", "--set", "run.checkpoint_every=100000"]
    arguments = [*methods["ct"], *ENDLESS, *more, "--out", "run"]
    command = Command(*arguments, folder=place, streamed=True)
    run = place / "run"
    command.wait_for(lambda: logged(run) >= 4)
    workers = command.children()
    assert steps(run) == []
    for pid in workers if number == signal.SIGSTOP else workers[:1]:
        os.kill(pid, number)
    command.failed(5, what, "hint: use fewer workers", patience=60)
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 5)
    assert steps(run) == [status(run)["step"]]  # the last finished step
    assert status(run)["step"] >= 4
    verify(newest(run))
    assert all(state(pid) == "Z" for pid in workers)
    again = resume(place, "--max-time", "0s", "--data", images, streamed=True)
    assert "resumed from" in again.failed(75)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ({"model.image_size": [64, 64]}, ("8x8", "64x64")),
        ({"model.num_classes": 1000}, ("10 classes", "1000")),
        ({"model.channels": 1}, ("with 3 channels", "wants 8x8 with 1")),
    ],
)
def test_fault_30_a_teacher_that_does_not_fit_the_data(place, overrides, values):
    preset = load_preset("digits-edm", {"model.network.model_channels": 32, **overrides})
    about = {"kind": "teacher", "weights": "ema", "preset": preset.model_dump(mode="json")}
    write_weights(place / "t.safetensors", build_network(preset.model).state_dict(), about)
    before = contents(place)
    command = Command("distill", "--teacher", "t.safetensors", "--out", "run", *BARE, folder=place)
    err = command.failed(3, *values, "the teacher t.safetensors", "another teacher")
    assert "step=" not in err
    assert contents(place) == before


def test_fault_30_images_of_another_size_in_a_folder(place, methods):
    (place / "images/0").mkdir(parents=True)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    (place / "images/0/a.png").write_bytes(png_bytes(image))
    command = Command(*methods["cd"], "--data", "images", "--out", "run", folder=place)
    command.failed(3, "a.png is 32x32, not 8x8")
    assert not (place / "run").exists()


@pytest.fixture(scope="session")
def installed():
    """The package where it may not be written to, as an administrator installs it."""
    home = Path(tempfile.mkdtemp())
    source = Path(__file__).parents[2]
    for name in ("cmtool", "presets"):
        shutil.copytree(source / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    (home / "work").mkdir()
    for folder in folders:
        folder.chmod(0o555)
    yield home
    for folder in folders:
        folder.chmod(0o755)
    shutil.rmtree(home)


def bare_environment(home):
    """No HOME, and no cache that could be written to."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    caches = ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")
    return {**kept, "OMP_NUM_THREADS": "1", **{name: f"{home}/cache/{name}" for name in caches}}


def test_fault_38_read_only_packages_no_home_and_no_cache(installed):
    """In a shell without root's right to write anywhere."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and setpriv, which takes that right, is missing")
    confined = ["setpriv", "--bounding-set=-dac_override,-fowner"] if os.geteuid() == 0 else []
    cmtool = f"{sys.executable} -m cmtool"
    script = (
        f"touch {installed}/x; set -e; {cmtool} train --preset digits-ct --set train.steps=2"
        f" --out run {' '.join(TINY)}; {cmtool} sample -c run --seeds 0-7 | {cmtool} eval fid -"
    )
    done = subprocess.run(
        [*confined, "sh", "-c", script], cwd=installed / "work", capture_output=True, text=True,
        env={**bare_environment(installed), "PYTHONPATH": str(installed)}, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not (installed / "x").exists()  # the fault is there
    checkpoint, _, measured = done.stdout.partition("\n")
    assert checkpoint == "run/checkpoints/step-0000002"
    assert json.loads(measured)["metric"] == "fd-digits"


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["train", *TINY], "runs/digits-edm"),
        (["train", *TINY, "--out", "somewhere"], "somewhere"),
        (["sample", "--seeds", "0"], "samples"),
        (["sample", "--seeds", "0", "--out", "x.png"], "."),
        (["demo"], "cmtool-demo"),
    ],
)
def test_fault_38_a_folder_that_cannot_be_written_to(place, arguments, folder):
    place.chmod(0o555)
    command = Command(*arguments, folder=place, rights=False)
    err = command.failed(3, "give another --out")
    assert f"cannot make {folder}" in err or f"cannot write to {folder}" in err
    assert list(place.iterdir()) == []


def test_fault_38_weights_without_a_cache_are_asked_for(installed, place):
    """LPIPS wants a file that is not there: its name, where it belongs, and no long search."""
    arguments = ["train", "--preset", "digits-ct", *TINY, "--metric", "lpips", "--out", "run"]
    command = Command(
        *arguments, folder=place, rights=False, environment=bare_environment(installed)
    )
    command.failed(4, f"{installed}/cache/TORCH_HOME")
    assert not (place / "run").exists()


def test_the_time_is_up_in_good_order(place, methods):
    arguments = [*methods["ct"], *ENDLESS, "--out", "run", "--max-time", "3"]
    Command(*arguments, folder=place).failed(75, "the time is up; saved step", "--resume --out")
    run = place / "run"
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 75)
    assert steps(run)[-1] == status(run)["step"]
    assert len(final_tensors(run)) > 100
