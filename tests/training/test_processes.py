"""What several processes of one run do together, and when one of them fails; exit codes by rank."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.data.batches import permutation
from cmtool.formats.native import read_about, read_weights, write_weights
from cmtool.models import ASSETS
from cmtool.training.log import read_log
from cmtool.training.state import SHARDED_FORWARD_MODE
from tests import processes
from tests.cli.conftest import TINY
from tests.training.test_torchrun import EDM2, assert_alike, tensors

pytestmark = pytest.mark.slow

BUNDLED = str(ASSETS / "digits-cd.safetensors")
METHODS = {
    "ct": ["train", "--preset", "digits-ct", *TINY],
    "cd": [
        "distill", "--preset", "digits-cd", "--teacher", "digits-edm", *TINY[:2], *TINY[-4:],
        "--set", "loss.target=ema", "--set", "loss.curriculum.mu=0.9",
    ],
}  # fmt: skip
LIVE = "cd, continuous and live"
METHODS[LIVE] = [
    *METHODS["cd"][:-4], "--set", "loss.method=live_distillation", "--set", "loss.levels=ramp",
    "--set", "model.network.dropout=0.1",
]  # fmt: skip
METHODS["with a module of its own"] = [*METHODS["ct"], "--set", "loss.method=weighed"]
METHODS["edm2"] = [
    "train", "--preset", "digits-edm", "--set", EDM2, "--set", "train.batch=8", *TINY[-4:],
    "--set", "loss.method=uncertain_denoising", "--set", "run.ema_every=3",
    "--set", "train.ema=[{name='ema', sigma_rel=0.1}]",
]  # fmt: skip
CONTINUOUS = ["--set", "loss.levels=ramp", "--set", "loss.target=student"]
GIVEN = ["--teacher", "digits-edm", *TINY[:2], *TINY[-4:]]
EDM2_TINY = ["--set", EDM2, *TINY[:2], *TINY[-4:]]
NEWER = ("ecd", "cmt", "sct", "scd")
ROUNDS = {
    "edm": ["train", "--preset", "digits-edm", *TINY],
    "edm, warped": [
        *["train", "--preset", "digits-edm", *TINY, "--set", "data.augment=0.5"],
        *["--set", "model.network.augment_dim=9", "--set", "train.precision=bf16"],
    ],
    "ct": ["train", "--preset", "digits-ct", *TINY],
    "ct, scaled and computed again": [
        *["train", "--preset", "digits-ct", *TINY, "--set", "train.precision=fp16"],
        *["--set", "train.checkpoint_activations=true", "--set", "model.network.dropout=0.1"],
    ],
    "ct, continuous": [
        *["train", "--preset", "digits-ct", *TINY, *CONTINUOUS],
        *["--set", "loss.method=continuous_training"],
    ],
    "cd, continuous and live": [
        *["distill", "--preset", "digits-cd", *GIVEN, *CONTINUOUS],
        *["--set", "loss.method=live_distillation", "--set", "model.network.dropout=0.1"],
    ],
    "edm2, its own loss and averages": [
        *["train", "--preset", "digits-edm", *EDM2_TINY],
        *["--set", "loss.method=uncertain_denoising"],
        *["--set", "train.ema=[{name='ema', sigma_rel=0.1}]"],
    ],
    "ict on edm2, computed again": [
        *["train", "--preset", "digits-ict", *EDM2_TINY],
        *["--set", "train.checkpoint_activations=true"],
    ],
    **{
        name: ["distill", "--preset", f"digits-{name}", *GIVEN]
        for name in ("ecd", "cmt", "sct", "scd")
    },
    "adcm": ["distill", "--preset", "digits-adcm", *GIVEN, "--set", "loss.method.lam=2.0"],
    "meanflow": [
        *["train", "--preset", "digits-meanflow", *TINY, "--set", "model.network.two_time=true"]
    ],
    "tcm": ["distill", "--preset", "digits-tcm", "--teacher", BUNDLED, *GIVEN[2:]],
}
SHARDED = ["--set", "run.sharding=fsdp"]
AGAIN = ["--set", "train.checkpoint_activations=true"]


def job(out, *arguments, method="ct", processes=2, **more):
    arguments = [*METHODS[method], "--out", str(out), *arguments]
    return {"processes": processes, "arguments": arguments, "bare": True, **more}


def run(*jobs):
    """Of each job the exit codes by rank and the seconds from first to last; all their stderr."""
    ends, _, stderr = processes.run(*jobs)
    return ends, stderr


def status(out):
    return json.loads((out / "status.json").read_text())


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def errors(stderr):
    return sorted(line for line in stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("part", [0, 1])  # each for a core
def test_two_processes_are_bit_equal_to_two_rounds(part, tmp_path):
    names = list(ROUNDS)[part::2]
    steps = ["--set", "train.steps=4", "--set", "run.sample_every=9", "--set", "run.sample_grid=2"]
    jobs = [
        {
            "processes": processes, "bare": True, "arguments": [
                *ROUNDS[name], "--out", str(tmp_path / name / str(processes)), *steps,
                "--accumulate", str(3 - processes),
            ]
        }
        for name in names for processes in (2, 1)
    ]  # fmt: skip
    ends, stderr = run(*jobs)
    assert [codes for codes, _ in ends] == [[0, 0], [0]] * len(names), stderr
    for name in names:
        assert_alike(tmp_path / name / "1", tmp_path / name / "2")


def test_an_exception_in_one_process_ends_the_other_which_names_it(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, seconds),), stderr = run(job(out, *steps, fault=["boom", 1, 7]))
    assert codes == [5, 1]
    assert seconds < 10
    told = "rank 1 failed after step 7: ValueError('boom')"
    assert errors(stderr) == [f"error: rank 0: {told}"]
    assert stderr.count("Traceback") == 1  # a bug, of rank 1 alone
    assert "in rank 1, after step 7" in stderr
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert status(out)["error"] == told
    assert checkpoints(out) == ["latest.json", "step-0000003", "step-0000006"]


def test_a_damaged_image_that_one_process_meets_ends_both_and_is_named_by_both(tmp_path):
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for i in range(64):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i:02}.png")
    damaged = images / f"{int(permutation(64, 0, 0)[5 * 8 + 4]):02}.png"  # rank 1 sees it at step 5
    damaged.write_bytes(damaged.read_bytes()[:60])
    options = ["--data", str(images), "--set", "model.num_classes=0", "--set", "data.workers=0"]
    ((codes, _),), stderr = run(job(out, *options, "--set", "train.steps=100000", stream=True))
    assert codes == [5, 3]
    ours, theirs = errors(stderr)
    assert ours.startswith("error: rank 0: rank 1 failed after step 5: ")
    assert theirs.startswith("error: rank 1: ")
    assert damaged.name in ours
    assert damaged.name in theirs
    assert status(out)["exit_code"] == 5
    assert damaged.name in status(out)["error"]
    assert "Traceback" not in stderr


def test_when_the_leading_process_is_killed_another_says_so_in_its_place(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, _),), stderr = run(job(out, *steps, fault=["killed", 0, 7]))
    assert codes == [-9, 5]
    (told,) = errors(stderr)
    assert told.startswith("error: rank 1: no contact with another process after step 7: ")
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert status(out)["error"] in told
    assert status(out)["step"] == 6


def test_a_process_that_hangs_is_given_up_after_the_time_that_was_set(tmp_path):
    out = tmp_path / "run"
    steps = ["--set", "train.steps=100000", "--set", "run.checkpoint_every=3"]
    ((codes, _),), stderr = run(
        job(out, *steps, "--set", "run.timeout=4", fault=["hangs", 1, 7], patience=1)
    )
    assert codes == [5, -9]
    assert errors(stderr) == [
        "error: rank 0: no contact with another process after step 7: timed out"
    ]
    assert (status(out)["state"], status(out)["exit_code"]) == ("failed", 5)
    assert checkpoints(out) == ["latest.json", "step-0000003", "step-0000006"]


def test_a_process_that_compiles_for_longer_is_waited_for(tmp_path):
    """Twice as long as silence is allowed; what is computed meanwhile leaves no trace."""
    late, plain = tmp_path / "late", tmp_path / "plain"
    steps = ["--set", "train.steps=4", "--set", "run.timeout=4"]
    steps += ["--set", "model.network.dropout=0"]
    compiled = ["--set", "train.compile=true"]
    ends, stderr = run(
        job(late, *steps, *compiled, fault=["late", 1, 0], uncompiled=True),
        job(plain, *steps),
    )
    assert [codes for codes, _ in ends] == [[0, 0], [0, 0]], stderr
    assert_alike(late, plain)


def test_two_processes_resumed_as_one_end_bit_equal_to_one_that_accumulates(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    steps = ["--set", "train.steps=7", "--set", "run.checkpoint_every=2"]
    ends, stderr = run(
        job(two, *steps, fault=["killed", 1, 5]),
        job(two, *steps, "--resume", processes=1),
        job(one, *steps, "--accumulate", "2", processes=1),
    )
    assert [codes for codes, _ in ends] == [[5, -9], [0], [0]]
    assert "the batch is split into 2 parts as before, 2 for each process" in stderr
    assert f"resumed from {two}/checkpoints/step-0000004" in stderr
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert json.loads((two / "run.json").read_text())["processes"] == 1
    assert "accumulate = 2" in (two / "preset.toml").read_text()


def distances(one, two):
    """How far each file of two checkpoints is apart, relative to its norm; moments by kind."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    sums = {}
    for name in a:
        file, *_, last = name.split(".")
        kind = f"{file}.{last}" if file == "optimizer" else file
        apart, size = sums.get(kind, (0.0, 0.0))
        x, y = a[name].double(), b[name].double()
        sums[kind] = apart + float((x - y).square().sum()), size + float(x.square().sum())
    return {kind: (apart / size) ** 0.5 for kind, (apart, size) in sums.items()}


OLD = torch.__version__ < SHARDED_FORWARD_MODE  # then refused: test_state.py


@pytest.mark.parametrize("method", [m for m in METHODS if not (OLD and m == LIVE)])
def test_sharded_models_are_trained_sampled_and_saved_as_replicated_ones(method, tmp_path):
    two, sharded = tmp_path / "two", tmp_path / "sharded"
    more = ["--set", "train.steps=7", "--precision", "fp32"]
    more += ["--set", "train.max_grad_norm=0.001"] if method == "cd" else []  # else sums show
    more += ["--set", "run.eval_every=4", "--set", "run.eval_num=40", "--accumulate", "2"]
    ours = [*more, *SHARDED, *(AGAIN if method == "ct" else [])]
    ends, stderr = run(job(two, *more, method=method), job(sharded, *ours, method=method))
    assert [codes for codes, _ in ends] == [[0, 0], [0, 0]], stderr
    apart = distances(two, sharded)
    assert {"model", "ema", "optimizer.exp_avg_sq"} <= apart.keys()
    for kind, distance in apart.items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind
    a, b = ([line.get("eval") for line in read_log(out / "log.jsonl")] for out in (two, sharded))
    for ours, theirs in zip(a, b, strict=True):
        assert ours == (theirs and {**theirs, "value": pytest.approx(theirs["value"], rel=1e-4)})
    pictures = [sorted(p.name for p in (o / "samples").iterdir()) for o in (two, sharded)]
    assert pictures[0] == pictures[1] == ["step-0000007.png"]


def test_a_sharded_run_that_is_killed_goes_on_as_one_process(tmp_path):
    sharded, one = tmp_path / "sharded", tmp_path / "one"
    more = ["--set", "train.steps=7", "--set", "run.checkpoint_every=2", "--precision", "fp32"]
    ends, stderr = run(
        job(sharded, *more, *SHARDED, fault=["killed", 1, 5]),
        job(sharded, *more, "--resume", processes=1),  # its preset shards still: over one process
        job(one, *more, "--accumulate", "2", processes=1),
    )
    assert [codes for codes, _ in ends] == [[5, -9], [0], [0]], stderr
    assert f"resumed from {sharded}/checkpoints/step-0000004" in stderr
    for kind, distance in distances(one, sharded).items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind


def test_one_process_goes_on_sharded_over_two(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--set", "run.checkpoint_every=2", "--precision", "fp32"]
    steps = ["--set", "train.steps=7", "--accumulate", "2"]
    ends, stderr = run(
        job(two, *more, *steps, processes=1, fault=["killed", 0, 5]),
        job(two, *more, *SHARDED, "--resume"),
        job(one, *more, *steps, processes=1),
    )
    assert [codes for codes, _ in ends] == [[-9], [0, 0], [0]], stderr
    for kind, distance in distances(one, two).items():
        assert distance < (1e-5 if kind.startswith("optimizer") else 1e-6), kind


def test_a_disk_slower_than_the_timeout_ends_no_sharded_run(tmp_path):
    out = tmp_path / "run"
    more = ["--set", "train.steps=3", "--set", "run.checkpoint_every=2", "--set", "run.timeout=4"]
    ((codes, _),), stderr = run(job(out, *more, *SHARDED, fault=["slow disk", 0, 1]))
    assert codes == [0, 0], stderr
    assert checkpoints(out) == ["latest.json", "step-0000002", "step-0000003"]


DISAGREEING = {
    "rate": (["--set", "train.lr=0.5"], "train.lr: 0.001 in rank 0, 0.5 in rank 1"),
    "start": (["--overwrite"], "--overwrite: false in rank 0, true in rank 1"),
    "sharding": (SHARDED, 'run.sharding: "none" in rank 0, "fsdp" in rank 1'),
    "data": (["--data", "digits:held-out"], "number of images: 11536 in rank 0, 2840 in rank 1"),
}


@pytest.mark.parametrize("what", DISAGREEING)
def test_processes_that_were_started_differently_are_told_before_a_step(tmp_path, what):
    others, told = DISAGREEING[what]
    out = tmp_path / "run"
    ((codes, seconds),), stderr = run(job(out, "--set", "train.steps=3", others=others))
    assert codes == [2, 2], stderr
    (error,) = errors(stderr)
    assert error.startswith(f"error: the processes differ in {told}")
    assert seconds < 15
    assert not (out / "run.json").exists()


def test_processes_with_other_teachers_are_told(tmp_path):
    weights = read_weights(ASSETS / "digits-edm.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    other = {**weights, name: weights[name] * 1.01}
    write_weights(tmp_path / "t.safetensors", other, read_about(ASSETS / "digits-edm.safetensors"))
    others = ["--teacher", str(tmp_path / "t.safetensors")]
    disagreeing = job(tmp_path / "run", "--set", "train.steps=3", method="cd", others=others)
    ((codes, _),), stderr = run(disagreeing)
    assert codes == [2, 2], stderr
    (told,) = errors(stderr)
    assert told.startswith('error: the processes differ in teacher: "')


def drawing(tmp_path, *arguments, others=()):
    out = str(tmp_path / "images")
    arguments = ["sample", "-c", "digits-cd", "--device", "cpu", "--out", out, *arguments]
    return {"processes": 2, "arguments": arguments, "others": list(others)}


def test_processes_that_draw_compare_what_they_mean_and_not_its_words(tmp_path):
    same = drawing(tmp_path, "--seeds", "0-3", others=["--seeds", "0,1,2,3", "-c", BUNDLED])
    models = drawing(tmp_path / "b", "--seeds", "0-3", others=["-c", "digits-edm"])
    levels = drawing(tmp_path / "c", "--sigmas", "80,1", others=["--sigmas", "80,2"])
    ends, stderr = run(same, models, levels)
    assert [codes for codes, _ in ends] == [[0, 0], [2, 2], [2, 2]], stderr
    assert len(list((tmp_path / "images").iterdir())) == 4
    first, second = errors(stderr)
    assert "sigmas: [80.0, 1.0] in rank 0, [80.0, 2.0] in rank 1" in first + second
    assert 'model: "' in first + second


def test_processes_that_measure_compare_what_they_measure(tmp_path):
    arguments = ["eval", "fid", "-c", "digits-cd", "--num-images", "8", "--device", "cpu"]
    jobs = [
        {"processes": 2, "arguments": [*arguments, "--first-seed", "0"], "others": others}
        for others in (["-c", "digits-edm"], ["--first-seed", "8"], ["--reference", "digits"])
    ]
    ends, stderr = run(*jobs)
    assert [codes for codes, _ in ends] == [[2, 2], [2, 2], [0, 0]], stderr
    assert len(errors(stderr)) == 2
    assert "images: [8, 0] in rank 0, [8, 8] in rank 1" in stderr
