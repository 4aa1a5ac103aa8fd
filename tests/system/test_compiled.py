import pytest
import torch
from torch import nn

from cmtool.system.compiled import evaluating, is_compiled


class Part(nn.Module):
    """PyTorch 2.8 leaves its own layers uncompiled when they are compiled by themselves."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x):
        return self.line(x).cos()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x).sin()


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.parametrize("of", ["whole", "part"])
def test_a_compiled_model_is_evaluated_as_it_is_written(of):
    """Eval mode and another batch would each have it compiled once more."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    f = Net()
    assert not is_compiled(f)
    (f if of == "whole" else f.part).compile(backend=backend)
    assert is_compiled(f)
    f(torch.ones(3, 2))
    assert len(compiled) == 1
    with evaluating(f), torch.no_grad():
        assert not f.training
        f(torch.ones(5, 2))
        f(torch.ones(7, 2))
    assert len(compiled) == 1
    assert f.training
    f(torch.ones(3, 2))
    assert len(compiled) == 1


def test_a_plain_model_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    f = Net().eval()
    with evaluating(f):
        assert not f.training
    assert not f.training
