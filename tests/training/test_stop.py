"""What ends a run: whoever started it may leave, but for torchrun."""

import os
import signal
from types import SimpleNamespace

import pytest

from cmtool.errors import ResourceError, UserError
from cmtool.presets.toml import load_preset
from cmtool.system.dist import ALONE
from cmtool.training.stop import Stop, explained


@pytest.mark.parametrize(("environment", "reason"), [({}, 0), ({"TORCHELASTIC_RUN_ID": "x"}, 15)])
def test_a_run_outlives_its_shell_and_ends_with_its_torchrun(monkeypatch, environment, reason):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", lambda: 77)
    stop = Stop(None)
    assert stop.reason() == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.reason() == reason
    assert reason in (0, signal.SIGTERM)


RUN = SimpleNamespace(
    group=ALONE, state=SimpleNamespace(step=3), preset=load_preset("digits-cd", {"train.batch": 64})
)


def test_an_operation_that_no_deterministic_run_can_do_is_named():
    what = "cumsum_cuda_kernel does not have a deterministic implementation, but you set"
    with pytest.raises(UserError, match="cumsum_cuda_kernel cannot") as caught, explained(RUN):
        raise RuntimeError(what)
    assert caught.value.hint == "--set train.deterministic=false"


@pytest.mark.parametrize(
    "what",
    ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     "GET was unable to find an engine to execute this computation",
     "NCCL error: Failed to CUDA calloc async 608 bytes"],
)  # fmt: skip
def test_a_library_without_memory_of_the_gpu_ends_a_run_as_a_lack_of_it(what):
    with pytest.raises(ResourceError, match="out of memory after step 3") as caught, explained(RUN):
        raise RuntimeError(what)
    assert "--accumulate 2" in caught.value.hint
