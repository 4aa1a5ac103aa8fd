import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmtool.data.images import from_uint8
from cmtool.errors import InputError, MissingError, UserError
from cmtool.evaluation.bundled import DigitsFeatures, bundled_extractor
from cmtool.evaluation.extractor import Extractor
from cmtool.evaluation.features import (
    build_extractor,
    inception_extractor,
    vgg16_extractor,
)
from cmtool.evaluation.inception import clean_resized, folded, tf_resized
from tests.published import detector, write_detector


def pictures(n, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    return path, write_detector(path)


def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) < tolerance


def test_digits_features_have_their_width_and_refuse_other_sizes():
    network = DigitsFeatures().eval()
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, DigitsFeatures.WIDTH)
    extractor = bundled_extractor(network, "")
    assert extractor(pictures(300, 8)).shape == (300, DigitsFeatures.WIDTH)
    grey = pictures(2, 8)[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(InputError, match="not 9x8 with 3 channels"):
        network(torch.zeros(1, 3, 8, 9))
    with pytest.raises(InputError, match="2 channels"):
        extractor(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def test_pixels_are_the_means_of_the_parts_of_an_image():
    extractor = build_extractor("pixels")
    images = pictures(3, 16)
    blocks = from_uint8(images).reshape(3, 3, 8, 2, 8, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(extractor(images), blocks)
    odd = torch.full((2, 3, 13, 6), 255, dtype=torch.uint8)
    assert extractor(odd).eq(1).all()
    assert extractor.width == 192
    for refused in ({"trust": True}, {"file": Path("x")}):
        with pytest.raises(UserError, match="needs no file"):
            build_extractor("pixels", **refused)


def test_digits_features_are_of_images_from_minus_one_to_one():
    """As the classifier learned: level 0 is -1, level 255 is 1."""
    network, images = DigitsFeatures().eval(), pictures(3, 8)
    with torch.no_grad():
        expected = network(images / 127.5 - 1)
    torch.testing.assert_close(bundled_extractor(network, "")(images), expected)


@pytest.mark.filterwarnings("ignore")
def test_the_network_is_that_of_clean_fids_own_port(monkeypatch):
    from cleanfid import inception_pytorch

    file = detector()
    stored = file.state_dict()
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, *_: None)
    theirs = inception_pytorch.fid_inception_v3().eval()
    monkeypatch.undo()
    units = [m for m in theirs.modules() if type(m).__name__ == "BasicConv2d"]
    names = [key.removesuffix(".beta") for key in stored if key.endswith(".beta")]
    assert len(units) == len(names) == 94
    for unit, name in zip(units, names, strict=True):  # both are in the order of the paper
        unit.conv.weight.data = stored[f"{name}.weight"]
        unit.bn.bias.data, unit.bn.weight.data = (
            stored[f"{name}.beta"],
            torch.ones(1).expand(len(stored[f"{name}.beta"])),
        )
        unit.bn.running_mean, unit.bn.running_var = stored[f"{name}.mean"], stored[f"{name}.var"]
    theirs.fc = theirs.dropout = nn.Identity()
    x = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(folded(stored)(x), theirs(x))


def test_features_are_those_of_the_files_own_code(published):
    path, file = published
    images = pictures(3, 20)
    with torch.no_grad():
        expected = file(images.float(), return_features=True)
        chances = file(images.float(), no_output_bias=True)
    extractor = inception_extractor(path, "")
    assert extractor.notes == ()
    features = extractor(images)
    assert close(features, expected)
    torch.testing.assert_close(extractor.logits(features).softmax(1), chances, rtol=1e-4, atol=0)
    half = inception_extractor(path, "", precision="bf16")(images)
    assert 1e-5 < float((half - expected).norm() / expected.norm()) < 0.02


def test_features_are_those_of_clean_fid_with_its_resize(published, tmp_path):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    path, _ = published
    images = pictures(2, 40)
    resize = build_resizer("clean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = InceptionV3W(str(path.parent), download=False)
    resized = [
        torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in images
    ]
    with torch.no_grad():
        expected = theirs(torch.stack(resized))
    assert close(inception_extractor(path, "", resize="clean")(images), expected)


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (299, 299), (400, 350)])
def test_the_clean_resize_is_pillows(size):
    from cleanfid.resize import build_resizer

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, *size), generator=generator).float()
    theirs = build_resizer("clean")(image[0].permute(1, 2, 0).numpy().astype(np.uint8))
    expected = torch.from_numpy(theirs).permute(2, 0, 1)
    torch.testing.assert_close(clean_resized(image)[0], expected, rtol=0, atol=5e-5)


def test_the_tensorflow_resize_puts_pixel_i_at_i_h_over_299():
    ramp = torch.arange(24.0)[None, None, None].expand(1, 1, 10, 24)
    expected = (torch.arange(299) * 24 / 299).clamp(max=23)
    resized = tf_resized(ramp)[0, 0]
    torch.testing.assert_close(resized, expected.expand(299, 299), rtol=0, atol=1e-4)
    torch.testing.assert_close(tf_resized(ramp.mT)[0, 0], resized.T)


def test_openais_state_dict_is_read_too(published, tmp_path):
    path, file = published
    other = tmp_path / "inception-2015-12-05.pt"
    torch.save(file.state_dict(), other)
    images = pictures(1)
    extractors = [inception_extractor(p, "") for p in (path, other)]
    torch.testing.assert_close(extractors[0](images), extractors[1](images))


def test_where_the_file_computes_something_else_its_own_code_is_run(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    write_detector(path, gain=1.1)
    assert "using that" in inception_extractor(path, "").notes[0]


@pytest.mark.parametrize("chunk", [1, 3])
def test_features_of_an_image_depend_on_no_other(published, chunk):
    path, _ = published
    images = pictures(4)
    extractor = inception_extractor(path, "")._replace(chunk=chunk)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(extractor(images)[order], extractor(images[order]))
    assert torch.equal(extractor(images[:1])[0], extractor(images)[0])


def test_digits_features_of_an_image_depend_on_no_other():
    extractor = bundled_extractor(DigitsFeatures().eval(), "")
    images = pictures(600, 8)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(extractor(images)[order], extractor(images[order]))
    parts = torch.cat([extractor(part) for part in images.split(77)])
    assert torch.equal(extractor(images), parts)


def test_a_damaged_file_is_named(published, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    content = published[0].read_bytes()
    for bad in (b"<html>", content[:1000], content[: len(content) // 2]):
        path.write_bytes(bad)
        with pytest.raises(MissingError, match="damaged"):
            inception_extractor(path, "")
    path.write_bytes(content[-5000:])  # the table of a zip alone
    with pytest.raises(MissingError, match="damaged"):
        inception_extractor(path, "")
    headless = {k: v for k, v in published[1].state_dict().items() if k != "output.weight"}
    for other in ({"weight": torch.zeros(3)}, headless):
        torch.save(other, path)
        with pytest.raises(MissingError, match="no Inception network"):
            inception_extractor(path, "")
    write_script(Vgg(), path)
    with pytest.raises(MissingError, match="no Inception network"):
        inception_extractor(path, "")


class Vgg(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4096, 3))

    def forward(self, img, resize_images: bool = True, return_features: bool = False):
        means = img.mean((2, 3)) @ self.weight.T
        return means if return_features else means.softmax(1)


class Other(nn.Module):
    def forward(self, img):
        return img.mean((2, 3))


def write_script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))


def test_another_network_is_no_vgg16(published, tmp_path):
    path = tmp_path / "vgg16.pt"
    write_script(Other(), path)
    for wrong in (path, published[0]):  # of another signature, of another width
        with pytest.raises(MissingError, match="no VGG-16"):
            vgg16_extractor(wrong, "")


def test_vgg16_features_are_what_the_file_says(tmp_path):
    path = tmp_path / "vgg16.pt"
    write_script(Vgg(), path)
    extractor = vgg16_extractor(path, "")
    images = pictures(2)
    expected = images.float().mean((2, 3)).sum(1, keepdim=True).expand(2, 4096)
    torch.testing.assert_close(extractor(images), expected)
    assert extractor.logits is None


def test_no_feature_network_computes_in_tf32(monkeypatch):
    """Whichever it is: VGG-16's features took TF32 on a GPU, and Inception's did not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def network(images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return images.flatten(1).float()

    extractor = Extractor("any", "", 12, network, None, 2, "cpu")
    assert extractor(torch.zeros(3, 3, 2, 2, dtype=torch.uint8)).shape == (3, 12)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32
