import pytest
import torch

from cmtool.system import memory

MIB = 1 << 20


@pytest.mark.skipif(memory.held("cpu") is None, reason="needs /proc")
def test_what_is_resident_and_the_most_since_a_look():
    memory.look_anew("cpu")
    before = memory.held("cpu")
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    held = memory.held("cpu")
    assert held - before > 60 * MIB
    del block
    assert memory.most_held("cpu") >= held - MIB
    memory.look_anew("cpu")
    assert memory.most_held("cpu") < held - 32 * MIB


def test_where_nobody_says_it_nothing_is_known(monkeypatch, tmp_path):
    assert memory.held("mps") is None
    assert memory.most_held("mps") is None
    assert memory.most_reserved("cpu") is None
    monkeypatch.setattr(memory, "SELF", tmp_path / "none")
    memory.look_anew("cpu")
    assert memory.held("cpu") is None
    assert memory.most_held("cpu") is None


def test_a_gpu_is_asked_itself(monkeypatch):
    asked = []
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved",
                 "reset_peak_memory_stats"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda d, name=name: asked.append((name, d)) or 7)
    assert memory.held("cuda:1") == memory.most_held("cuda:1") == 7
    assert memory.most_reserved("cuda:1") == 7
    memory.look_anew("cuda:1")
    assert {device for _, device in asked} == {"cuda:1"}
    assert len(asked) == 4
