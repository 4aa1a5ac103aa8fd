"""torch.compile on the pretended card: whole graphs, which a growing grid does not compile anew.

The passes are traced into graphs, which then run as they are: to compile them takes minutes.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.gpu.pretend.card import counting
from tests.gpu.pretend.training import training
from tests.gpu.test_steps import ADM, BATCH, EDM2, FIRST, PRESETS, SONG

pytestmark = pytest.mark.pretend_gpu

COMPILED = ["train.compile=true", "model.network.dropout=0.0", "train.precision=bf16", BATCH]
GROWING = {
    "ct": ["digits-ct", *ADM, "loss.curriculum={name='consistency_training', s0=2, s1=150}"],
    "pd": ["digits-pd", *ADM, "loss.curriculum={name='halving', start=16, stage_steps=2}"],
}
"""Presets whose N(k) is another at nearly every step of a run of eight."""
METHODS = [
    "consistency_distillation", "denoising", "progressive_distillation", "truncated_training",
]  # fmt: skip
"""Without those that differentiate forwards, and those that call networks as these do."""
NETWORKS = {
    "edm2": ["digits-ict", EDM2],
    "song": ["digits-ict", SONG],
}


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Let modules be compiled into whole graphs by a backend that runs them as they are."""

    def traced(module, **_):
        call = torch.compile(module._call_impl, backend="eager", fullgraph=True)
        module._compiled_call_impl = call

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", traced)
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_breaks_a_graph(method):
    made = training(*PRESETS[method], *COMPILED)
    for _ in range(FIRST):
        next(made.steps)
    before = graphs()
    with counting() as counted:
        next(made.steps)
    assert graphs() == before
    assert not counters["graph_break"]
    assert len(counted.waits) == 1, str(counted)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_no_network_breaks_a_graph(network):
    made = training(*NETWORKS[network], *COMPILED, "train.precision=fp32")  # traced as it is run
    next(made.steps)
    assert graphs()
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", sorted(GROWING))
def test_a_changing_grid_compiles_nothing_anew(name):
    made = training(*GROWING[name], *COMPILED, "train.steps=8")
    seen = [next(made.steps).n for _ in range(FIRST)]
    before = graphs()
    seen += [info.n for info in made.steps]
    assert len(set(seen)) > 3
    assert graphs() == before
    assert len(seen) == 8
