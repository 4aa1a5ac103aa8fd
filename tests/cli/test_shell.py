"""How cmtool behaves as a program among programs: start-up, pipes, help."""

import os
import subprocess
import sys

import pytest

CMTOOL = f"{sys.executable} -m cmtool"


def shell(command, cwd):
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True)


def cpu_of_children():
    """CPU seconds of processes that ended: what else the machine does has little part in them."""
    return sum(os.times()[2:4])


def test_help_is_quick_and_imports_no_torch(tmp_path):
    program = (
        "import sys; sys.argv = ['cmtool', '--help']\n"
        "from cmtool.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'matplotlib', 'PIL', 'lpips', 'cleanfid'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    times = []
    for _ in range(3):
        start = cpu_of_children()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        times.append(cpu_of_children() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.7
    assert "Try cmtool demo first" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "preset show digits-cd | head -1",
        "sample -c digits-cd --seeds 0-63 --batch 4 --out s | head -1",
    ],
)
def test_a_closed_pipe_is_not_an_error(tmp_path, command):
    done = shell(f"{CMTOOL} {command}; echo ${{PIPESTATUS[0]}}", tmp_path)
    first, status = done.stdout.splitlines()
    assert first
    assert status in ("0", "141")
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


@pytest.mark.parametrize("take", ["head -c 10", "true"])
def test_a_closed_pipe_of_bytes_is_not_an_error(tmp_path, take):
    command = f"{CMTOOL} sample -c digits-cd --seeds 0-399 --out - | {take} | wc -c"
    done = shell(f"{command}; echo ${{PIPESTATUS[0]}} >&2", tmp_path)
    assert done.stderr.splitlines()[-1] in ("0", "141")
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_commands_make_a_pipeline(tmp_path):
    done = shell(
        f"{CMTOOL} sample -c digits-cd --seeds 0-3 --out s | xargs -n1 head -c4 | grep -c PNG",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_prints_nothing_but_its_checkpoint(tmp_path):
    done = shell(
        f"{CMTOOL} train --set train.steps=1 --set train.batch=4 --out r 2>/dev/null", tmp_path
    )
    assert done.stdout == "r/checkpoints/step-0000001\n"


def test_a_picture_does_not_go_to_a_terminal(tmp_path):
    command = f"{CMTOOL} sample -c digits-cd --out -"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "a picture would go to the terminal" in done.stdout
