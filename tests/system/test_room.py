import pytest
import torch
from torch import nn

from cmtool.evaluation.held_out import _roomy
from cmtool.sampling import generate, plan, steady
from cmtool.system.room import PIXELS, in_room, most_images
from tests.networks import network


def limited(most, error=torch.OutOfMemoryError):
    """A denoiser with memory for `most` images, and the numbers of images that it was shown."""
    seen = []

    def f(x, sigma, labels=None):
        seen.append(len(x))
        if len(x) > most:
            raise error("CUDA out of memory")
        return x * sigma[:, None, None, None] + (
            0 if labels is None else labels[:, None, None, None]
        )

    return f, seen


@pytest.mark.parametrize("labels", [None, torch.arange(11)])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 11, 40])
def test_images_are_the_same_however_few_there_is_room_for(most, labels):
    x, sigma = torch.randn(11, 3, 4, 4), torch.rand(11)
    expected = limited(11)[0](x, sigma, labels)
    f, seen = limited(most)
    assert torch.equal(in_room(f, nn.Identity(), (4, 4))(x, sigma, labels), expected)
    assert sum(n for n in seen if n <= most) == 11  # each image once


def test_fewer_images_at_once_stay_fewer():
    f, seen = limited(3)
    fitting = in_room(f, nn.Identity(), (4, 4))
    for _ in range(2):
        fitting(torch.zeros(8, 3, 4, 4), torch.zeros(8))
    assert seen == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_no_room_for_one_image_is_an_error():
    f, seen = limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        in_room(f, nn.Identity(), (4, 4))(torch.zeros(4, 3, 4, 4), torch.zeros(4))
    assert seen == [4, 2, 1]


def test_another_error_is_raised_at_once():
    f, seen = limited(1, lambda _: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        in_room(f, nn.Identity(), (4, 4))(torch.zeros(4, 3, 4, 4), torch.zeros(4))
    assert seen == [4]


def test_a_sharded_network_is_called_as_often_in_all_processes():
    sharded = nn.Linear(1, 1)
    sharded.weight.device_mesh = "a mesh"
    f, seen = limited(2)
    with pytest.raises(torch.OutOfMemoryError):
        in_room(f, sharded, (4, 4))(torch.zeros(4, 3, 4, 4), torch.zeros(4))
    assert seen == [4]


@pytest.mark.parametrize(
    ("side", "images"), [(8, 16384), (32, 1024), (64, 256), (256, 16), (512, 4), (4096, 1)]
)
def test_a_gpu_sees_as_many_pixels_of_large_images_as_of_small_ones(side, images):
    assert most_images((side, side)) == images
    assert images == 1 or images * side**2 == PIXELS


def test_a_batch_of_samples_is_shown_to_a_gpu_in_parts(monkeypatch, model):
    """The meta device stands in for it; a CPU has its own chunks."""
    monkeypatch.setattr("cmtool.system.room.PIXELS", 3 * 64)
    monkeypatch.setattr("cmtool.sampling._finite", lambda x0: x0)
    seen, chosen = [], plan(model.preset, 2)

    def f(x, sigma, labels):
        seen.append(len(x))
        return x

    f.parameters = lambda: iter(())
    drawn = generate(f, model.preset, chosen, range(8), batch=8, device="meta")
    assert torch.cat(list(drawn)).shape == (8, 3, 8, 8)
    assert seen == [3, 3, 2] * 2


def test_a_gpu_measures_held_out_images_in_parts():
    f = network("adm").eval()
    assert _roomy(f, size=(8, 8), device="cpu") is f
    assert _roomy(f, size=(8, 8), device="cuda:0") is not f
    assert steady(f, f, (8, 8), "cuda:0") is not f
