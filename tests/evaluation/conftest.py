import pytest
import torch

from cmtool.data.drawing import png_bytes
from tests.published import write_detector


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    write_detector(path)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of pictures that differ in contrast."""
    root, generator = tmp_path_factory.mktemp("sets"), torch.Generator().manual_seed(0)
    for name, count, contrast in (("a", 12, 255), ("b", 10, 150)):
        (root / name).mkdir()
        for i in range(count):
            image = torch.rand(3, 20, 24, generator=generator) * contrast
            (root / name / f"{i}.png").write_bytes(png_bytes(image.to(torch.uint8)))
    return root
