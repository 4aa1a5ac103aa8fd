"""What ends a run: whoever started it may leave, but for torchrun."""

import os
import signal

import pytest

from cmtool.training.stop import Stop


@pytest.mark.parametrize(("environment", "reason"), [({}, 0), ({"TORCHELASTIC_RUN_ID": "x"}, 15)])
def test_a_run_outlives_its_shell_and_ends_with_its_torchrun(monkeypatch, environment, reason):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stop = Stop(None)
    assert stop.reason() == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.reason() == reason
    assert reason in (0, signal.SIGTERM)
