import contextlib
import os

import pytest
import torch

from cmtool.errors import UserError
from cmtool.system import determinism
from cmtool.system.determinism import FIXED, WORKSPACE, deterministic, refused


@pytest.fixture(autouse=True)
def without_a_card(monkeypatch):
    monkeypatch.setattr(determinism, "check_product", lambda _: None)


def settings():
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    return {
        "benchmark": cudnn.benchmark, "cudnn": cudnn.deterministic,
        "fills": memory.fill_uninitialized_memory, "mode": torch.get_deterministic_debug_mode(),
        "space": os.environ.get(WORKSPACE),
    }  # fmt: skip


INSIDE = {"benchmark": False, "cudnn": True, "fills": False, "mode": 2}


@pytest.mark.parametrize("space", [None, ":4096:2", *FIXED])
@pytest.mark.parametrize(("benchmark", "mode"), [(True, 0), (False, 1)])
def test_a_gpu_is_set_for_the_block_and_put_back_after_it(monkeypatch, space, benchmark, mode):
    if space is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, space)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    torch.set_deterministic_debug_mode(mode)
    before = settings()
    try:
        with contextlib.suppress(ZeroDivisionError), deterministic("cuda:1", wanted=True):
            fixed = space if space in FIXED else FIXED[0]
            assert settings() == {**INSIDE, "space": fixed}
            raise ZeroDivisionError
        assert settings() == before
    finally:
        torch.set_deterministic_debug_mode(0)


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_a_cpu_and_whoever_does_not_want_it_are_left_alone(device, wanted):
    before = settings()
    with deterministic(device, wanted=wanted):
        assert settings() == before


def test_an_apple_gpu_cannot_promise_it():
    with pytest.raises(UserError, match="on mps"), deterministic("mps", wanted=True):
        pass


def test_a_process_that_used_the_gpu_before_is_told_what_to_set(monkeypatch):
    monkeypatch.undo()

    def product(*_, **__):
        raise RuntimeError(f"Deterministic behavior was enabled ... set {WORKSPACE}=:4096:8")

    monkeypatch.setattr(torch, "ones", lambda *_, **__: Refusing(product))
    with pytest.raises(UserError) as caught, deterministic("cuda", wanted=True):
        pass
    assert caught.value.hint == f"begin the process with {WORKSPACE}={FIXED[0]}"
    assert not torch.are_deterministic_algorithms_enabled()


class Refusing:
    def __init__(self, product):
        self.product = product

    def __matmul__(self, _):
        return self.product()


def test_an_operation_without_one_order_is_named():
    text = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    error = refused(RuntimeError(text))
    assert "cumsum_cuda_kernel" in error.what
    assert error.hint == "--set train.deterministic=false"
    assert refused(RuntimeError("shapes do not match")) is None
