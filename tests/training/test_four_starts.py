"""One command, repeated as a scheduler does, ends in the bits of a run that nothing disturbed."""

import os
import shutil
import signal
import time

import pytest

from tests.cli.conftest import TINY
from tests.faults import Command, assert_same_run, fast_disk, leftovers, status, steps
from tests.processes import free_port

pytestmark = pytest.mark.slow

LENGTH = 60
COMMAND = [
    "train", "--preset", "digits-ct", *TINY, "--set", f"train.steps={LENGTH}",
    "--set", "run.checkpoint_every=5", "--resume", "auto",
]  # fmt: skip


def alone():
    return [{}]


def torchrun():
    port = str(free_port())
    meeting = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    return [{"RANK": str(n), "LOCAL_RANK": str(n), **meeting} for n in range(2)]


def srun():
    here = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7",
            "MASTER_PORT": str(free_port())}  # fmt: skip
    return [{**here, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]


def start(launcher, folder, name, time_limit):
    words = [*COMMAND, "--max-time", time_limit, "--out", name]
    return [
        Command(*words, folder=folder, environment={**os.environ, **place}, bare=True)
        for place in launcher()
    ]


def ends(ranks):
    return [rank.finish()[0] for rank in ranks]


def newest(out):
    return steps(out)[-1] if (out / "checkpoints").is_dir() and steps(out) else 0


@pytest.mark.parametrize("launcher", [alone, torchrun, srun])
def test_four_starts_and_a_power_cut_end_bit_equal(launcher, tmp_path):
    is_torchrun = launcher is torchrun
    with fast_disk() as folder:
        run, straight = folder / "run", folder / "straight"
        ranks = start(launcher, folder, "straight", "10m")
        ranks[0].wait_for(lambda: newest(straight) > 0)
        began = time.monotonic()
        assert set(ends(ranks)) == {0}
        limit = max(int((time.monotonic() - began) / 3), 1)  # seconds for a third of the steps

        def again():
            return start(launcher, folder, "run", f"{limit}s")

        def struck(number, which=slice(None)):
            """Return how the ranks end that a signal meets before their time is up.

            On a busy machine the time may be up first: then once more from there, with more time.
            """
            nonlocal limit
            for _ in range(5):
                shutil.copytree(run, folder / "kept", symlinks=True)
                ranks, before = again(), newest(run)
                ranks[0].wait_for(lambda before=before: newest(run) > before)
                for rank in ranks[which]:
                    rank.send(number)
                codes = ends(ranks)
                if not set(codes) & {0, 75}:
                    break
                shutil.rmtree(run)
                shutil.move(folder / "kept", run)
                limit *= 2
            shutil.rmtree(folder / "kept", ignore_errors=True)
            return codes

        ranks = again()  # the time is up
        assert set(ends(ranks)) == {0 if is_torchrun else 75}
        assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 75)

        assert set(struck(signal.SIGTERM)) == {143}
        assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 143)

        last = struck(signal.SIGKILL, slice(-1, None))
        assert last == ([5, -9] if len(last) > 1 else [-9])
        assert set(struck(signal.SIGKILL)) == {-9}

        deadline = time.monotonic() + 200
        while status(run)["state"] != "done":
            assert time.monotonic() < deadline
            assert set(ends(again())) <= {0, 75}
        assert newest(run) == LENGTH
        assert_same_run(folder / "straight", run)
        assert leftovers(run) == []
        last = again()[0].finish()
        assert last[:2] == (0, f"run/checkpoints/step-{LENGTH:07d}\n")
