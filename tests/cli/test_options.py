import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
import typer

from cmtool.cli import build_app
from cmtool.cli._devices import own_device, pick_device
from cmtool.cli._edits import EditOptions
from cmtool.cli._options import with_options
from cmtool.cli.edit import EDITS
from cmtool.errors import ResourceError, UserError


@pytest.mark.parametrize(
    ("name", "num_gpus", "rank", "size", "device"),
    [
        ("auto", 0, 0, 1, "cpu"),
        ("auto", 0, 1, 2, "cpu"),
        ("auto", 1, 0, 1, "cuda"),
        ("auto", 8, 3, 8, "cuda:3"),
        ("cuda", 4, 1, 2, "cuda:1"),
        ("cuda:2", 4, 0, 1, "cuda:2"),
        ("cpu", 1, 1, 2, "cpu"),
    ],
)
def test_each_process_gets_a_gpu_of_its_own(name, num_gpus, rank, size, device):
    assert own_device(name, num_gpus, rank, size) == device


def test_an_apple_gpu_is_taken_by_one_process_where_there_is_no_other():
    assert own_device("auto", 0, 0, 1, has_mps=True) == "mps"
    assert own_device("auto", 1, 0, 1, has_mps=True) == "cuda"
    assert own_device("auto", 0, 1, 2, has_mps=True) == "cpu"


def test_one_gpu_for_several_processes_is_refused():
    with pytest.raises(UserError, match=r"--device cuda:0 for 2 processes") as caught:
        own_device("cuda:0", 8, 1, 2)
    assert (caught.value.exit_code, "give cuda" in caught.value.hint) == (2, True)


@pytest.mark.parametrize(
    ("name", "num_gpus", "remedy"),
    [("auto", 1, "--nproc-per-node 1"), ("cuda", 2, "--nproc-per-node 2"), ("cuda", 0, "cpu")],
)
def test_more_processes_than_gpus_are_refused(name, num_gpus, remedy):
    with pytest.raises(ResourceError, match=f"4 processes on .* {num_gpus} GPUs") as caught:
        own_device(name, num_gpus, 0, 4)
    assert remedy in caught.value.hint


@pytest.mark.parametrize(("local_rank", "told"), [(0, True), (1, False)])
def test_the_first_process_on_each_machine_tells_of_its_device(
    local_rank, told, cmtool, monkeypatch
):
    for key, value in {"RANK": 2 + local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank,
                       "LOCAL_WORLD_SIZE": 2}.items():  # fmt: skip
        monkeypatch.setenv(key, str(value))
    result = cmtool("train", "--preset", "digits-ct", "--device", "cuda:7")
    assert result.code == 2
    assert ("error: rank 2: --device cuda:7 for 2 processes" in result.err) == told


ODD_VARIABLES = [
    {"RANK": "abc", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "0"}, {"RANK": ""},
    {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "1"},
    {"RANK": "1", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "x"}, {"LOCAL_WORLD_SIZE": ""},
    {"RANK": "\u0661", "WORLD_SIZE": "2"}, {"RANK": "1.0", "WORLD_SIZE": "2"},
    {"TORCHELASTIC_MAX_RESTARTS": "x"}, {"WORLD_SIZE": "9" * 5000, "RANK": "9" * 5000},
]  # fmt: skip


@pytest.mark.parametrize("variables", ODD_VARIABLES, ids=lambda v: str(v)[:50])
def test_variables_that_torchrun_would_not_set_are_refused_by_every_process(
    cmtool, monkeypatch, variables
):
    """Leftovers of a cluster: a hang, a traceback, or no word and exit code 0."""
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    result = cmtool("sample", "-c", "digits-cd", "--seeds", "0", "--out", "s")
    assert (result.code, result.out) == (2, b"")
    error, hint = result.err.splitlines()
    assert any(key in error for key in variables)
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in hint


@pytest.mark.parametrize(
    "variables", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_ADDR": "x", "MASTER_PORT": "x"},
                  {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}],
    ids=str,
)  # fmt: skip
def test_processes_without_a_place_to_meet_are_sent_to_torchrun(cmtool, monkeypatch, variables):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(key, value)
    result = cmtool("sample", "-c", "digits-cd", "--seeds", "0", "--out", "s", "--device", "cpu")
    assert result.code == 2, result.err
    assert "error: the processes cannot find each other: " in result.err
    assert "hint: start all of them with torchrun" in result.err


def parameters(*path):
    """The options of a command, and what each is set to when it is left out."""
    command = typer.main.get_command(build_app())
    for name in path:
        command = command.commands[name]
    return {p.name: (sorted([*p.opts, *p.secondary_opts]), p.default) for p in command.params}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_has_the_shared_options_and_its_own(name):
    row = EDITS[name]
    own = inspect.signature(row.prepare).parameters
    shared = {field.name for field in dataclasses.fields(EditOptions)}
    assert parameters("edit", name).keys() == (shared - set(row.without)) | own.keys()


def test_distill_is_train_with_a_teacher():
    train, distill = parameters("train"), parameters("distill")
    assert distill.keys() - train.keys() == {"teacher"}
    assert not train.keys() - distill.keys()
    assert all(train[name] == distill[name] for name in train.keys() & distill.keys())


def test_shared_options_arrive_where_a_command_reads_them():
    @dataclasses.dataclass(frozen=True)
    class Shared:
        a: int = 1
        b: int = 2

    seen = []
    command = with_options(lambda options, c=3: seen.append((options, c)), Shared, without=["b"])
    assert list(inspect.signature(command).parameters) == ["c", "a"]
    command(a=5, c=6)
    assert seen == [(Shared(5, 2), 6)]


def test_a_command_loads_its_own_module_alone():
    """To load all of them takes 0.1 s, at each start."""
    code = (
        "import sys; from cmtool.cli import build_app; build_app('sample')\n"
        "print(*sorted(name for name in sys.modules if name.startswith('cmtool.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = [name for name in done.stdout.split() if not name.startswith("cmtool.cli._")]
    assert own == ["cmtool.cli.sample"]


def test_a_gpu_that_the_launcher_gave_to_each_process_is_taken(monkeypatch):
    """As Slurm does with --gpus-per-task=1: each process sees one, and calls it cuda:0."""
    for rank in (0, 1):
        assert own_device("auto", 1, rank, 2, is_given=True) == "cuda:0"
        assert own_device("cuda", 1, rank, 2, is_given=True) == "cuda:0"
    assert own_device("cpu", 1, 1, 2, is_given=True) == "cpu"
    chosen = []
    monkeypatch.setattr("cmtool.cli._devices._check_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="2 processes on a machine with 1 GPUs"):
        pick_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert pick_device("auto") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == "cuda:1"
    assert chosen == ["cuda:0", "cuda:1"]
