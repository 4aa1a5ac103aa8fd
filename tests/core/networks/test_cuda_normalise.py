"""When the norm of a GPU is taken, and that its kernels run on Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmtool.core.networks.cuda import normalise
from cmtool.core.networks.cuda.normalise import fits, takes
from cmtool.core.networks.layers import GroupNorm32
from cmtool.core.tangents import derivative

ROOT = Path(__file__).parents[3]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("full", [False, True])
def test_the_kernels_compile_for_a_gpu(capability, full):
    """To machine code, for which no GPU is needed: the interpreter forgives what this does not."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cmtool.core.networks.cuda import kernels as k
shape = dict(ROWS=32, GROUPS=2 if {full} else 8, PLACES=32 if {full} else 8, FULL={full})
shape |= dict(CHUNKS=4, SCALED=True, ADDED=True, SILU=True)
halves = {{"x", "y", "grad", "of_x"}}
floats = "weight bias scale shift added parts stats of_rest of_added"
for kernel in (k.moments_kernel, k.forward_kernel, k.sums_kernel, k.backward_kernel):
    names = kernel.arg_names
    types = {{n: "*bf16" for n in halves}} | {{n: "*fp32" for n in floats.split()}}
    types |= {{n: "constexpr" for n in shape}} | {{"eps": "fp32"}}
    constants = {{n: v for n, v in shape.items() if n in names}}
    source = ASTSource(kernel, {{n: types.get(n, "i32") for n in names}}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", {capability}, 32)).asm["cubin"]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_triton
@pytest.mark.slow
def test_the_kernels_on_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "tests/core/networks/interpreted.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_cpu_never_loads_triton():
    code = """
import sys, torch
from cmtool.core.networks.layers import GroupNorm32
from cmtool.core.tangents import derivative
x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
GroupNorm32(2, 8)(x, torch.ones(2, 8), torch.ones(2, 8), silu=True).sum().backward()
GroupNorm32(2, 8)(x.contiguous(), silu=True).sum().backward()
assert not {"triton", "torch._dynamo"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def last(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


def test_it_takes_dense_images_that_lie_pixel_by_pixel_and_nothing_else():
    assert all(map(fits, [last(2, 8, 3, 5), last(1, 8, 1, 1), last(2, 8, 3, 5).bfloat16()]))
    assert not fits(torch.randn(2, 8, 3, 5))
    assert not fits(last(2, 8, 3, 6)[..., ::2])
    assert not fits(last(2, 8, 3, 5).double())
    assert not fits(last(0, 8, 3, 5))
    assert not fits(last(1, normalise.WIDEST + 1, 1, 1))


def test_what_is_differentiated_forwards_is_not_taken(monkeypatch):
    monkeypatch.setattr(normalise, "runs_on", lambda device: True)
    x, scale, seen = last(2, 8, 3, 5), torch.ones(2, 8), []

    def f(x, scale):
        seen.append(takes(x, scale, None))
        return x

    derivative(lambda scale: f(x, scale), (scale,), (scale,))
    derivative(lambda x: f(x, scale), (x,), (x,))
    assert seen == [False, False]
    assert takes(x, scale, None)


def test_on_a_cpu_it_is_never_taken():
    assert not takes(last(2, 8, 3, 5), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiler_sees_one_operator_and_its_shapes(dtype):
    """Of images on the meta device, which the compiler has too, shapes alone are computed."""
    x = last(2, 8, 3, 5, dtype=dtype).to("meta")
    weight, rows = torch.empty(8, device="meta"), torch.empty(2, 8, device="meta")
    y, stats = normalise.forward_op(x, weight, weight, rows, rows, rows, 4, 1e-5, True)
    assert (y.dtype, y.stride(), stats.shape) == (dtype, x.stride(), (2, 2, 4))
    of_x, of_rest, of_added = normalise.backward_op(
        y, x, weight, weight, *[rows] * 3, stats, 4, True
    )
    assert (of_x.stride(), of_rest.shape, of_rest.dtype) == (x.stride(), (4, 2, 8), torch.float32)
    assert (of_added.shape, of_added.dtype) == ((2, 8), torch.float32)
    plain = normalise.backward_op(y, x, weight, weight, *[None] * 3, stats, 4, True)
    assert [tuple(t.shape) for t in plain[1:]] == [(2, 2, 8), (0,)]


@pytest.mark.filterwarnings("ignore")  # the compiler of PyTorch 2.8 has some of its own
def test_compiled_networks_are_whole_graphs(monkeypatch):
    """The compiler traces a GPU's norm: no break, and its operator forwards and backwards."""
    found = []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr(normalise, "runs_on", lambda device: True)
    module = GroupNorm32(4, 8)
    compute = torch.compile(
        lambda x: normalise.group_norm(x, module.weight, module.bias, *[None] * 3, 4, 1e-5, True),
        backend=backend, fullgraph=True,
    )  # fmt: skip
    with pytest.raises(Exception):  # noqa: B017  # there is no GPU to run it
        compute(last(2, 8, 3, 5))
    assert any("autograd_function_apply" in name for name in found)
