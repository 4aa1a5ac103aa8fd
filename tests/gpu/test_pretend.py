"""The pretended card itself: what it lets through, what it counts, and that it finds mistakes."""

import subprocess
import sys

import pytest
import torch

from tests.gpu.pretend import build, generate
from tests.gpu.pretend.card import counting

on_the_card = pytest.mark.pretend_gpu


def test_stubs_of_what_computes_are_counted_and_of_settings_are_not():
    for name in ("cublasSgemm_v2", "cublasLtMatmul", "cudnnSpatialTfSamplerForward", "ncclReduce"):
        assert f'note("launch {name}")' in generate.stub(name)
    for name in ("cublasSetStream_v2", "cudnnGetConvolutionForwardWorkspaceSize", "ncclCommAbort"):
        assert "note" not in generate.stub(name)


def test_a_source_that_changes_makes_another_library(monkeypatch, tmp_path):
    before = build.key()
    (tmp_path / "memory.cpp").write_text("// changed\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.key() != before


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda tool: None)
    assert build.missing()
    monkeypatch.setattr(build, "site", lambda: None)
    assert "no CUDA build" in build.missing()


@on_the_card
def test_launches_copies_and_waits_are_counted():
    x = torch.zeros(1000, device="cuda")
    with counting() as counted:
        y = x + 1
        assert counted.waits == []
        total = y.sum().item()
    assert total == 0
    assert counted.launches == 2
    assert counted.counts["copy card to pinned"] == 1
    assert len(counted.waits) == 1
    assert "total = y.sum().item()" in counted.waits[0]


@on_the_card
def test_questions_are_answered_with_yes():
    assert bool(torch.isfinite(torch.zeros(5, device="cuda")).all())


@on_the_card
def test_tensors_of_both_sides_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@on_the_card
def test_memory_ends_where_the_card_does(monkeypatch):
    monkeypatch.setenv("PRETEND_GPU_BYTES", str(1 << 30))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 31, dtype=torch.uint8, device="cuda")


@on_the_card
def test_the_host_cannot_touch_the_memory_of_the_card():
    code = (
        "import ctypes, torch; x = torch.zeros(4, device='cuda');"
        "ctypes.c_char.from_address(x.data_ptr()).value"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -11
