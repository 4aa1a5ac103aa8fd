import pytest
import torch

from cmtool.data import datasets as data_module
from cmtool.data.datasets import digits, load_dataset
from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
from cmtool.data.images import from_uint8
from cmtool.data.survey import PART, Survey, check_images, pngs, surveys
from cmtool.errors import InputError

N = 2 * PART + 3


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    for i in range(N):
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8, generator=generator)
        (tmp_path / f"{i:03d}.png").write_bytes(png_bytes(image))
    return tmp_path


def survey(data, workers):
    found = Survey()
    for part in surveys(data, workers):
        found.add(part)
    return found


def test_workers_see_what_one_process_sees(streamed):
    (streamed / "070.png").write_bytes(b"not a picture")
    (streamed / "130.png").write_bytes(png_bytes(torch.zeros(1, 4, 5, dtype=torch.uint8)))
    alone, shared = (survey(load_dataset(str(streamed)), workers) for workers in (0, 2))
    assert alone.sizes == shared.sizes == {"7x6": N - 2, "5x4": 1}
    assert alone.modes == shared.modes == {"RGB": N - 2, "L": 1}
    assert alone.bad == shared.bad
    assert ["070.png" in name for name in alone.bad] == [True]
    assert torch.equal(alone.mean, shared.mean)
    assert alone.square == shared.square


def test_sums_are_those_of_the_images():
    found, x = survey(digits(), 0), from_uint8(digits().images).double()
    assert found.good == len(x)
    assert torch.allclose(found.mean / len(x), x.mean((0, 2, 3)))
    assert found.square / len(x) == pytest.approx(float(x.square().mean()))


@pytest.mark.parametrize("workers", [0, 2])
def test_pngs_are_the_images_in_order_and_of_one_size(streamed, workers):
    (streamed / "000.png").write_bytes(b"not a picture")
    (streamed / "100.png").write_bytes(png_bytes(torch.zeros(3, 4, 5, dtype=torch.uint8)))
    found = [
        content
        for part in pngs(load_dataset(str(streamed), in_memory=False), workers)
        for content in part
    ]
    assert len(found) == N
    assert [i for i, content in enumerate(found) if isinstance(content, InputError)] == [0, 100]
    assert "100.png is 5x4 but" in found[100].what
    assert "001.png is 7x6" in found[100].what
    assert torch.equal(read_image(found[9]), read_image(streamed / "009.png"))


@pytest.mark.parametrize("workers", [0, 1])
def test_each_process_checks_its_share(streamed, workers):
    (streamed / "101.png").write_bytes((streamed / "101.png").read_bytes()[:60])
    data = load_dataset(str(streamed))
    check_images(data, workers, rank=0, world_size=2)
    with pytest.raises(InputError, match=r"101\.png cannot be decoded") as caught:
        check_images(data, workers, rank=1, world_size=2)
    assert caught.value.rank == 1
