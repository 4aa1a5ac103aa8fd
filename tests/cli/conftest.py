import io
import sys
from typing import NamedTuple

import pytest

from cmtool.cli import _options, main
from cmtool.training import observers, start
from cmtool.training import run as runs

TINY = [
    "--set", "train.batch=8", "--set", "model.network.model_channels=16",
    "--set", "model.network.norm_groups=4", "--set", "model.network.head_channels=16",
    "--set", "run.log_every=2", "--device", "cpu",
]  # fmt: skip


class Result(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def text(self):
        return self.out.decode()


def hasten(patch):
    """Let runs leave out what costs seconds each: the look at memory and speed, the report."""
    patch.setattr(start, "check_memory", lambda *_: None)
    patch.setattr(runs, "ideal_seconds", lambda *_: None)
    patch.setattr(runs, "write_run_report", lambda *_: None)
    patch.setattr(observers, "write_summary", lambda *_: None)


@pytest.fixture
def bare_runs(monkeypatch):
    """For tests of something else than memory, speed and reports."""
    hasten(monkeypatch)


@pytest.fixture
def digits_by_default(monkeypatch):
    """For tests that edit digits without --checkpoint."""
    monkeypatch.setattr(_options, "BUNDLED_MODEL", "digits-cmt")


@pytest.fixture
def cmtool(monkeypatch, capfdbinary, tmp_path):
    """Run a command in this process, in an empty folder, the way the shell would."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=b""):
        stream = io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stream)
        capfdbinary.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        captured = capfdbinary.readouterr()
        return Result(code, captured.out, captured.err.decode())

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished consistency model, trained for six steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.raises(SystemExit):
        main(["train", "--preset", "digits-ct", "--out", str(out), "--set", "train.steps=6", *TINY])
    return out
