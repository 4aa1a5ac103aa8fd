import gc

import pytest
import torch

from cmtool.system import pinned
from cmtool.system.pinned import ALIGNED, buffers

LIKE = {
    "a": torch.randn(3, 5), "scalar": torch.tensor(7), "none": torch.zeros(0, 4),
    "half": torch.randn(33).bfloat16(), "bool": torch.tensor([True, False, True]),
    "double": torch.randn(2, 3, 1).double(),
}  # fmt: skip


class Card:
    """Counts the memory that is locked, as cudaHostRegister would."""

    def __init__(self, works):
        self.works, self.locked, self.asked = works, {}, []

    def lock(self, address, size, _):
        self.asked.append(size)
        if self.works:
            self.locked[address] = size
        return self.works

    def cudaHostUnregister(self, address):
        del self.locked[address]


@pytest.fixture(params=[True, False], ids=["locked", "none left"])
def card(request, monkeypatch):
    card = Card(request.param)
    monkeypatch.setattr(pinned, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(pinned, "lock", card.lock)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: card)
    return card


def test_copies_of_all_tensors_take_one_piece_of_memory_and_no_more(card):
    made = buffers(LIKE)
    needed = sum(-(-t.nbytes // ALIGNED) * ALIGNED for t in LIKE.values())
    assert card.asked == [needed]
    for name, tensor in LIKE.items():
        made[name].copy_(tensor)
    for name, tensor in LIKE.items():  # none lies over another
        assert (made[name].shape, made[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(made[name], tensor)


def test_memory_is_unlocked_with_its_last_copy(card):
    made = buffers(LIKE)
    one = made["a"]
    del made
    gc.collect()
    assert len(card.locked) == card.works
    one.fill_(1)
    del one
    gc.collect()
    assert card.locked == {}


def test_copies_of_what_is_on_the_cpu_are_plain(monkeypatch):
    monkeypatch.setattr(pinned, "lock", None)
    made = buffers(LIKE)
    assert list(made) == list(LIKE)
    assert len({t.untyped_storage().data_ptr() for t in made.values() if t.numel()}) == 5
