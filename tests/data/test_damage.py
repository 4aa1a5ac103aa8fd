"""Damaged files of many images, of labels and of statistics: data, or an error of ours."""

import io
import json
import pickle
import random
import tarfile
import zipfile
from contextlib import suppress

import numpy as np
import pytest

from cmtool.data.datasets import load_dataset
from cmtool.errors import InputError
from cmtool.evaluation.sets import open_set
from tests.data.pictures import RGB, damaged, saved
from tests.data.test_sources import cifar_pickle

PICTURES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
TABLE = {"labels": [["a.png", 0], ["b.png", [0, 1]]]}


def zipped(path, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a.png", saved(RGB))
        archive.writestr("b.png", saved(RGB))
        archive.writestr("dataset.json", json.dumps(TABLE))


def packed_npz(path):
    np.savez_compressed(path, PICTURES, np.array([0, 1]))


def tarball(path, packed="", kind=tarfile.REGTYPE):
    content = cifar_pickle(np.zeros((2, 3072), np.uint8), [3, 7])
    with tarfile.open(path, f"w:{packed}", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size, member.type = len(content), kind
        member.pax_headers = {"comment": "x", "size": str(len(content))}
        archive.addfile(member, io.BytesIO(content))


def pickled(path):
    statistics = {"mu": np.zeros(4), "sigma": np.eye(4)}
    path.write_bytes(pickle.dumps(statistics, protocol=2))


SOURCES = {
    "x.zip": zipped,
    "packed.zip": lambda path: zipped(path, zipfile.ZIP_DEFLATED),
    "x.npz": lambda path: np.savez(path, PICTURES, np.array([0, 1])),
    "packed.npz": packed_npz,
    "stats.npz": lambda path: np.savez(path, mu=np.zeros(4), sigma=np.eye(4), num=np.array(9)),
    "stats.pkl": pickled,
    "x.tar": tarball,
    "x.tar.gz": lambda path: tarball(path, "gz"),
    "x.tar.bz2": lambda path: tarball(path, "bz2"),
    "x.tar.xz": lambda path: tarball(path, "xz"),
    "sparse.tar": lambda path: tarball(path, kind=tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_source_is_read_or_refused(name, tmp_path):
    path, rng = tmp_path / name, random.Random(name)
    SOURCES[name](path)
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(damaged(whole, rng))
        for use in (load_dataset, open_set):
            with suppress(InputError):
                assert use(str(path)) is not None


HEADERS = {
    "unclosed": b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4, 3",
    "nested": b"{'descr': " + b"(" * 900 + b"}",
    "deep": b"-" * 9000 + b"1",
    "indented": b"  {'descr':\n  '|u1'}\n x",
    "no literal": b"{'descr': open('x'), 'fortran_order': False, 'shape': (1,)}",
    "no text": b"{'descr': '\xff\xfe', 'fortran_order': False, 'shape': (1,)}",
    "a NUL": b"{'descr': '|u1\0', 'fortran_order': False, 'shape': (1,)}",
    "a number": b"7",
    "no type": b"{'descr': [('a', '|u1', -1)], 'fortran_order': False, 'shape': (1,)}",
    "a nested type": b"{'descr': " + b"[('a', " * 99 + b"'|u1'" + b")]" * 99
    + b", 'fortran_order': False, 'shape': (2,)}",
    "a negative side": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 4, 4, 3)}",
    "a huge side": b"{'descr': '|V0', 'fortran_order': False, 'shape': (99999999999999999999,)}",
    "true sides": b"{'descr': '|u1', 'fortran_order': 1, 'shape': (True, True, True, True)}",
}  # fmt: skip
"""What stands in the header of an npy, where numpy writes a table."""


@pytest.mark.parametrize("array", ["arr_0", "arr_1", "mu"])
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.filterwarnings("ignore")
def test_a_header_that_is_none_is_refused(header, array, tmp_path):
    text = HEADERS[header]
    content = b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(96)
    np.savez(tmp_path / "x.npz", **{} if array == "arr_0" else {"arr_0": PICTURES})
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr(f"{array}.npy", content)
    with pytest.raises(InputError, match=r"x\.npz"):
        (open_set if array == "mu" else load_dataset)(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("arguments", ["()", "('f8', 0, 1, 2)", "(8,)", "(None, None)"])
def test_a_type_of_other_arguments_is_refused(arguments, tmp_path):
    made = {"()": b")", "('f8', 0, 1, 2)": b"(X\2\0\0\0f8K\0K\1K\2t", "(8,)": b"K\x08\x85"}
    call = b"cnumpy\ndtype\n" + made.get(arguments, b"NN\x86") + b"R"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02}X\2\0\0\0mu" + call + b"s.")
    with pytest.raises(InputError, match=r"x\.pkl is no pickle of statistics"):
        open_set(tmp_path / "x.pkl")
