import errno
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.data import datasets as data_module
from cmtool.data.batches import batches
from cmtool.data.datasets import load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.data.entries import Names
from cmtool.data.images import fitted
from cmtool.data.lsun import lmdb_entries
from cmtool.data.sources import LazyImages, open_images
from cmtool.errors import InputError
from cmtool.evaluation.sets import open_set

N, SIDE = 12, 6
LABELS = [i % 3 for i in range(N)]


def picture(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


PICTURES = torch.stack([picture(i) for i in range(N)])
NAMES = [f"{i:03d}.png" for i in range(N)]


def write(folder, names=NAMES):
    for name, image in zip(names, PICTURES, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image))
    return folder


def zipped(path, names=NAMES, more=None, how=zipfile.ZIP_STORED, lie=None):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, image in zip(names, PICTURES[: len(names)], strict=True):
            archive.writestr(name, png_bytes(image))
        for name, content in (more or {}).items():
            archive.writestr(name, content)
        if lie is not None:
            archive.filelist[-1].compress_size = lie
    return path


def by_class(root, _):
    return write(root / "x", [f"c{label}/{n}" for label, n in zip(LABELS, NAMES, strict=True)])


def edm_zip(root, _):
    names = [f"{i // 10:05d}/img{i:08d}.png" for i in range(N)]
    table = {"labels": list(map(list, zip(names, LABELS, strict=True)))}
    return zipped(root / "x.zip", names, {"dataset.json": json.dumps(table)})


def csv_folder(root, _):
    folder = write(root / "x")
    rows = [f"{n},kind {label}" for n, label in zip(NAMES, LABELS, strict=True)]
    (folder / "labels.csv").write_text("name,class\n" + "\n".join(rows))
    return folder


def npz(root, _):
    np.savez(root / "x.npz", PICTURES.permute(0, 2, 3, 1).numpy(), np.array(LABELS))
    return root / "x.npz"


def lmdb(root, _):
    import lmdb

    with lmdb.open(str(root / "x"), map_size=1 << 20) as database, database.begin(write=True) as t:
        for i, image in enumerate(PICTURES):
            t.put(f"key{i:03d}".encode(), png_bytes(image))
    return root / "x"


SOURCES = {
    "folder": (lambda root, _: write(root / "x"), None),
    "class folders": (by_class, LABELS),
    "csv": (csv_folder, LABELS),
    "zip": (lambda root, _: zipped(root / "x.zip"), None),
    "EDM's zip": (edm_zip, LABELS),
    "npz": (npz, LABELS),
    "lmdb": (lmdb, None),
}


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_images_and_classes(name, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", limit)
    make, labels = SOURCES[name]
    found = load_dataset(str(make(tmp_path, None)), size=(SIDE, SIDE))
    order = sorted(range(N), key=lambda i: LABELS[i]) if name == "class folders" else range(N)
    assert len(found) == N
    assert torch.equal(found.images[torch.arange(N)], PICTURES[list(order)])
    assert torch.equal(torch.cat(list(found.chunks(5))), PICTURES[list(order)])
    if labels is None:
        assert (found.labels, found.num_classes) == (None, 0)
    else:
        assert found.labels.tolist() == [labels[i] for i in order]
        assert found.num_classes == 3
    assert len(found.fingerprint()) == 16


def test_imagenet_as_downloaded(tmp_path):
    """Folders of wordnet ids, .JPEG whatever they are: one is a PNG, some are CMYK."""
    for kind in ("n01440764", "n01443537"):
        for i in range(3):
            path = tmp_path / "train" / kind / f"{kind}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.full((7, 9, 3), 60 * i, np.uint8))
            format_ = ("JPEG", "JPEG", "PNG")[i]
            (image.convert("CMYK") if i == 1 else image).save(path, format=format_)
    for name in ("._n01440764_0.JPEG", ".DS_Store"):
        (tmp_path / "train" / "n01440764" / name).write_bytes(b"macOS")
    for path in (tmp_path, tmp_path / "train"):
        found = load_dataset(str(path), size=(4, 4), fit="adm")
        assert (len(found), found.labels.tolist(), found.num_classes) == (6, [0, 0, 0, 1, 1, 1], 2)
        assert (found.images[2] == 120).all()
        assert (found.images[4].float() - 60).abs().max() <= 2
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(png_bytes(PICTURES[0]))
    with pytest.raises(InputError, match="holds train, val") as caught:
        load_dataset(str(tmp_path))
    assert str(tmp_path / "train") in caught.value.hint


def test_macos_puts_no_images_into_a_zip(tmp_path):
    path = zipped(tmp_path / "x.zip", more={"__MACOSX/._000.png": b"x", "a/.b.png": b"x"})
    assert len(load_dataset(str(path))) == N


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_become_grey_or_coloured_and_fit_as_files_do(
    tmp_path, monkeypatch, limit, compressed
):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", limit)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "x.npz", PICTURES.permute(0, 2, 3, 1).numpy())
    folder = write(tmp_path / "x")
    whole = torch.arange(N)
    for options in ({"channels": 1}, {"size": (3, 3), "fit": "edm"}):
        a = load_dataset(str(tmp_path / "x.npz"), **options).images[whole]
        assert torch.equal(a, load_dataset(str(folder), **options).images[whole])
    save(tmp_path / "x.npz", PICTURES[:, :1].permute(0, 2, 3, 1).numpy())
    coloured = load_dataset(str(tmp_path / "x.npz")).images[whole]
    assert torch.equal(coloured, PICTURES[:, :1].expand(-1, 3, -1, -1))


def test_an_uncompressed_npz_stays_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    fortran = np.asfortranarray(PICTURES.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "x.npz", fortran, np.array(LABELS))
    found = load_dataset(str(tmp_path / "x.npz"))
    assert str(tmp_path / "x.npz") in Path("/proc/self/maps").read_text()
    assert torch.equal(found.images[torch.arange(N)], PICTURES)


def test_a_file_system_that_cannot_map_files_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENODEV, "No such device")

    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8))
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(InputError, match=r"x\.npz is on a file system that cannot map") as caught:
        load_dataset(str(tmp_path / "x.npz"))
    assert "another disk" in caught.value.hint


def test_a_link_to_nothing_is_named(tmp_path):
    folder = write(tmp_path / "x")
    (folder / "003.png").unlink()
    (folder / "003.png").symlink_to("gone.png")
    with pytest.raises(InputError, match=r"003\.png cannot be read: No such file"):
        load_dataset(str(folder))


def test_packed_names_are_the_names():
    names = ["", "a.png", "deep/é/\udcff.png", "a.png"]
    packed = Names(names)
    assert [packed[i] for i in range(len(packed))] == names


def test_folders_of_five_digits_are_no_classes(tmp_path):
    names = [f"{i // 10:05d}/img{i:08d}.png" for i in range(N)]
    assert load_dataset(str(zipped(tmp_path / "x.zip", names))).labels is None
    table = json.dumps({"labels": None})
    with_json = zipped(tmp_path / "y.zip", names, {"dataset.json": table})
    assert load_dataset(str(with_json)).labels is None


def cifar_pickle(rows, labels):
    """One batch as the archive has it: a table with numpy's array, written by Python 2."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    content = b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n"
    content += b"cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
    content += b"K\x01M" + struct.pack("<H", len(rows)) + b"M\x00\x0c\x86"
    content += b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
    content += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    content += b"T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    content += text(b"labels") + b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"eu."
    return content


KINDS = [f"kind {i}" for i in range(10)]


def test_cifars_tarball_is_read_without_unpickling(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, 10).tolist()
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for batch in (2, 1):
            part = slice(5 * batch - 5, 5 * batch)
            content = cifar_pickle(rows[part], labels[part])
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{batch}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        content = pickle.dumps({"label_names": KINDS}, protocol=2)
        member = tarfile.TarInfo("cifar-10-batches-py/batches.meta")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    for source in (path, tmp_path / "cifar-10-batches-py"):
        found = load_dataset(str(source), size=(32, 32))
        assert torch.equal(found.images, torch.from_numpy(rows).reshape(10, 3, 32, 32))
        assert found.labels.tolist() == labels
        assert found.class_names == tuple(KINDS)
        assert load_dataset(str(source), labels="none").labels is None
    marks = {
        load_dataset(str(source), in_memory=False).fingerprint()
        for source in (path, tmp_path / "cifar-10-batches-py")
    }
    assert len(marks) == 1


def test_bytes_of_python_3_in_cifars_batches_are_read_and_other_encodings_refused(tmp_path):
    rows = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    table = {"data": rows, "labels": [3, 4]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(table, protocol=2))
    found = load_dataset(str(tmp_path))
    assert torch.equal(found.images, torch.from_numpy(rows).reshape(2, 3, 32, 32))
    content = (tmp_path / "data_batch_1").read_bytes().replace(b"latin1", b"utf-16")
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(InputError, match="it encodes text as 'utf-16'"):
        load_dataset(str(tmp_path))


def test_the_last_part_of_a_split_zip_and_a_damaged_folder_of_cifar_are_named(tmp_path):
    whole = zipped(tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole[500:])  # as the .zip beside .z01
    with pytest.raises(InputError, match=r"x\.zip is damaged: its start is missing"):
        load_dataset(str(tmp_path / "x.zip"))
    (tmp_path / "data_batch_1").write_bytes(b"")
    (tmp_path / "x.zip").unlink()
    with pytest.raises(InputError, match="is not CIFAR-10's folder") as caught:
        load_dataset(str(tmp_path))
    assert "extract the archive again" in caught.value.hint


def test_code_in_cifars_tarball_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    content = b"\x80\x02cposix\nsystem\nX" + struct.pack("<I", 6 + len(str(canary)))
    content += f"touch {canary}".encode() + b"\x85R."
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"posix\.system"):
        load_dataset(str(path))
    assert not canary.exists()


def tarball(path, name, size, kind=tarfile.REGTYPE):
    """A packed archive of one file of zeros."""
    with tarfile.open(path, "w:bz2") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        archive.addfile(member, io.BytesIO(bytes(size)))
    return path


def test_a_tarball_that_unpacks_to_far_more_is_left_at_once(tmp_path):
    for name, kind in (("other", tarfile.REGTYPE), ("x", tarfile.GNUTYPE_LONGNAME)):
        path = tarball(tmp_path / "x.tar.bz2", name, 60 << 20, kind)
        size = path.stat().st_size
        assert size < 10_000
        start = time.process_time()
        with pytest.raises(InputError, match="it unpacks to more than"):
            load_dataset(str(path))
        assert time.process_time() - start < 0.5


def test_of_a_tarball_of_many_files_the_first_are_looked_at(tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for i in range(1000):
            archive.addfile(tarfile.TarInfo(f"{i}.png"))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: 200 * tarfile.BLOCKSIZE] + b"junk" * 1000))
    with pytest.raises(InputError, match="holds no data_batch_1") as caught:
        load_dataset(str(path))
    assert caught.value.hint.endswith(f"gunzip -c {path} > {tmp_path / 'x.tar'}")


def test_a_packed_tar_of_images_is_read_once_it_is_unpacked_as_the_hint_says(tmp_path):
    for how, name in (("gz", "x y.tgz"), ("bz2", "x.tar.bz2"), ("xz", "odd")):
        with tarfile.open(tmp_path / name, f"w:{how}") as archive:
            archive.add(write(tmp_path / how), ".")
        with pytest.raises(InputError, match="holds no data_batch_1") as caught:
            load_dataset(str(tmp_path / name))
        command = caught.value.hint.partition(": ")[2]
        subprocess.run(["sh", "-c", command], check=True)
        unpacked = Path(shlex.split(command)[-1])
        assert torch.equal(load_dataset(str(unpacked)).images, PICTURES)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_streaming_change_nothing(tmp_path, monkeypatch, workers, shards):
    path = str(by_class(tmp_path, None))
    wanted = batches(load_dataset(path), batch=4, shards=shards, seed=1, device="cpu", flip=True)
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    ahead = batches(
        load_dataset(path), batch=4, shards=shards, seed=1, device="cpu", flip=True,
        workers=workers,
    )  # fmt: skip
    for step in [0, 1, 2, 7, 8]:  # a run that resumes jumps
        for shard in range(shards):
            x, y = ahead(step, shard)
            assert torch.equal(x, wanted(step, shard)[0])
            assert torch.equal(y, wanted(step, shard)[1])


def test_a_step_waits_for_no_image_that_a_worker_has_time_to_decode(tmp_path, monkeypatch):
    """12 images take 0.12 s, a step 0.3 s: beside it, not before it."""
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    decode = LazyImages.image
    monkeypatch.setattr(LazyImages, "image", lambda *a: (time.sleep(0.01), decode(*a))[1])
    waited = {}
    for workers in (0, 1):
        data = load_dataset(str(write(tmp_path / "x")))
        fetch = batches(data, batch=N, shards=1, seed=0, device="cpu", workers=workers)
        fetch(0, 0)
        waited[workers] = 0.0
        for step in range(1, 5):
            time.sleep(0.3)
            asked = time.perf_counter()
            fetch(step, 0)
            waited[workers] += time.perf_counter() - asked
    assert waited[0] > 4 * 0.12
    assert waited[1] < 0.25 * waited[0]


def test_a_bad_image_met_by_a_worker_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "x")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:60])
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    ahead = batches(load_dataset(str(folder)), batch=N, shards=1, seed=0, device="cpu", workers=1)
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(InputError, match=r"007\.png cannot be decoded"):
            ahead(0, 0)
        assert multiprocessing.active_children() == []


def test_half_of_the_images_are_mirrored_and_the_same_ones_again(tmp_path):
    found = load_dataset(str(write(tmp_path / "x")))
    plain = batches(found, batch=N, shards=1, seed=0, device="cpu")
    flipped = batches(found, batch=N, shards=1, seed=0, device="cpu", flip=True)
    mirrored = []
    for step in range(40):
        x, y = plain(step, 0)[0], flipped(step, 0)[0]
        for a, b in zip(x, y, strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(2), b)
            mirrored.append(torch.equal(a.flip(2), b))
        assert torch.equal(y, flipped(step, 0)[0])
    assert 0.4 < sum(mirrored) / len(mirrored) < 0.6


def test_fits_are_those_of_the_tools_they_are_named_after():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 200  # the centred square
    for how in ("edm", "adm", "box"):
        out = fitted(image, (10, 10), how)
        assert out.shape == (3, 10, 10)
        assert (out == 200).all()
    picture = Image.fromarray(PICTURES[0].permute(1, 2, 0).numpy()).resize((50, 40))
    wide = torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())
    square = picture.crop((5, 0, 45, 40)).resize((12, 12), Image.Resampling.LANCZOS)
    assert torch.equal(
        fitted(wide, (12, 12), "edm").permute(1, 2, 0), torch.tensor(np.array(square))
    )
    half = picture.resize((25, 20), Image.Resampling.BOX)
    small = half.resize((15, 12), Image.Resampling.BICUBIC).crop((1, 0, 13, 12))
    assert torch.equal(
        fitted(wide, (12, 12), "adm").permute(1, 2, 0), torch.tensor(np.array(small))
    )


def bad_json(root, change):
    table = [[name, label] for name, label in zip(NAMES, LABELS, strict=True)]
    return zipped(root / "x.zip", more={"dataset.json": json.dumps({"labels": change(table)})})


def bomb(root):
    with zipfile.ZipFile(root / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(50_000_000))
    return root / "x.zip"


def listed_as(root, how=zipfile.ZIP_DEFLATED, content=bytes(50_000_000), **claims):
    """A zip whose list of files claims something else of its one picture."""
    with zipfile.ZipFile(root / "x.zip", "w", how) as archive:
        archive.writestr("a.png", content)
        for name, value in claims.items():
            setattr(archive.filelist[0], name, value)
    return root / "x.zip"


def twice(root):
    with pytest.warns(UserWarning, match="Duplicate"):
        return zipped(root / "x.zip", more={NAMES[0]: b"again"})


def cut(root):
    path = zipped(root / "x.zip")
    path.write_bytes(path.read_bytes()[:-30])
    return path


def broken_member(root):
    path = zipped(root / "x.zip")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    return path


def flagged(root, flag):
    """A zip whose first file has a flag in the list of files: 1 is encrypted."""
    path = zipped(root / "x.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= flag
    path.write_bytes(content)
    return path


def zipped_zip(root):
    inner = zipped(root / "y.zip").read_bytes()
    return zipped(root / "x.zip", [], {"y.zip": inner})


def linked(root, kind):
    with tarfile.open(root / "x.tar", "w") as archive:
        for name, target in (("data_batch_1", "data_batch_2"), ("data_batch_2", "data_batch_1")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return root / "x.tar"


def packed(root, content):
    (root / "x.gz").write_bytes(gzip.compress(content))
    return root / "x.gz"


def lying_npz(root):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
    )
    with zipfile.ZipFile(root / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    return root / "x.npz"


def saved(root, **arrays):
    np.savez(root / "x.npz", **arrays)
    return root / "x.npz"


def lmdb_of(root, content):
    (root / "x").mkdir()
    (root / "x/data.mdb").write_bytes(content)
    return root / "x"


def mixed(root):
    folder = write(root / "x")
    (folder / "999.png").write_bytes(png_bytes(torch.zeros(3, 9, 9, dtype=torch.uint8)))
    return folder


BAD = {
    "entry missing": (lambda r: bad_json(r, lambda t: t[1:]), "gives no class for '000.png'"),
    "negative": (lambda r: bad_json(r, lambda t: [[t[0][0], -1], *t[1:]]), "the class -1 for"),
    "not whole": (lambda r: bad_json(r, lambda t: [[t[0][0], 0.5], *t[1:]]), "class 0.5 for"),
    "no list": (lambda r: bad_json(r, lambda t: 7), "is not {'labels'"),
    "bomb": (bomb, "unpacks from"),
    "bomb of no bytes": (lambda r: listed_as(r, file_size=0), "length is not the one in the list"),
    "member of 2^63 bytes": (
        lambda r: listed_as(r, zipfile.ZIP_STORED, b"x", compress_size=1 << 63), "ends beyond its"
    ),
    "member at 2^64": (
        lambda r: listed_as(r, content=b"x", header_offset=(1 << 64) - 1), "ends beyond its"
    ),
    "table of 2^63 bytes": (
        lambda r: zipped(r / "x.zip", more={"dataset.json": "{}"}, lie=1 << 63), "ends beyond its"
    ),
    "name twice": (twice, "holds a name twice"),
    "cut zip": (cut, "is a zip archive that is cut short"),
    "class of 10^9": (lambda r: bad_json(r, lambda t: [[t[0][0], 10**9], *t[1:]]), "0 to 999,999"),
    "class of 10^30": (lambda r: bad_json(r, lambda t: [[t[0][0], 1e30], *t[1:]]), "class 1e"),
    "two of two": (lambda r: bad_json(r, lambda t: [[t[0][0], [1, 1]], *t[1:]]), r"class \[1, 1\]"),
    "no lmdb": (lambda r: lmdb_of(r, b"junk" * 5000), "is not an lmdb"),
    "lmdb of zeros": (lambda r: lmdb_of(r, bytes(20_000)), "is not an lmdb"),
    "lmdb of no pages": (
        lambda r: lmdb_of(r, bytes(16) + struct.pack("<II", 0xBEEFC0DE, 1) + bytes(9000)),
        "is not an lmdb",
    ),
    "empty lmdb": (lambda r: lmdb_of(r, b""), "is not an lmdb"),
    "broken member": (broken_member, "000.png' in .* is damaged|cannot be decoded"),
    "npz of 12 TB": (lying_npz, "claims 12,288,000,000,000 bytes"),
    "npz of floats": (lambda r: saved(r, arr_0=np.zeros((2, 4, 4, 3))), "float64"),
    "npz of objects": (lambda r: saved(r, arr_0=np.array([{}], object)), "holds objects of Python"),
    "npz of lists": (lambda r: saved(r, arr_0=np.array([[1], [1, 2]], object)), "holds objects"),
    "npz of channels first": (lambda r: saved(r, arr_0=np.zeros((2, 3, 4, 4), np.uint8)), "uint8 "),
    "npz of five sides": (lambda r: saved(r, arr_0=np.zeros((1, 2, 4, 4, 3), np.uint8)), "uint8 "),
    "npz of records": (lambda r: saved(r, arr_0=np.zeros((2, 4, 4, 3), [("r", "u1")])), "'u1'"),
    "npz of pictures": (lambda r: zipped(r / "x.npz"), "holds no images: the magic string"),
    "encrypted zip": (lambda r: flagged(r, 1), "is encrypted, or packed"),
    "zip of bzip2": (lambda r: zipped(r / "x.zip", how=zipfile.ZIP_BZIP2), "packed in a rare way"),
    "zip of LZMA": (lambda r: zipped(r / "x.zip", how=zipfile.ZIP_LZMA), "packed in a rare way"),
    "zip of a zip": (lambda r: zipped_zip(r), "no images in"),
    "empty zip": (lambda r: zipped(r / "x.zip", []), "no images in"),
    "link in a zip": (lambda r: zipped(r / "x.zip", more={"0.png": "/bin"}), "is not an image"),
    "tarball of hard links": (lambda r: linked(r, tarfile.LNKTYPE), "holds no data_batch_1"),
    "tarball of links": (lambda r: linked(r, tarfile.SYMTYPE), "holds no data_batch_1"),
    "tarball of pipes": (lambda r: linked(r, tarfile.FIFOTYPE), "holds no data_batch_1"),
    "gzip of no tarball": (lambda r: packed(r, b"text"), "is not CIFAR-10's archive"),
    "npz of nothing": (lambda r: saved(r, x=np.zeros(2)), "has no arr_0, but x"),
    "odd labels": (
        lambda r: saved(r, arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.array([0, -1])),
        "arr_1",
    ),
    "mixed sizes": (mixed, r"999\.png is 9x9, not 6x6"),
    "text": (lambda r: [(r / "x").mkdir(), (r / "x" / "a.txt").write_text("a")] and r / "x",
             "no images in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(name, tmp_path):
    make, message = BAD[name]
    with pytest.raises(InputError, match=message):
        load_dataset(str(make(tmp_path)), size=(SIDE, SIDE))


def test_a_file_of_a_zip_is_not_unpacked_beyond_the_length_that_it_claims(tmp_path):
    read = open_images(listed_as(tmp_path, file_size=0)).read
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="is damaged"):
            read(0)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_what_cannot_be_unpacked_is_not_sent_to_a_command_that_refuses_it_too(tmp_path):
    for path in (flagged(tmp_path, 1), lying_npz(tmp_path)):
        with pytest.raises(InputError) as caught:
            load_dataset(str(path))
        assert "cmtool" not in caught.value.hint


def with_zip64(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(NAMES, PICTURES, strict=True):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(png_bytes(image))


ODD_ZIPS = {
    "zip64": with_zip64,
    "after a program": lambda path: path.write_bytes(b"#!/bin/sh\n" + zipped(path).read_bytes()),
    "before junk": lambda path: path.write_bytes(zipped(path).read_bytes() + b"junk" * 99),
    "with folders": lambda path: zipped(path, more={"a.png/": ""}),
    "packed": lambda path: zipped(path, how=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("kind", ODD_ZIPS)
def test_zips_of_other_tools_are_read(kind, tmp_path):
    ODD_ZIPS[kind](tmp_path / "x.zip")
    assert torch.equal(load_dataset(str(tmp_path / "x.zip")).images, PICTURES)


def test_endings_may_be_in_capitals(tmp_path):
    npz(tmp_path, None).rename(tmp_path / "X.NPZ")
    zipped(tmp_path / "X.ZIP")
    for name in ("X.NPZ", "X.ZIP"):
        assert torch.equal(load_dataset(str(tmp_path / name)).images[torch.arange(N)], PICTURES)
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "s.npz").rename(tmp_path / "S.NPZ")
    assert open_set(tmp_path / "S.NPZ").gaussian.mean.tolist() == [0] * 4


@pytest.mark.parametrize("kept", [5000, 8192, 0.5, 0.99])
def test_a_database_that_is_cut_short_is_refused(kept, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(tmp_path / "x"), map_size=1 << 24)
    with environment, environment.begin(write=True) as transaction:
        for name, image in zip(NAMES, PICTURES, strict=True):
            transaction.put(name.encode(), png_bytes(image) * 20)
    file = tmp_path / "x/data.mdb"
    assert len(lmdb_entries(tmp_path / "x").names) == N
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(InputError, match="that it speaks of"):
        load_dataset(str(tmp_path / "x"))


CLASSES = ["cat", "dog"] * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (["0", "1"], [0, 1]),
        (["\u00b2", "1"], [1, 0]),  # no digit of ours: names
        (["--5", "7"], [0, 1]),
        (["9" * 5000, "1"], [1, 0]),
        (["3", "cat"], [0, 1]),
    ],
)
def test_labels_in_a_table_are_numbers_or_names(text, expected, tmp_path):
    rows = "".join(f"{name},{text[i % 2]}\n" for i, name in enumerate(NAMES))
    data = load_dataset(str(zipped(tmp_path / "x.zip", more={"labels.csv": rows})))
    assert data.labels[:2].tolist() == expected


@pytest.mark.parametrize("change", [float, lambda label: [float(label == i) for i in range(3)],
                                    lambda label: [int(label == i) for i in range(3)]])  # fmt: skip
def test_labels_of_other_tools_are_classes(change, tmp_path):
    path = bad_json(tmp_path, lambda table: [[name, change(label)] for name, label in table])
    assert load_dataset(str(path)).labels.tolist() == LABELS


@pytest.mark.parametrize("where", ["folders", "dataset.json", "labels.csv"])
def test_names_with_backslashes_are_those_of_windows(where, tmp_path):
    names = [f"data\\{kind}\\{name}" for kind, name in zip(CLASSES, NAMES, strict=True)]
    table = {
        "labels": [
            [name, sorted({*CLASSES}).index(c)] for name, c in zip(names, CLASSES, strict=True)
        ]
    }
    rows = "".join(f"{name},{c}\n" for name, c in zip(names, CLASSES, strict=True))
    more = {"dataset.json": json.dumps(table), "labels.csv": rows}
    data = load_dataset(str(zipped(tmp_path / "x.zip", names, {where: more.get(where, "")})))
    assert sorted(data.labels.tolist()) == [0] * 6 + [1] * 6
    assert data.num_classes == 2


def test_classes_may_be_links_to_folders_and_loops_end(tmp_path):
    kinds = write(tmp_path / "all", [f"{c}/{n}" for c, n in zip(CLASSES, NAMES, strict=True)])
    (tmp_path / "x").mkdir()
    (tmp_path / "x/cat").symlink_to(kinds / "cat")
    (tmp_path / "x/dog").symlink_to(kinds / "dog")
    (kinds / "cat/back").symlink_to(tmp_path / "x")
    (kinds / "dog/self").symlink_to(kinds / "dog")
    entries = open_images(tmp_path / "x")
    names = [entries.names[i] for i in range(len(entries.names))]
    assert names == sorted(f"{c}/{n}" for c, n in zip(CLASSES, NAMES, strict=True))
    assert entries.labels.classes == [0] * 6 + [1] * 6


def test_names_that_climb_out_are_only_names(tmp_path):
    path = zipped(tmp_path / "x.zip", [f"../../{name}" for name in NAMES])
    assert len(load_dataset(str(path))) == N
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


STREAM = """
import json, os, resource, sys
from pathlib import Path
from cmtool.data.batches import batches
from cmtool.data.datasets import load_dataset

def resident(pid="self"):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()

load_dataset("digits")
before = resident()
data = load_dataset(sys.argv[1], size=(32, 32))
fetch = batches(data, batch=256, shards=1, seed=0, device="cpu", workers=2)
for step in range(100):
    x, labels = fetch(step, 0)
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
# a worker begins with what its parent holds; how much of that a kernel copies is not ours
grown = resident() - before + sum(max(resident(child) - before, 0) for child in children)
print(json.dumps({"images": len(data), "lazy": type(data.images).__name__, "grown": grown}))
"""


@pytest.mark.slow
def test_200_000_images_stream_from_a_zip_in_little_memory(tmp_path):
    """Twice CIFAR's pixels, by two workers."""
    side, count = 32, 200_000
    content = [
        png_bytes(torch.randint(0, 256, (3, side, side), dtype=torch.uint8)) for _ in range(16)
    ]
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, content[i % 16])
        table = {"labels": [[name, i % 10] for i, name in enumerate(names)]}
        archive.writestr("dataset.json", json.dumps(table))
    out = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "x.zip")], capture_output=True, check=True
    )
    told = json.loads(out.stdout)
    assert (told["images"], told["lazy"]) == (count, "LazyImages")
    assert told["grown"] < 300e6


@pytest.mark.parametrize("way", ["gone", "damaged"])
def test_a_picture_that_a_database_no_longer_gives_is_named(way, tmp_path, monkeypatch):
    library = pytest.importorskip("lmdb")
    read = lmdb_entries(lmdb(tmp_path, None)).read
    assert read(3) == png_bytes(PICTURES[3])

    class Changed:
        """A database from which another process took a picture, or in which it broke a page."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def begin(self):
            return self

        def get(self, key):
            if way == "damaged":
                raise library.CorruptedError("mdb_get: page not found")

    monkeypatch.setattr(library, "open", lambda *_, **__: Changed())
    monkeypatch.setattr(os, "getpid", lambda: -1)  # an environment is opened once a process
    with pytest.raises(InputError, match=r"'key003' (in .*x cannot be read|is no longer in)"):
        read(3)
