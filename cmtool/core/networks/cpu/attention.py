"""Attention, in half precision on a CPU by products of matrices: the fused kernel is slow there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_TOKENS = 1024
"""Beyond so many the fused kernel is as fast."""
KEPT = 1 << 19
"""More weights than so many are not kept for the backward pass but computed again."""
CACHED = 1 << 20
"""So many of them at once, which stay in the cache."""
VECTOR = 32
"""Rows of fewer numbers PyTorch's softmax in half precision does one by one."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for (B, heads, tokens, d); softmax is float32 inside."""
    tokens = q.shape[2]
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not half or tokens > MOST_TOKENS:
        return F.scaled_dot_product_attention(q, k, v)
    heads = [t.flatten(0, 1) for t in (q, k, v)]  # (B heads, tokens, d)
    if len(heads[0]) * tokens**2 > KEPT:
        out: Tensor = Attend.apply(*heads)
    else:
        out = softmax(*heads[:2]) @ heads[2]
    return out.view_as(q)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights softmax(q k^T / sqrt(d)) (b, tokens, tokens) for (b, tokens, d)."""
    logits = scaled(q, k.transpose(1, 2), q.shape[2])
    if q.shape[1] < VECTOR:
        return logits.float().softmax(-1).to(q.dtype)
    return logits.softmax(-1)


def scaled(a: Tensor, b: Tensor, d: int, out: Tensor | None = None) -> Tensor:
    """Return a b / sqrt(d), rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=d**-0.5, out=out)


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors (b, tokens, d) a few of b at a time."""
    at_once = max(CACHED // tensors[0].shape[1] ** 2, 1)
    return zip(*(t.split(at_once) for t in tensors), strict=True)


class Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v for (b, tokens, d), which keeps q, k and v and not the weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the weighted means of v."""
        ctx.save_for_backward(q, k, v)
        result = torch.empty_like(v)
        for some_q, some_k, some_v, out in parts(q, k, v, result):
            torch.bmm(softmax(some_q, some_k), some_v, out=out)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        given: tuple[Tensor, ...] = ctx.saved_tensors
        results = tuple(torch.empty_like(t) for t in given)
        d = given[0].shape[2]
        for q, k, v, grad, of_q, of_k, of_v in parts(*given, grads[0], *results):
            weights = softmax(q, k)
            torch.bmm(weights.transpose(1, 2), grad, out=of_v)
            of_weights = grad @ v.transpose(1, 2)
            of_logits = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, q.dtype)
            scaled(of_logits, k, d, of_q)
            scaled(of_logits.transpose(1, 2), q, d, of_k)
        return results
