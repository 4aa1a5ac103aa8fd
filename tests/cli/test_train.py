import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cmtool.cli._run_options import DistanceOption
from cmtool.cli.train import note_batch
from cmtool.core.distances import DISTANCES
from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError
from cmtool.models import ASSETS, load_model
from cmtool.presets.toml import load_preset, resolve, to_toml
from cmtool.training import cost, planning
from cmtool.training.folder import new_folder
from cmtool.training.same import same_so_far
from cmtool.training.start import load_images
from cmtool.training.state import build_state, not_taken
from cmtool.training.stop import Stop
from tests.cli.conftest import TINY


def tensors(checkpoint):
    return {
        f"{file.name}:{key}": tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def assert_equal(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for key, tensor in ours.items():
        assert (tensor == theirs[key]).all(), key


def test_a_run_folder_holds_what_a_person_needs(cmtool, tmp_path):
    result = cmtool(
        "train", "--preset", "digits-edm", "--out", "r", "--set", "train.steps=4",
        "--set", "run.sample_every=2", *TINY,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.text == "r/checkpoints/step-0000004\n"
    assert "step=2/4" in result.err
    assert "images/s=" in result.err
    run = tmp_path / "r"
    preset = tomllib.loads((run / "preset.toml").read_text())
    assert preset["train"]["steps"] == 4
    assert "# --set" in (run / "preset.toml").read_text()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]
    assert {"loss", "lr", "images", "n", "mu", "grad_norm", "data_wait"} <= log[0].keys()
    assert 0 <= log[0]["data_wait"] < 1
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 4, 0)
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["images"] == 11536
    assert {p.name for p in (run / "samples").iterdir()} == {
        "step-0000002.png", "step-0000004.png"
    }  # fmt: skip
    assert read_image(run / "summary.png").shape[0] == 3


@pytest.mark.parametrize(
    "preset", ["digits-ct", pytest.param("digits-edm", marks=pytest.mark.slow)]
)
def test_resume_after_kill_is_bit_equal(tmp_path, preset):
    """60 steps straight equal 25 or so, kill -9, --resume."""
    command = [sys.executable, "-m", "cmtool", "train", "--preset", preset, *TINY]
    command += ["--set", "train.steps=60", "--set", "run.checkpoint_every=5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / out), *more], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    straight = start("straight")
    killed = start("killed")
    while not (tmp_path / "killed/checkpoints/step-0000025").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    status = json.loads((tmp_path / "killed/status.json").read_text())
    assert status["state"] == "running"
    resumed = start("killed", "--resume")
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert b"resumed from" in err
    assert straight.communicate() and straight.returncode == 0  # noqa: PT018
    assert_equal(
        tmp_path / "straight/checkpoints/step-0000060", tmp_path / "killed/checkpoints/step-0000060"
    )
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(2, 61, 2))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path, number, code):
    run = subprocess.Popen(
        [sys.executable, "-m", "cmtool", "train", *TINY, "--set", "train.steps=100000",
         "--out", str(tmp_path / "r")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "r/log.jsonl").exists() or not (tmp_path / "r/log.jsonl").read_text():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert run.returncode == code, err
    assert out == b""
    assert b"after saving step" in err
    status = json.loads((tmp_path / "r/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert (tmp_path / f"r/checkpoints/step-{status['step']:07d}/manifest.json").exists()


@pytest.mark.usefixtures("bare_runs")
def test_the_log_of_an_interrupted_run_is_that_of_a_straight_one(cmtool, tmp_path, monkeypatch):
    """Stopped between two log lines; but for what takes time."""
    arguments = ["train", *TINY, "--set", "train.steps=10", "--set", "run.log_every=5", "--out"]
    assert cmtool(*arguments, "straight").code == 0
    asked = iter(range(1, 100))
    monkeypatch.setattr(Stop, "reason", lambda self: signal.SIGTERM if next(asked) == 7 else 0)
    assert cmtool(*arguments, "stopped").code == 143
    assert cmtool("train", "--resume", "--device", "cpu", "--out", "stopped").code == 0
    timed = {
        "time",
        "images_per_second",
        "step_seconds",
        "step_cpu_seconds",
        "data_wait",
        "memory_gib",
        "mfu",
    }
    straight, stopped = (
        [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "stopped")
    )
    assert [line["step"] for line in straight] == [5, 10]
    assert straight == stopped


@pytest.mark.usefixtures("bare_runs")
def test_a_run_folder_in_use_is_refused(cmtool, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "cmtool", "train", *TINY, "--set", "train.steps=100000",
         "--out", str(tmp_path / "r")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (tmp_path / "r/log.jsonl").exists():
            assert run.poll() is None
            time.sleep(0.01)
        result = cmtool("train", *TINY, "--out", "r", "--resume")
        assert result.code == 7
        assert f"process {run.pid}" in result.err
        overwriting = cmtool("train", *TINY, "--out", "r", "--overwrite")
        assert overwriting.code == 7
        assert (tmp_path / "r/log.jsonl").exists()
    finally:
        run.kill()
        run.wait()


@pytest.mark.usefixtures("bare_runs")
def test_an_existing_run_is_never_reused_silently(cmtool, tmp_path):
    arguments = ["train", *TINY, "--set", "train.steps=2", "--out", "r"]
    assert cmtool(*arguments).code == 0
    result = cmtool(*arguments)
    assert result.code == 2
    assert "r holds a run already" in result.err
    assert "--resume" in result.err
    assert cmtool(*arguments, "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    result = cmtool("train", *TINY, "--out", "mine", "--overwrite")
    assert result.code == 2
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_mistake_costs_nothing(cmtool, tmp_path):
    """Everything is checked before the old run, or a foreign file, is touched."""
    arguments = ["train", *TINY, "--set", "train.steps=2", "--out", "r"]
    assert cmtool(*arguments).code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    for wrong in ("loss.levels=typo", "sample.sampler=heunn", "noise.sigma_min=100"):
        assert cmtool(*arguments, "--overwrite", "--set", wrong).code == 2
        assert cmtool("train", "--out", "r", "--resume", "--set", wrong).code == 2
        assert cmtool("train", *TINY, "--out", "fresh", "--set", wrong).code == 2
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert not (tmp_path / "fresh").exists()
    foreign = tmp_path / "proj/checkpoints/step-0500"
    foreign.mkdir(parents=True)
    (foreign / "thesis.bin").write_bytes(b"x")
    assert cmtool("train", *TINY, "--out", "proj", "--overwrite").code == 2
    assert (foreign / "thesis.bin").exists()
    result = cmtool("distill", "--teacher", "r", "--out", "r", "--overwrite")
    assert result.code == 2
    assert "which is in r" in result.err


@pytest.mark.usefixtures("bare_runs")
def test_a_run_that_overwrites_another_forgets_where_that_began(cmtool, tmp_path):
    begun = ["train", "--preset", "digits-edm", *TINY, "--set", "train.steps=1", "--overwrite"]
    begun += ["--out"]
    assert cmtool(*begun, "first").code == 0
    assert cmtool(*begun, "second", "--init", "first").code == 0
    lost = cmtool(*begun, "first", "--init", "first")
    assert (lost.code, "which is in first" in lost.err) == (2, True)
    facts = tmp_path / "second" / "run.json"
    assert "first" in json.loads(facts.read_text())["init"]["source"]
    assert cmtool(*begun, "second").code == 0
    assert json.loads(facts.read_text())["init"] is None


@pytest.mark.usefixtures("bare_runs")
def test_default_run_folders_are_numbered(cmtool):
    arguments = ["train", *TINY, "--set", "train.steps=1"]
    assert cmtool(*arguments).text == "runs/digits-edm/checkpoints/step-0000001\n"
    assert cmtool(*arguments).text == "runs/digits-edm-2/checkpoints/step-0000001\n"


def test_a_default_folder_in_which_nothing_came_to_be_is_removed(cmtool, tmp_path):
    assert cmtool("train", *TINY, "--set", "loss.levels=typo").code == 2
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").write_text("")
    result = cmtool("train", *TINY)
    assert result.code == 3
    assert "cannot make runs/digits-edm: Not a directory" in result.err


@pytest.mark.usefixtures("bare_runs")
def test_resume_with_another_preset_shows_the_difference(cmtool):
    assert cmtool("train", *TINY, "--set", "train.steps=2", "--out", "r").code == 0
    result = cmtool("train", "--out", "r", "--resume", "--set", "train.lr=0.5")
    assert result.code == 2
    assert "train had {'lr': 0.002}, now {'lr': 0.5}" in result.err
    result = cmtool("train", "--out", "r", "--resume", "--set", "run.log_every=9")
    assert result.code == 0, result.err


def resumed(cmtool, *arguments):
    return cmtool("train", "--out", "r", "--resume", *arguments)


@pytest.mark.usefixtures("bare_runs")
def test_a_resumed_run_may_change_what_has_no_part_in_the_result(cmtool, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        picture = torch.full((3, 8, 8), 10 * i, dtype=torch.uint8)
        (images / f"{i}.png").write_bytes(png_bytes(picture))
    free = ["--set", "model.num_classes=0", "--set", "sample.steps=1"]
    arguments = ["train", *TINY, *free, "--set", "train.steps=2", "--out", "r"]
    assert cmtool(*arguments, "--data", "images").code == 0
    images.rename(tmp_path / "moved")
    moved = resumed(
        cmtool, "--data", "moved", "--accumulate", "2", "--set", "run.checkpoint_every=9",
        "--set", "data.timeout=5", "--set", "description=mine",
    )  # fmt: skip
    assert moved.code == 0, moved.err
    text = (tmp_path / "r/preset.toml").read_text()
    preset = tomllib.loads(text)
    assert (preset["data"]["path"], preset["train"]["accumulate"]) == ("moved", 2)
    assert 'path = "moved" # --data' in text
    assert "batch = 8 # --set" in text  # what is kept keeps its origin
    assert resumed(cmtool).code == 0  # with what was changed
    (tmp_path / "moved/0.png").write_bytes(png_bytes(torch.ones(3, 8, 8, dtype=torch.uint8)))
    other = resumed(cmtool)
    assert other.code == 2
    assert "was started with another data: {'fingerprint': " in other.err


@pytest.mark.usefixtures("bare_runs")
def test_a_run_gets_more_steps_only_where_those_it_has_done_stay_the_same(cmtool, tmp_path):
    constant = ["--set", "train.decay_to=1", "--set", "sample.steps=1"]
    arguments = ["train", *TINY, *constant, "--out", "r"]
    assert cmtool(*arguments, "--set", "train.steps=2").code == 0
    assert resumed(cmtool, "--set", "train.steps=5").code == 0
    assert resumed(cmtool).text == "r/checkpoints/step-0000005\n"  # preset.toml says so now
    straight = cmtool(*arguments[:-1], "s", "--set", "train.steps=5")
    assert straight.code == 0
    assert_equal(tmp_path / "r/checkpoints/step-0000005", tmp_path / "s/checkpoints/step-0000005")
    fewer = resumed(cmtool, "--set", "train.steps=3")
    assert (fewer.code, fewer.out) == (2, b"")
    assert "train.steps = 3: r is at step 5" in fewer.err


@pytest.mark.parametrize(
    ("preset", "may"),
    [
        ("cifar10-cd-lpips", True),  # one grid, one rate
        ("digits-pd", True),  # stages of a fixed length
        ("digits-edm", False),  # a cosine to the last step
        ("digits-ct", False),  # N(k) grows with k/K
        ("cifar10-ct", False),
    ],
)
def test_which_schedules_know_the_last_step(preset, may):
    a, b = (load_preset(preset, {"train.steps": steps}) for steps in (700, 1000))
    assert same_so_far(a, b) == same_so_far(b, a) == may
    assert same_so_far(a, a)


@pytest.mark.usefixtures("bare_runs")
def test_distill_trains_a_consistency_model_from_the_teacher(cmtool):
    result = cmtool(
        "distill", "--teacher", "digits-edm", "--out", "s", "--json",
        "--set", "train.steps=2", "--set", "train.batch=8",
    )  # fmt: skip
    assert result.code == 0, result.err
    facts = json.loads(result.text)
    assert facts["kind"] == "consistency"
    assert facts["checkpoint"] == "s/checkpoints/step-0000002"


@pytest.mark.usefixtures("bare_runs")
def test_a_student_takes_the_architecture_of_its_teacher(cmtool, tmp_path):
    assert cmtool("train", *TINY, "--set", "train.steps=2", "--out", "runs/t").code == 0
    result = cmtool("distill", "--out", "s", "--set", "train.steps=1", "--set", "train.batch=8")
    assert result.code == 0, result.err
    assert "teacher: runs/t" in result.err
    text = (tmp_path / "s/preset.toml").read_text()
    preset = tomllib.loads(text)
    assert preset["model"]["network"]["model_channels"] == 16
    assert preset["model"]["network"]["dropout"] == 0.0
    assert "# teacher runs/t" in text
    teacher = json.loads((tmp_path / "s/run.json").read_text())["teacher"]
    ema = tmp_path / "runs/t/checkpoints/step-0000002/ema.safetensors"
    assert teacher["sha256"] == hashlib.sha256(ema.read_bytes()).hexdigest()


@pytest.mark.parametrize(("named", "taken"), [("", "digits"), ("'emoji'", "emoji")])
def test_a_file_that_names_no_images_takes_the_teachers(cmtool, tmp_path, named, taken):
    data = f"[data]\npath = {named}\n" if named else ""
    (tmp_path / "mine.toml").write_text(f'extends = "cd"\n{data}')
    result = cmtool("distill", "--teacher", "digits-edm", "--preset", "mine.toml", "--dry-run")
    assert result.code == 0, result.err
    assert tomllib.loads(result.text)["data"]["path"] == taken


@pytest.mark.usefixtures("bare_runs")
def test_a_resumed_distillation_keeps_its_teacher(cmtool):
    assert cmtool("train", *TINY, "--set", "train.steps=2", "--out", "runs/t").code == 0
    arguments = ["distill", "--out", "s", "--set", "train.steps=1", "--set", "train.batch=8"]
    assert cmtool(*arguments, "--teacher", "runs/t").code == 0
    assert cmtool("train", *TINY, "--set", "train.steps=1", "--out", "runs/newer").code == 0
    again = cmtool("distill", "--out", "s", "--resume")
    assert again.code == 0, again.err
    assert "teacher: runs/t\n" in again.err
    other = cmtool("distill", "--out", "s", "--resume", "--teacher", "runs/newer")
    assert other.code == 2
    assert "another teacher" in other.err


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("train.optimizer=adan", "adam"),
        ("train.optimizer={name='adam', lr=1}", "betas"),
        ("data.fit=bx", "box"),
        ("loss.distance=l3", "l2"),
        ("loss.weight=unifrom", "uniform"),
        ("loss.solver=huen", "heun"),
        ("loss.levels=rampp", "ramp"),
        ("loss.curriculum.nn=3", "n"),
        ("run.eval_metric=fd-digit", "fd-digits"),
        ("sample.sampler=huen", "heun"),
        ("model.network.dropuot=0.1", "dropout"),
        ("model.scalings=edn", "edm"),
        ("model.channels=4", "--set model.channels=3"),
    ],
)
def test_what_does_not_exist_is_refused_before_it_is_used(cmtool, value, wanted):
    for more in (["--dry-run"], ["--set", "train.steps=1", "--out", "r"]):
        result = cmtool("train", "--preset", "digits-edm", "--set", value, *more)
        assert result.code == 2, result.err
        assert value.partition("=")[0].rsplit(".", 1)[0].split(".")[-1] in result.err
        assert wanted in result.err.splitlines()[-1]


def test_dry_run_prints_the_preset_and_writes_nothing(cmtool, tmp_path):
    result = cmtool("distill", "--dry-run", "--metric", "l1", "--seed", "5", "--out", "r")
    assert result.code == 0
    preset = tomllib.loads(result.text)
    assert preset["loss"]["distance"] == "l1"
    assert preset["train"]["seed"] == 5
    assert "# --metric" in result.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("bare_runs")
def test_a_student_of_a_teacher_that_saw_warped_images_keeps_its_network_and_sees_none(
    cmtool, tmp_path
):
    warped = ["--set", "data.augment=0.5", "--set", "model.network.augment_dim=9"]
    steps = ["--set", "train.steps=2", *TINY]
    teacher = cmtool("train", "--preset", "digits-edm", "--out", "t", *warped, *steps)
    assert teacher.code == 0, teacher.err
    student = cmtool("distill", "--teacher", "t", "--preset", "digits-cd", "--out", "s", *steps)
    assert student.code == 0, student.err
    preset = tomllib.loads((tmp_path / "s" / "preset.toml").read_text())
    assert preset["model"]["network"]["augment_dim"] == 9
    assert preset["data"]["augment"] == 0
    refused = cmtool("distill", "--teacher", "t", "--preset", "digits-cd", *warped, *steps)
    assert refused.code == 2
    assert "data.augment = 0.5 for a model that is not an EDM teacher" in refused.err


def test_help_and_page_name_every_distance():
    (option,) = DistanceOption.__metadata__
    assert option.help.split(": ")[1].rstrip(".").split(", ") == sorted(DISTANCES)
    page = (Path(__file__).parents[2] / "cmtool/docs/presets.md").read_text()
    assert all(f"`{name}`" in page for name in DISTANCES)


MINE = 'extends = "digits-ct"\n[train]\nbatch = 16\n'


@pytest.mark.parametrize(
    ("preset", "overrides", "noted"),
    [
        ("digits-ct", {"train.batch": 32}, "batch is 32. The preset has 64"),
        ("digits-ct", {"train.batch": 64}, None),
        ("digits-ct", {"train.batch": 32, "train.lr": 5e-4}, None),
        ("mine.toml", {}, "batch is 16. The preset has 64, and its train.lr of 0.001 is tuned"),
        ("mine.toml", {"train.batch": 64}, None),
        ("whole.toml", {}, None),
    ],
)
def test_a_batch_other_than_the_presets_is_noted(
    preset, overrides, noted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(MINE)
    Path("whole.toml").write_text(to_toml(load_preset("digits-ct", {"train.batch": 16})))
    note_batch(resolve(preset, {"--set": overrides}), preset)
    notes = capsys.readouterr().err
    if noted is None:
        assert notes == ""
    else:
        assert noted in notes
        assert "--accumulate" in notes


@pytest.mark.usefixtures("bare_runs")
def test_a_batch_is_noted_before_training_and_not_on_resuming(cmtool):
    Path("mine.toml").write_text(MINE)
    arguments = ["train", "--preset", "mine.toml", *TINY[2:], "--set", "train.steps=1"]
    result = cmtool(*arguments, "--out", "r")
    before, after = result.err.split("note: the global batch is 16")
    assert "step=1" in after
    assert "step=1" not in before
    again = cmtool(*arguments, "--out", "r", "--resume")
    assert "note: a global batch" not in again.err


@pytest.mark.usefixtures("bare_runs")
def test_consistency_training_can_start_from_a_teacher(cmtool):
    """As the released script of ImageNet does, and continuous time must."""
    tiny = ["--set", "train.steps=1", "--set", "train.batch=4", "--set", "train.lr=1e-9"]
    start = ["--preset", "digits-ct", "--set", "train.from_teacher=true", "--device", "cpu", *tiny]
    refused = cmtool("train", *start, "--out", "t")
    assert refused.code == 2
    assert "needs a teacher" in refused.err
    assert cmtool("distill", *start, "--out", "r").code == 0
    assert json.loads(Path("r/run.json").read_text())["teacher"]["source"] == "digits-edm"
    student = load_file("r/checkpoints/step-0000001/model.safetensors")
    teacher = load_file(ASSETS / "digits-edm.safetensors")
    for name, tensor in student.items():
        torch.testing.assert_close(tensor, teacher[name].float(), atol=1e-6, rtol=0)


def test_new_workers_of_one_torchrun_find_the_folder_that_the_first_ones_began(
    monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name, begun_by in (("x", "elsewhere:1"), ("x-2", f"{platform.node()}:{os.getppid()}")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        content = json.dumps({"state": "running", "launchers": [begun_by]})
        (tmp_path / "runs" / name / "status.json").write_text(content)
    with new_folder("x") as out:
        assert out == Path("runs/x-3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with new_folder("x") as out:
        assert out == Path("runs/x-2")
    assert not Path("runs/x-3").exists()


QUICK = ["--set", "train.steps=2", "--set", "train.batch=4", "--device", "cpu"]
NARROW = [
    "--set", "model.network.model_channels=8", "--set", "model.network.norm_groups=4",
    "--set", "model.network.head_channels=8", "--set", "sample.steps=2",
]  # fmt: skip


def own_images(folder, classes=("a", "b"), size=(8, 8), count=4):
    for label in classes:
        (folder / label).mkdir(parents=True)
        for index in range(count):
            image = torch.full((3, *size), 40 * index, dtype=torch.uint8)
            (folder / label / f"{index}.png").write_bytes(png_bytes(image))
    return folder


def test_own_images_need_no_preset(cmtool, tmp_path):
    """A teacher, its student without a word about the data, and a fine-tuned one."""
    own_images(tmp_path / "pets")
    taught = cmtool("train", "--data", "pets", "--out", "runs/t", *QUICK, *NARROW)
    assert taught.code == 0, taught.err
    assert "8x8, 2 classes, 2 steps of 4" in taught.err
    student = cmtool("distill", "--teacher", "runs/t", "--out", "runs/s", *QUICK)
    assert student.code == 0, student.err
    preset = load_preset(str(tmp_path / "runs/s/preset.toml"))
    assert preset.loss.method.name == "mid_training"
    assert preset.data.path == "pets"
    own_images(tmp_path / "drawings", classes=("x", "y", "z"))
    tuned = cmtool("train", "--init", "runs/t", "--data", "drawings", "--out", "runs/u", *QUICK)
    assert tuned.code == 0, tuned.err
    assert "new, not from runs/t: " in tuned.err
    assert "(3, 32), there (2, 32)" in tuned.err
    facts = json.loads((tmp_path / "runs/u/run.json").read_text())
    assert facts["init"]["source"] == "runs/t"
    again = cmtool(
        "train", "--out", "runs/u", "--resume", "--set", "train.steps=2", "--device", "cpu"
    )
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "runs/u/run.json").read_text())["init"]["source"] == "runs/t"


def test_a_training_that_starts_from_a_model_has_its_weights(tmp_path):
    model = load_model("digits-edm")
    other = load_preset("digits-edm", {"model.num_classes": 7})
    state = build_state(other, None, "cpu", init=model)
    ours, theirs = state.student.network.state_dict(), model.f.network.state_dict()
    different = [name for name in ours if ours[name].shape != theirs[name].shape]
    assert different == ["label_emb.weight"]
    assert [text.split()[0] for text in not_taken(other, model)] == different
    for name in ours.keys() - set(different):
        assert (ours[name] == theirs[name]).all(), name
    song = load_preset("cifar10-edm", {"model.network.model_channels": 16})
    with pytest.raises(InputError, match="no weight of digits-edm fits"):
        not_taken(song, model)


@pytest.mark.parametrize(("times", "steps"), [([], 1800), (["--max-time", "40m"], 1000)])
def test_a_fitted_preset_fills_the_time_that_is_given(cmtool, tmp_path, monkeypatch, times, steps):
    monkeypatch.setattr(planning, "seconds_a_step", lambda *_: 2.0)
    monkeypatch.setattr(planning, "MANY_STEPS", 10)
    own_images(tmp_path / "pets")
    told = cmtool("train", "--data", "pets", "--dry-run", *NARROW, *times)
    assert f"\nsteps = {steps} #" in told.out.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "edm"], "preset edm names no images"),
        (["train", "--preset", "cd", "--data", "pets"], "cmtool distill --preset cd"),
        (["train", "--init", "digits-edm", "--out", "r", "--resume"], "leave --init out"),
        (["train", "--init", "nothing", "--data", "pets"], "no model 'nothing'"),
    ],
)
def test_what_cannot_be_fitted_is_said(cmtool, tmp_path, arguments, message):
    own_images(tmp_path / "pets")
    refused = cmtool(*arguments)
    assert refused.code in (2, 3)
    assert message in refused.err


def test_several_processes_want_a_preset_that_is_fitted_already(cmtool, tmp_path, monkeypatch):
    own_images(tmp_path / "pets")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = cmtool("train", "--data", "pets")
    assert refused.code == 2
    assert "cmtool preset new" in refused.err


def test_a_run_that_memory_does_not_hold_is_refused_before_its_first_step(cmtool, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda _: 20 << 20)
    refused = cmtool("train", "--preset", "digits-edm", "--out", "r", "--device", "cpu")
    assert refused.code == 5
    assert "hint: split the batch: --accumulate " in refused.err


def test_alpha_of_training_images_lies_on_the_presets_background(cmtool, tmp_path):
    (tmp_path / "pets").mkdir()
    for index in range(3):
        picture = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 8, 4))
        picture.save(tmp_path / "pets" / f"{index}.png")
    told = cmtool("data", "info", "pets")
    assert "transparent parts are laid on white; --set data.background=black" in told.err
    assert "background        white" in told.text
    for colour in ("white", "black"):
        preset = load_preset(
            "edm", {"data.path": "pets", "data.background": colour, "model.image_size": [8, 8]}
        )
        images = load_images(preset, None).images
        assert images[0, :, 0, 0].tolist() == [255 if colour == "white" else 0] * 3
    wrong = cmtool("train", "--data", "pets", "--set", "data.background=wite", *QUICK)
    assert wrong.code == 2
    assert "white, black, grey or #ffeedd" in wrong.err
