"""`train.deterministic`: where it holds, and that a run may take it up."""

from contextlib import contextmanager

import pytest
import torch

from cmtool.training import run as runs
from tests.cli.conftest import TINY

ON = ["--set", "train.deterministic=true"]


@pytest.mark.usefixtures("bare_runs")
def test_a_run_computes_all_of_its_steps_so_and_a_resumed_one_may_begin_to(cmtool, monkeypatch):
    """What it does on a GPU is replaced; here it is the block that counts."""
    asked, inside, real = [], [], runs.fit

    @contextmanager
    def block(device, *, wanted):
        asked.append((device, wanted))
        inside.append(True)
        yield
        inside.clear()

    def steps(*arguments):
        assert inside
        yield from real(*arguments)

    monkeypatch.setattr(runs, "deterministic", block)
    monkeypatch.setattr(runs, "fit", steps)
    first = cmtool("train", "--preset", "digits-ct", *TINY, "--set", "train.steps=2", "--out", "r")
    assert first.code == 0, first.err
    more = cmtool("train", "--resume", "--out", "r", "--device", "cpu", *ON)
    assert more.code == 0, more.err
    assert asked == [("cpu", False), ("cpu", True)]
    assert not inside


@pytest.mark.usefixtures("bare_runs")
def test_on_a_cpu_it_changes_nothing(cmtool, tmp_path):
    for out, given in {"plain": [], "same": ON}.items():
        made = cmtool("train", "--preset", "digits-ct", *TINY, "--set", "train.steps=2", *given,
                      "--out", out)  # fmt: skip
        assert made.code == 0, made.err
    assert not torch.are_deterministic_algorithms_enabled()
    plain, same = (
        (tmp_path / out / "checkpoints/step-0000002/optimizer.safetensors").read_bytes()
        for out in ("plain", "same")
    )
    assert plain[-1000:] == same[-1000:]
