import ctypes
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cmtool import sampling
from cmtool.core import edits
from cmtool.core.distances import DISTANCES
from cmtool.core.losses import (
    WEIGHTINGS,
    karras,
    truncated_snr,
)
from cmtool.core.methods import Models
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.cpu.normalise import is_channels_last
from cmtool.core.networks.song import Song, SongOptions
from cmtool.core.noise import Stage, lognormal, uniform
from cmtool.core.precond import Preconditioned, consistency_scalings, edm_scalings, log_label
from cmtool.core.samplers import SAMPLERS
from cmtool.core.tensors import to_device
from cmtool.models import load_model
from cmtool.presets.schema import Choice
from cmtool.system.devices import (
    autocast,
    best_precision,
    is_out_of_memory,
    on_device,
    shapes_only,
    timed_convolutions,
)
from tests.networks import network
from tests.objectives import alone, objective_of

NETWORKS = {
    "adm": lambda: Adm(AdmOptions(16, (1, 2), 1, (1,), 16, norm_groups=4, dropout=0.1), 3, 10),
    "ncsn++": lambda: Song(
        SongOptions(16, (1, 2), 1, embedding="fourier", encoder="residual",
                    resample_filter=(1, 3, 3, 1)), 3, 10,
    ),
}  # fmt: skip


METHODS = {
    "edm": partial(objective_of, "denoising", lognormal, weight=karras),
    "cd": partial(objective_of, "consistency_distillation"),
    "pd": partial(objective_of, "progressive_distillation", weight=truncated_snr),
}


class Lists(TorchFunctionMode):
    """Counts the lists of numbers that become tensors on another device than the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.count += out.device.type != "cpu"
        return out


class Copies(TorchDispatchMode):
    """Collects the copies from the CPU to another device that somebody waits for."""

    def __init__(self):
        super().__init__()
        self.waited_for = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        copied = func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        if copied and args[0].device.type == "cpu" != out.device.type:
            self.waited_for.append(args[0].shape)
        return out


def on_meta(network, scalings):
    f = Preconditioned(network, scalings, log_label, sigma_data=0.5, sigma_min=0.002)
    return on_device(f, "meta")


@pytest.mark.parametrize(
    ("network", "method"), [("adm", "cd"), ("adm", "pd"), ("ncsn++", "edm")], ids=str
)
def test_a_loss_waits_for_no_device(network, method):
    """A meta device has no values: reading one raises."""
    student = on_meta(NETWORKS[network](), consistency_scalings)
    teacher = on_meta(NETWORKS[network](), edm_scalings)
    objective = METHODS[method](teacher=teacher)
    x0, labels = torch.zeros(4, 3, 8, 8, device="meta"), torch.arange(4).to("meta")
    generator = torch.Generator().manual_seed(0)
    with Copies() as copies, Lists() as lists:
        loss, sigma = objective(Models(student, teacher), x0, labels, Stage(n=5), generator)
        loss.mean().backward()
    assert (loss.shape, sigma.shape) == ((4,), (4,))
    assert all(p.grad is not None for p in student.parameters())
    assert copies.waited_for == []
    assert lists.count == 0


class Constant(nn.Module):
    """A network whose answer is the same number in any precision, in the dtype of autocast."""

    def forward(self, x, noise_label, labels=None):
        half = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if half else x.dtype
        return torch.full_like(x, 0.34765625, dtype=dtype)


def loss_of(method, distance, weight, precision):
    """The losses of one microbatch with `Constant` networks."""
    student, teacher = (
        Preconditioned(Constant(), scalings, log_label, sigma_data=0.5, sigma_min=0.002)
        for scalings in (consistency_scalings, edm_scalings)
    )
    levels = lognormal if method == "denoising" else uniform
    objective = objective_of(method, levels, teacher=teacher, distance=distance, weight=weight)
    x0 = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with autocast("cpu", precision):
        generator = torch.Generator().manual_seed(0)
        return objective(Models(student, teacher), x0, None, Stage(n=9), generator).loss


@pytest.mark.parametrize(
    "method",
    ["denoising", "consistency_distillation", "consistency_training", "progressive_distillation"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_only_the_network_is_rounded(method, precision):
    """Scalings, solver, distance and weight do not see autocast: every bit is that of fp32."""
    distances = {name: d for name, d in DISTANCES.items() if name != "lpips"}
    for distance in distances.values():
        for weight in WEIGHTINGS.values():
            half = loss_of(method, distance, weight, precision)
            assert half.dtype == torch.float32
            assert torch.equal(half, loss_of(method, distance, weight, "fp32"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("precision", "cosine"), [("bf16", 0.999), ("fp16", 0.9999)])
def test_gradients_in_half_precision_point_the_same_way(network, precision, cosine):
    torch.manual_seed(0)
    f = Preconditioned(
        NETWORKS[network]().eval(), edm_scalings, log_label, sigma_data=0.5, sigma_min=0.002
    )
    for p in f.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    x0, labels = torch.rand(8, 3, 8, 8) * 2 - 1, torch.arange(8)
    objective = objective_of("denoising", lognormal, weight=karras)

    def gradient(precision):
        f.zero_grad()
        generator = torch.Generator().manual_seed(0)
        with autocast("cpu", precision):
            loss, _ = objective(alone(f), x0, labels, Stage(), generator)
        loss.mean().backward()
        assert {p.grad.dtype for p in f.parameters()} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in f.parameters()])

    exact, rounded = gradient("fp32"), gradient(precision)
    assert not torch.equal(exact, rounded)
    assert float(nn.functional.cosine_similarity(exact, rounded, dim=0)) > cosine


@pytest.mark.parametrize(
    ("bf16", "amx", "best"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_is_bf16_on_a_cpu_that_computes_in_it(monkeypatch, bf16, amx, best):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert best_precision("cpu") == best


@pytest.mark.skipif(sys.platform != "linux", reason="what is set, and asked here, is glibc's")
def test_memory_of_a_tensor_is_kept_when_it_is_freed():
    class Mallinfo(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    on_device(nn.Conv2d(4, 8, 3), "cpu")
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    mapped = [mallinfo2().field3]  # blocks that go back to the system when they are freed
    tensor = torch.ones(1 << 19)  # 2 MiB
    mapped.append(mallinfo2().field3)
    assert mapped[0] == mapped[1]
    del tensor


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_of_a_model_answer_in_channels_last(channels):
    seen = []
    f = on_device(network("adm", channels), "cpu").eval()
    for module in f.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, y: seen.append(is_channels_last(y)))
    f(torch.randn(2, channels, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert sum(seen) > len(seen) * 0.8  # what has one channel or pixel lies both ways


def test_weights_on_a_cpu_stay_where_they_are():
    f = network("adm")
    before = [p.data_ptr() for p in f.parameters()]
    assert [p.data_ptr() for p in on_device(f, "cpu").parameters()] == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("NCCL error, last error: Failed to CUDA calloc async 608 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_known_by_torchs_words(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_a_cpu_says_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_out_of_memory(raised.value)


def test_sending_to_where_a_tensor_is_costs_nothing():
    x = torch.ones(3)
    assert to_device(x, "cpu") is x


@pytest.mark.parametrize(
    ("kind", "sizes"), [(nn.Linear, (3, 4)), (nn.Conv2d, (3, 4, 3)), (nn.Embedding, (3, 4))]
)
def test_networks_of_shapes_only_draw_no_numbers(kind, sizes):
    real, before = kind(*sizes), torch.get_rng_state()
    with shapes_only():
        built = kind(*sizes)
        real.reset_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in built.parameters())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_sampler_waits_for_no_device(sampler, monkeypatch):
    """The meta device has no values, so that reading one raises; nothing is sent to be waited for.

    The one wait of a batch, which asks whether its images are finite, is left out.
    """
    monkeypatch.setattr(sampling, "_finite", lambda x0: x0)
    kind = "digits-cd" if sampler == "multistep" else "digits-edm"
    model = load_model(kind, device="meta")
    chosen = sampling.plan(model.preset, 4, sampler=Choice(name=sampler))
    with Copies() as copies, Lists() as lists:
        drawn = sampling.generate(model.f, model.preset, chosen, range(3), device="meta")
        assert torch.cat(list(drawn)).shape == (3, 3, 8, 8)
    assert copies.waited_for == []
    assert lists.count == 0


def test_what_an_edit_puts_back_is_not_sent_at_each_level():
    x0 = torch.zeros(2, 3, 8, 8, device="meta")
    colorized = edits.colorize(x0[:, :1])
    with Copies() as copies, Lists() as lists:
        colorized.project(x0)
    assert (copies.waited_for, lists.count) == ([], 0)


class Pageable:
    """A tensor on a CPU that has no memory left to lock."""

    dtype, device = torch.float32, torch.device("cpu")

    def pin_memory(self):
        raise RuntimeError("CUDA error: out of memory")

    def to(self, device, non_blocking):
        return device, non_blocking


def test_what_cannot_be_page_locked_is_sent_all_the_same():
    assert to_device(Pageable(), "cuda") == ("cuda", True)


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [("cuda:1", True, True), ("cuda", False, False), ("cpu", True, False), ("mps", True, False)],
)
def test_convolutions_are_timed_on_a_gpu_inside_the_block(device, wanted, expected):
    with timed_convolutions(device, wanted=wanted):
        assert torch.backends.cudnn.benchmark is expected
    assert not torch.backends.cudnn.benchmark
