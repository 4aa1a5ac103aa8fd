"""The recipes of `cmtool explain schedulers`, run as far as stand-ins for the schedulers go."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from cmtool.docs import page

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", page("schedulers"), re.MULTILINE | re.DOTALL)
TINY = (
    "--teacher digits-edm --preset digits-cmt --set train.steps=4 --set train.batch=4 --device cpu"
    " --set run.sample_every=4 --set loss.source.points=4"
)
SRUN = """#!/bin/bash
# two tasks of one node
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
export SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""


def block(language, *words):
    (found,) = [b for kind, b in BLOCKS if kind == language and all(word in b for word in words)]
    return found


def install(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """Run a script with bash where `cmtool` and `torchrun` are those of this Python."""
    bin_ = tmp_path / "bin"
    install(bin_, "cmtool", f'#!/bin/bash\nexec {sys.executable} -m cmtool "$@"\n')
    launcher = f'{sys.executable} -m torch.distributed.run "$@"'
    install(bin_, "torchrun", f"#!/bin/bash\nexec {launcher}\n")

    def run(script, **variables):
        here = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
        path = f"{bin_}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **here, "PATH": path},
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip

    run.bin = bin_
    return run


def small(script, folder, time="11h30m"):
    script = re.sub(r"--teacher \S+", TINY, script).replace("/runs/", f"{folder}/runs/")
    return script.replace("11h30m", time)


@pytest.mark.slow
def test_the_job_of_slurm_is_put_into_the_queue_again_until_it_is_done(shell, tmp_path):
    install(shell.bin, "srun", SRUN)
    install(shell.bin, "scontrol", '#!/bin/bash\necho "$@" >> asked\n')
    script, asked = block("bash", "#SBATCH"), tmp_path / "asked"
    for time, code in (("0s", 75), ("11h30m", 0), ("11h30m", 0)):
        ended = shell(small(script, tmp_path, time), SLURM_JOB_ID="7")
        assert ended.returncode == code, ended.stderr
        assert asked.read_text() == "requeue 7\n"
    assert ended.stdout == "runs/cd/checkpoints/step-0000004\n"
    assert status(tmp_path)["state"] == "done"


def status(folder):
    return json.loads((folder / "runs" / "cd" / "status.json").read_text())


@pytest.mark.slow
def test_the_jobs_of_skypilot_and_kubeflow_train_one_run(shell, tmp_path):
    sky = yaml.safe_load(block("yaml", "SKYPILOT"))
    assert sky["file_mounts"].keys() == {"/runs"}
    place = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1",
             "SKYPILOT_NUM_GPUS_PER_NODE": "2"}  # fmt: skip
    ended = shell(small(sky["run"], tmp_path).rstrip() + " --max-time 0s", **place)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert status(tmp_path)["state"] == "stopped"
    job = yaml.safe_load(block("yaml", "TrainJob"))
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    place = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2",
             "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29511"}  # fmt: skip
    ended = shell(small(" ".join(trainer["command"]), tmp_path), **place)
    assert ended.returncode == 0, ended.stderr
    assert status(tmp_path)["state"] == "done"
    assert '"processes": 2' in (tmp_path / "runs" / "cd" / "run.json").read_text()


def test_setups_and_scripts_are_shell():
    scripts = [block("bash", "#SBATCH"), yaml.safe_load(block("yaml", "SKYPILOT"))["setup"]]
    scripts += [b for kind, b in BLOCKS if kind == "sh"]
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


INSTRUCTIONS = {"FROM", "COPY", "RUN", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT"}


def test_the_dockerfile_has_known_instructions_and_installs_what_it_copies():
    text = block("dockerfile")
    lines = [line.split(" ", 1) for line in text.splitlines()]
    assert {word for word, _ in lines} == INSTRUCTIONS
    found = dict(lines)
    assert json.loads(found["ENTRYPOINT"]) == ["cmtool"]
    assert found["FROM"].startswith("python:3.")
    source, target = found["COPY"].split()
    assert source == "."
    assert found["RUN"].endswith(target)
