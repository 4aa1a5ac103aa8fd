"""Bad images, bad labels, bad archives: named, with exit code 3, before or without harm."""

import io
import json
import os
import resource
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli import main
from cmtool.data import datasets as data_module
from cmtool.data.drawing import png_bytes
from tests.cli.conftest import TINY

SIDE = 8
SMALL = [*TINY, "--set", "model.num_classes=0", "--set", "data.workers=1"]


def png(i=0, side=SIDE):
    generator = torch.Generator().manual_seed(i)
    return png_bytes(torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator))


def folder(root, count=16):
    root.mkdir()
    for i in range(count):
        (root / f"{i:02d}.png").write_bytes(png(i))
    return root


def zipped(path, contents, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents:
            archive.writestr(name, content)
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def train(cmtool, data, *more, steps=2):
    return cmtool("train", "--preset", "digits-edm", "--data", data, "--out", "run", *SMALL,
                  "--set", f"train.steps={steps}", *more)  # fmt: skip


def refused(result, *words):
    """The exit code, the words of the error, nothing on stdout and no traceback."""
    assert result.code == 3, result.err
    assert result.out == b""
    assert "Traceback" not in result.err
    error = next(line for line in result.err.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in error
    assert "\nhint: " in result.err


@pytest.fixture(params=["in memory", "streamed"])
def kept(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    return request.param


def test_24_a_truncated_image_is_listed_and_named_before_the_first_step(cmtool, tmp_path, kept):
    root = folder(tmp_path / "x")
    assert train(cmtool, root).code == 0
    (root / "11.png").write_bytes(png(11)[:90])
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    refused(train(cmtool, root, "--overwrite"), "x/11.png cannot be decoded")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    listed = cmtool("data", "info", root, "--json")
    assert listed.code == 3
    assert ["11.png" in name for name in json.loads(listed.out)["unreadable"]] == [True]
    assert cmtool("data", "prepare", root, "y.zip", "--skip-bad", "1").code == 0
    assert train(cmtool, "y.zip", "--overwrite").code == 0


def test_24_in_a_set_too_large_to_look_through_it_is_named_when_it_is_met(
    cmtool, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    monkeypatch.setattr(data_module, "MAX_CHECKED", 15)
    root = folder(tmp_path / "x")
    (root / "11.png").write_bytes(png(11)[:90])
    refused(train(cmtool, root, "--set", "train.batch=2", steps=100), "x/11.png cannot be decoded")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "11.png" in status["error"]


def chunk(kind, content):
    crc = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + crc


def bare_png(width, height, *more, rows=b""):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\x00\x00\x00\x00"
    data = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *more, data, chunk(b"IEND", b"")]
    )


def flat_png(root):
    """144 megapixels in 17 kilobytes."""
    content = bare_png(12000, 12000, rows=bytes(12000 * 1501))
    assert len(content) < 20_000
    return one(root, content)


def one(root, content):
    root.mkdir()
    (root / "bomb.png").write_bytes(content)
    return root


def text_png(root):
    text = b"note\x00\x00" + zlib.compress(bytes(200 << 20), 9)
    return one(root, bare_png(8, 8, chunk(b"zTXt", text), rows=bytes(16)))


def zip_of_much(root):
    with zipfile.ZipFile(root.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(300 << 20))
    return root.with_suffix(".zip")


def zip_of_a_large_table(root):
    with zipfile.ZipFile(root.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png())
        archive.writestr("dataset.json", b" " * (300 << 20))
    return root.with_suffix(".zip")


def npz_header(count):
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (count, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


def npz_of_nothing(root):
    return zipped(root.with_suffix(".npz"), [("arr_0.npy", npz_header(10**9))])


def npz_of_zeros(root):
    with zipfile.ZipFile(root.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npz_header(1 << 15) + bytes(12288 << 15))
    return root.with_suffix(".npz")


BOMBS = {
    "144 megapixels": (flat_png, "12000x12000 pixels"),
    "zTXt of 200 MB": (text_png, "bomb.png cannot be decoded"),
    "zip member of 300 MB": (zip_of_much, "unpacks from"),
    "dataset.json of 300 MB": (zip_of_a_large_table, "dataset.json"),
    "npz of 12 TB": (npz_of_nothing, "claims 12,288,000,000,000 bytes"),
    "npz of 400 MB of zeros": (npz_of_zeros, "claims 402,653,184 bytes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_25_a_bomb_is_refused_in_little_time_and_memory(name, cmtool, tmp_path):
    make, words = BOMBS[name]
    path = make(tmp_path / "x")
    train(cmtool, tmp_path / "nowhere")  # everything is imported
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # a child's peak is its own
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            main(["data", "info", str(path)])
        except SystemExit as end:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            told = {"code": end.code, "kB": grown, "seconds": time.process_time() - start}
            os.write(write, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    told = json.loads(os.read(read, 1000))
    assert told["code"] == 3
    assert told["kB"] < 300e3
    assert told["seconds"] < 1
    refused(train(cmtool, path), words)


def saved(path, image, **more):
    image.save(path, **more)


def mixed(root):
    """A gradient in every mode; all but the wide one are squares of 8."""
    root.mkdir()
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1))
    saved(root / "a-rgb.png", rgb)
    saved(root / "b-grey.png", rgb.convert("L"))
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(ramp))
    saved(root / "c-alpha.png", rgba)
    saved(root / "d-palette.png", rgb.quantize(16))
    saved(root / "e-cmyk.jpg", rgb.convert("CMYK"))
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    saved(root / "f-deep.png", Image.fromarray(deep))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(root / "g-turned.jpg", rgb, exif=exif)
    return root


def test_26_every_mode_is_converted_and_counted(cmtool, tmp_path):
    root = mixed(tmp_path / "x")
    told = json.loads(cmtool("data", "info", root, "--json").out)
    assert told["modes"] == {
        "RGB": 1, "L": 1, "RGBA": 1, "P": 1, "CMYK": 1, "I;16": 1, "RGB rotated": 1
    }  # fmt: skip
    assert told["sizes"] == {"8x8": 7}
    assert "I;16 (1)" in cmtool("data", "info", root).text
    assert train(cmtool, root, "--set", "train.batch=7").code == 0
    for path in root.iterdir():
        if path.name != "f-deep.png":
            path.unlink()
    mean = json.loads(cmtool("data", "info", root, "--json").out)["mean"]
    assert mean == pytest.approx([0, 0, 0], abs=1 / 127.5)


def test_26_another_size_is_refused_with_both_sizes_unless_a_rule_fits_it(cmtool, tmp_path):
    root = mixed(tmp_path / "x")
    saved(root / "h-wide.png", Image.new("RGB", (12, 9)))
    refused(train(cmtool, root), "h-wide.png is 12x9, not 8x8")
    assert train(cmtool, root, "--set", "data.fit=edm").code == 0
    refused(cmtool("data", "prepare", root, "y.zip"), "h-wide.png is 12x9", "a-rgb.png is 8x8")
    assert not (tmp_path / "y.zip").exists()
    assert cmtool("data", "prepare", root, "y.zip", "--size", "8", "--fit", "adm").code == 0
    saved(root / "h-wide.png", Image.fromarray(np.ones((8, 8), np.float32)), format="TIFF")
    refused(train(cmtool, root), "h-wide.png cannot be decoded", "float")


def test_27_nothing_there(cmtool, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "a.dat").write_bytes(b"neither")
    for command in (["train", "--out", "run", "--data"], ["data", "info"]):
        refused(cmtool(*command, "gone"), "'gone'")
        for name in ("empty", "text"):
            result = cmtool(*command, name)
            refused(result, f"no images in {name}")
            assert "looked for .png" in result.err
        refused(cmtool(*command, "a.dat"), "a.dat is not a data set")
    refused(cmtool("data", "prepare", "empty", "y.zip"), "no images in empty")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "y.zip").exists()


NAMES = [f"00000/img{i:08d}.png" for i in range(10)]
GOOD = [[name, i] for i, name in enumerate(NAMES)]
LABELS = {
    "an entry is missing": (GOOD[1:], f"gives no class for {NAMES[0]!r}"),
    "negative": ([*GOOD[:9], [NAMES[9], -1]], f"gives the class -1 for {NAMES[9]!r}"),
    "a fraction": ([*GOOD[:9], [NAMES[9], 0.5]], "gives the class 0.5"),
    "a word": ([*GOOD[:9], [NAMES[9], "cat"]], "gives the class 'cat'"),
    "true": ([*GOOD[:9], [NAMES[9], True]], "gives the class True"),
    "no table": ("cat", "is not {'labels': [[name, class], ...]}"),
    "null": (None, "has 0 classes, the model has 10"),
    "too many": ([*GOOD[:9], [NAMES[9], 11]], "has 12 classes, the model has 10"),
}


@pytest.mark.parametrize("name", LABELS)
def test_28_bad_labels_are_named(name, cmtool, tmp_path):
    labels, words = LABELS[name]
    contents = [(n, png(i)) for i, n in enumerate(NAMES)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for n, content in contents:
            archive.writestr(n, content)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    conditional = ["--set", "model.num_classes=10", "--set", "train.batch=10"]
    refused(train(cmtool, "x.zip", *conditional), words, "x.zip")
    assert not (tmp_path / "run").exists()


def test_28_no_labels_for_a_model_that_wants_them(cmtool, tmp_path):
    path = zipped(tmp_path / "x.zip", [(n, png(i)) for i, n in enumerate(NAMES)])
    refused(train(cmtool, path, "--set", "model.num_classes=10"), "has 0 classes, the model has 10")
    path = zipped(path, [(n, png(i)) for i, n in enumerate(NAMES)], GOOD)
    conditional = ["--set", "model.num_classes=10", "--set", "train.batch=10"]
    assert train(cmtool, path, *conditional).code == 0


def test_29_a_damaged_archive_is_named(cmtool, tmp_path):
    path = zipped(tmp_path / "x.zip", [(n, png(i)) for i, n in enumerate(NAMES)], GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused(train(cmtool, path), "x.zip is a zip archive that is cut short")
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    refused(train(cmtool, path, "--set", "model.num_classes=10"), NAMES[0], "x.zip", "damaged")
    at = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: at + 10] + b"\xff\xff" + whole[at + 12 :])  # a rare compression
    refused(train(cmtool, path), NAMES[0], "packed in a rare way")


def test_29_names_that_climb_out_stay_names(cmtool, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["../../escape.png", "/etc/escape.png", "..\\escape.png"]
    zipped(tmp_path / "in" / "x.zip", [(n, png(i)) for i, n in enumerate(names)])
    assert json.loads(cmtool("data", "info", "in/x.zip", "--json").out)["images"] == 3
    assert cmtool("data", "prepare", "in/x.zip", "in/y.zip").code == 0
    with zipfile.ZipFile(tmp_path / "in" / "y.zip") as archive:
        assert archive.namelist() == [f"00000/img0000000{i}.png" for i in range(3)] + [
            "dataset.json"
        ]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip", "y.zip"]


def test_29_a_name_that_comes_twice_is_refused(cmtool, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(tmp_path / "x.zip", [("a.png", png(0)), ("a.png", png(1))])
    refused(train(cmtool, "x.zip"), "x.zip holds a name twice")
