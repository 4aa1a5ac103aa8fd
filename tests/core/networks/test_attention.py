"""Attention in half precision on a CPU, beside PyTorch's in float64."""

import pytest
import torch
from torch.nn import functional as F

from cmtool.core.networks.cpu import attention
from cmtool.core.networks.cpu.attention import attend


def inputs(tokens):
    """q, k, v (B, heads, tokens, d) in bfloat16, and the weight of the answer in a loss."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 3, 2, tokens, 8, generator=g)
    return [t.bfloat16().requires_grad_() for t in (q, k, v)], weight


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("kept", [True, False])
def test_the_answer_and_its_gradients(tokens, kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 1 << 22 if kept else 0)
    monkeypatch.setattr(attention, "CACHED", 4 * tokens**2)  # of the 6 heads, 4 and then 2
    given, weight = inputs(tokens)
    ours = attend(*given)
    exact = [t.detach().double().requires_grad_() for t in given]
    y = F.scaled_dot_product_attention(*exact)
    expected = [y.detach(), *torch.autograd.grad((y * weight).sum(), exact)]
    found = [ours.detach(), *torch.autograd.grad((ours * weight).sum(), given)]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) < 0.01 * float(b.norm())  # bfloat16 rounds by up to 0.004


def test_many_weights_are_not_kept(monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        attend(*inputs(40)[0])
    assert all(t.shape[-1] == 8 for t in kept)
