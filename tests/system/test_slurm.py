"""Tasks of srun become processes that work together."""

import os
import subprocess
import sys

import pytest

from cmtool.system.slurm import first_host, ranks, tasks_of_nodes

TASK = {
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_a_task_knows_its_place():
    assert ranks(TASK) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": str(20_000 + 77 * 31 + 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"WORLD_SIZE": "2"},  # torchrun in srun
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": ""},
    ],
)
def test_one_task_and_torchrun_are_left_alone(change):
    assert ranks(TASK | change) == {}


def test_the_script_of_a_job_is_no_task():
    script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[1-8]"}
    assert ranks(script) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n07", "n07"), ("n[07-09,12],m3", "n07"), ("m3,n[1-2]", "m3"), ("r1-n[3,5]-ib", "r1-n3-ib"),
     ("a.b.c,d", "a.b.c"), ("", "localhost")],
)  # fmt: skip
def test_the_first_host_is_where_all_meet(nodes, first):
    assert first_host(nodes) == first


def test_the_tasks_of_nodes_are_counted():
    assert tasks_of_nodes("4(x2),3") == [4, 4, 3]
    assert tasks_of_nodes("2") == [2]


@pytest.mark.slow
def test_a_stand_in_srun_trains_and_goes_on_as_torchrun_does(tmp_path):
    """Two tasks of a stand-in train together, and the same command goes on where they stopped."""
    words = ["train", "--preset", "digits-ct", "--set", "train.steps=6", "--set", "train.batch=4",
             "--set", "run.checkpoint_every=3", "--set", "run.sample_every=6", "--device", "cpu",
             "--out", "run", "--resume", "auto"]  # fmt: skip

    def srun(*more):
        tasks = []
        for rank in range(2):
            place = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_NODEID": "0",
                     "SLURM_LOCALID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "2",
                     "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()),
                     "OMP_NUM_THREADS": "1"}  # fmt: skip
            program = [sys.executable, "-m", "cmtool", *words, *more]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            tasks.append(subprocess.Popen(program, cwd=tmp_path, env=os.environ | place, **pipes))
        outputs = [task.communicate(timeout=200) for task in tasks]
        return [task.returncode for task in tasks], outputs

    codes, outputs = srun("--max-time", "0")
    assert codes == [75, 75], outputs
    codes, outputs = srun()
    assert codes == [0, 0], outputs
    assert "step-0000006" in outputs[0][0]
    assert not outputs[1][0]
    assert '"processes": 2' in (tmp_path / "run" / "run.json").read_text()
