import json
import shlex
import time
import zipfile

import torch

from cmtool.data.datasets import load_dataset
from cmtool.data.drawing import png_bytes
from tests.cli.conftest import TINY


def folder(root, count=6, side=6):
    for i in range(count):
        path = root / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        path.write_bytes(png_bytes(image))
    return root


def test_info_counts_what_is_there(cmtool, tmp_path):
    told = json.loads(cmtool("data", "info", folder(tmp_path / "x", count=5), "--json").out)
    assert (told["images"], told["classes"], told["images_per_class"]) == (5, 2, [3, 2])
    assert told["sizes"] == {"6x6": 5}
    assert len(told["mean"]) == 3
    assert 0.4 < told["sigma_data"] < 0.7
    assert told["unreadable"] == []
    text = cmtool("data", "info", "digits").text
    assert "11536" in text
    assert "8x8 (11536)" in text


def test_info_tells_the_deviation_of_a_set_about_its_mean(cmtool, tmp_path):
    """Of each channel about its own mean: grey levels of 51 are 0.4 in [-1, 1]."""
    (tmp_path / "x").mkdir()
    for name, levels in (("a", (255, 102, 0)), ("b", (255, 204, 255))):
        picture = torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
        (tmp_path / "x" / f"{name}.png").write_bytes(png_bytes(picture))
    told = json.loads(cmtool("data", "info", "x", "--json").out)
    assert told["mean"] == [1.0, 0.2, 0.0]
    assert told["sigma_data"] == round(((0 + 0.4**2 + 1) / 3) ** 0.5, 4)


def test_info_names_every_unreadable_image_and_counts_sizes(cmtool, tmp_path):
    root = folder(tmp_path / "x")
    (root / "c0" / "0.png").write_bytes(b"not a picture")
    (root / "c1" / "9.png").write_bytes(png_bytes(torch.zeros(3, 4, 5, dtype=torch.uint8)))
    whole = root / "c1" / "3.png"
    whole.write_bytes(whole.read_bytes()[:70])
    result = cmtool("data", "info", root, "--json")
    assert result.code == 3
    told = json.loads(result.out)
    assert told["sizes"] == {"6x6": 4, "5x4": 1}
    assert [name for name in ("0.png", "3.png") if any(name in b for b in told["unreadable"])] == [
        "0.png", "3.png",
    ]  # fmt: skip
    assert "2 of 7 images" in result.err


def test_prepare_writes_what_edms_tool_writes_and_training_reads(cmtool, tmp_path):
    root = folder(tmp_path / "x")
    result = cmtool("data", "prepare", root, "out/x.zip")
    assert result.text == "out/x.zip\n"
    with zipfile.ZipFile(tmp_path / "out" / "x.zip") as archive:
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
        table = json.loads(archive.read("dataset.json"))
    assert table["labels"][5] == ["00000/img00000005.png", 1]
    again, first = load_dataset(str(tmp_path / "out" / "x.zip")), load_dataset(str(root))
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)
    assert cmtool("data", "prepare", root, "out/x.zip").code == 2
    assert cmtool("data", "prepare", root, "x.tar").code == 2
    assert cmtool("data", "prepare", root, "y.zip", "--fit", "adm").code == 2


def test_the_same_set_makes_the_same_zip(cmtool, tmp_path, monkeypatch):
    root = folder(tmp_path / "x")
    assert cmtool("data", "prepare", root, "a.zip").code == 0
    with monkeypatch.context() as later:
        later.setattr("time.localtime", lambda *_: time.gmtime(2e9))
        assert cmtool("data", "prepare", root, "b.zip").code == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_nothing_readable_is_no_archive(cmtool, tmp_path):
    root = folder(tmp_path / "x", count=2)
    for path in root.rglob("*.png"):
        path.write_bytes(b"not a picture")
    result = cmtool("data", "prepare", root, "y.zip", "--skip-bad", "9")
    assert result.code == 3
    assert "error: none of the images of" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_prepare_fits_and_leaves_out_only_what_it_may(cmtool, tmp_path):
    root = folder(tmp_path / "x", side=9)
    assert (
        cmtool("data", "prepare", root, "y.zip", "--size", "4", "--fit", "edm", "--grey").code == 0
    )
    assert load_dataset(str(tmp_path / "y.zip"), channels=1).images.shape == (6, 1, 4, 4)
    (root / "c0" / "2.png").write_bytes(b"not a picture")
    refused = cmtool("data", "prepare", root, "z.zip")
    assert refused.code == 3
    assert "2.png" in refused.err
    assert "To leave such images out, add --skip-bad" in refused.err
    hint = cmtool("data", "info", root).err.splitlines()[-1]
    assert cmtool(*shlex.split(hint.partition(": cmtool ")[2])).text == "readable.zip\n"
    (tmp_path / "readable.zip").unlink()
    assert not (tmp_path / "z.zip").exists()
    skipped = cmtool("data", "prepare", root, "z.zip", "--skip-bad", "1")
    assert skipped.code == 0
    assert "left out: " in skipped.err
    (root / "c1" / "3.png").write_bytes(b"nor this")
    assert cmtool("data", "prepare", root, "w.zip", "--skip-bad", "1").code == 3
    assert cmtool("data", "prepare", root, "w.zip", "--skip-bad=-1").code == 2
    for command in (["--skip-bad", root, "w.zip"], [root, "w.zip", "--skip-bad", "--overwrite"]):
        result = cmtool("data", "prepare", *command)
        assert result.code == 0, result.err
        assert result.err.count("left out: ") == 2
    (tmp_path / "w.zip").unlink()
    (root / "c1" / "3.png").write_bytes((root / "c1" / "1.png").read_bytes())
    assert len(load_dataset(str(tmp_path / "z.zip"))) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y.zip", "z.zip"]


def test_a_model_without_classes_trains_on_a_set_that_has_them(cmtool, tmp_path):
    root = folder(tmp_path / "x", side=8)
    command = ["train", "--preset", "digits-edm", "--data", root, "--set", "train.steps=1", *TINY]
    result = cmtool(*command, "--set", "model.num_classes=0", "--set", "train.batch=2")
    assert result.code == 0, result.err
    assert "the 2 classes of" in result.err
