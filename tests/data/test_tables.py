"""Parquet and folders of `datasets`: columns, classes, damage."""

import json
import random
import sys
import time

import numpy as np
import pytest
import torch

from cmtool.data import columns as columns_module
from cmtool.data.columns import Reader
from cmtool.data.datasets import check_rule, load_dataset
from cmtool.errors import InputError, MissingError
from tests.data.forms import FILES, KINDS, LABELS, NAMES, PICTURES, N, as_parquet, as_saved, table
from tests.data.pictures import damaged

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ALL = torch.arange(N)
BYTES = list(FILES.values())


def written(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


KINDS_OF_IMAGES = {
    "struct": lambda: pyarrow.array([{"bytes": b, "path": n} for n, b in FILES.items()]),
    "struct without paths": lambda: pyarrow.array([{"bytes": b, "path": None} for b in BYTES]),
    "bytes": lambda: pyarrow.array(BYTES),
    "large bytes": lambda: pyarrow.array(BYTES, pyarrow.large_binary()),
}


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("kind", KINDS_OF_IMAGES)
def test_the_column_of_images_is_found(kind, compression, tmp_path):
    columns = {"note": pyarrow.array([b"text"] * N), "picture": KINDS_OF_IMAGES[kind]()}
    path = written(tmp_path / "x.parquet", columns, compression=compression, row_group_size=5)
    found = load_dataset(path, in_memory=False)
    assert torch.equal(found.images[ALL.flip(0)], PICTURES.flip(0))
    assert found.labels is None if kind != "struct" else found.labels.tolist() == LABELS
    names = found.images.entries.names
    assert names[11] == (NAMES[11] if kind == "struct" else "11")


OF_KINDS = pyarrow.array([KINDS[i] for i in LABELS])
CLASSES = {
    "numbers": ("label", pyarrow.array(LABELS), ()),
    "texts": ("cls", OF_KINDS, KINDS),
    "numbers as texts": ("class", pyarrow.array([f"{i:02d}" for i in LABELS]), ()),
    "a dictionary": ("labels", OF_KINDS.dictionary_encode(), KINDS),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_are_in_a_column(kind, tmp_path):
    name, values, names = CLASSES[kind]
    columns = {"image": pyarrow.array(BYTES), name: values, "size": pyarrow.array([0.5] * N)}
    path = written(tmp_path / "x.parquet", columns, row_group_size=5)
    found = load_dataset(path)
    assert (found.labels.tolist(), found.class_names) == (LABELS, names)
    assert load_dataset(path, labels=name).labels.tolist() == LABELS
    assert load_dataset(path, labels="none").labels is None
    with pytest.raises(InputError, match="have no names of files"):
        load_dataset(path, labels="folders")


def test_classes_are_in_the_column_that_is_named(tmp_path):
    rows = {"image": pyarrow.array(BYTES), "label": pyarrow.array(LABELS)}
    path = written(tmp_path / "x.parquet", rows | {"mood": pyarrow.array(["sad", "gay"] * 6)})
    assert load_dataset(path, labels="mood").class_names == ("gay", "sad")
    check_rule(path, "mood")
    for name in ("moods", "image"):
        for load in (lambda name: load_dataset(path, labels=name), lambda n: check_rule(path, n)):
            with pytest.raises(InputError, match=f"{name}.* has no such column") as caught:
                load(name)
    assert "folders" in caught.value.hint


@pytest.mark.parametrize("write", [as_parquet, as_saved])
def test_names_of_classes_are_those_of_the_features(write, tmp_path):
    rows = table(labels=[0] * N, names=["ant", "bee", "cow", "dab"])
    found = load_dataset(str(write(tmp_path, rows=rows)))
    assert (found.num_classes, found.class_names) == (4, ("ant", "bee", "cow", "dab"))


def test_names_of_classes_may_be_in_dataset_info(tmp_path):
    folder = as_saved(tmp_path, rows=table().replace_schema_metadata(None))
    features = {"label": {"names": KINDS, "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert load_dataset(str(folder)).class_names == KINDS


@pytest.mark.parametrize(
    "about", ["{", "[]", '{"info": 3}', '{"info": {"features": {"label": 3}}}']
)
def test_features_that_are_none_do_not_matter(about, tmp_path):
    rows = table().replace_schema_metadata({"huggingface": about})
    assert load_dataset(str(as_parquet(tmp_path, rows=rows))).class_names == ()


def test_of_several_columns_of_images_one_must_be_named(tmp_path):
    columns = {"left": pyarrow.array(BYTES), "right": pyarrow.array(BYTES[::-1])}
    path = written(tmp_path / "x.parquet", columns | {"n": pyarrow.array(LABELS)})
    with pytest.raises(InputError, match="several columns of images: left, right") as caught:
        load_dataset(path)
    assert "--column left. In training, add --set data.column=left" in caught.value.hint
    assert torch.equal(load_dataset(path, column="right").images, PICTURES.flip(0))
    for name, what, words in (
        ("rigth", "has no column 'rigth'", "did you mean 'right'"),
        ("n", "the column 'n' of .* holds int64", "its columns of bytes: left, right"),
    ):
        with pytest.raises(InputError, match=what) as caught:
            load_dataset(path, column=name)
        assert words in caught.value.hint


def test_splits_are_refused_and_chosen_as_the_hint_says(tmp_path):
    as_parquet(tmp_path)
    path = as_parquet(tmp_path, rows=table().slice(0, 4), split="validation")
    with pytest.raises(InputError, match="holds train, validation") as caught:
        load_dataset(str(path))
    assert caught.value.hint == f"give one of them: {path}:train"
    assert len(load_dataset(f"{path}:train")) == N
    assert len(load_dataset(f"{path}:validation")) == 4


def test_a_folder_of_saved_splits_is_refused_and_one_of_them_read(tmp_path):
    for split in ("train", "test"):
        as_saved(tmp_path, name=f"all/{split}")
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    (tmp_path / "all" / "train" / "cache-0123.arrow").write_bytes(b"what others keep there")
    with pytest.raises(InputError, match="holds test, train") as caught:
        load_dataset(str(tmp_path / "all"))
    for path in (caught.value.hint.removeprefix("give one of them: "), tmp_path / "all/test"):
        assert torch.equal(load_dataset(str(path)).images, PICTURES)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = str(as_parquet(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError) as caught:
        load_dataset(path)
    assert caught.value.hint == "pip install 'cmtool[parquet]'"


def test_a_group_of_rows_is_unpacked_once_while_it_is_kept(tmp_path, monkeypatch):
    unpacked = []
    files = columns_module.Tables.files
    monkeypatch.setattr(
        columns_module.Tables,
        "files",
        lambda s, part, c: unpacked.append(part) or files(s, part, c),
    )
    data = load_dataset(str(as_parquet(tmp_path)), in_memory=False)
    unpacked.clear()
    data.images[torch.tensor([0, 3, 1, 4, 2, 5])]
    assert len(unpacked) == 2
    monkeypatch.setattr(columns_module, "KEPT_BYTES", 0)
    data.images[torch.tensor([6, 0, 6])]
    assert len(unpacked) == 5
    reader = data.images.entries.sizes.__self__
    assert isinstance(reader, Reader)
    assert len(reader.kept) == 1


def test_a_note_says_where_streaming_is_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(columns_module, "SLOW_GROUP", 100)
    path = as_parquet(tmp_path)
    (note,) = load_dataset(str(path)).notes
    assert note.endswith(f"a zip streams faster: cmtool data prepare {path} images.zip")


def bomb(path):
    """A gigabyte of zeros in a megabyte of zstd: the footer does not hide it."""
    zeros = pyarrow.array([bytes(1 << 20)] * 200)
    return written(path, {"image": zeros}, compression="zstd", use_dictionary=False)


def dictionary_bomb(path):
    """A million times the same image of a megabyte, which is in the file once."""
    one = pyarrow.array([BYTES[0] + random.Random(0).randbytes(1 << 20)])
    index = pyarrow.array(np.zeros(3000, np.int32))
    images = pyarrow.DictionaryArray.from_arrays(index, one)
    return written(path, {"image": images}, dictionary_pagesize_limit=8 << 20, store_schema=False)


def holding(values, kind=None, **more):
    columns = {"x": pyarrow.array(values, kind)} | {k: pyarrow.array(v) for k, v in more.items()}
    return lambda path: written(path, columns)


def cut(path):
    holding(BYTES)(path)
    path.write_bytes(path.read_bytes()[:-9])
    return str(path)


PLACE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
BAD = {
    "a bomb": (bomb, "claims 209,71"),
    "a bomb of a dictionary": (dictionary_bomb, "unpacks to more than"),
    "no images": (holding(LABELS), "no column of image files, but x"),
    "texts": (holding([b"text"] * N), "no column of image files"),
    "sounds": (holding([{"bytes": b"ID3", "path": "a"}]), "no column of image files"),
    "lists": (holding([[1, 2]]), "no column of image files"),
    "paths alone": (holding([{"bytes": None, "path": "a"}], PLACE), "no column of image files"),
    "a row without": (holding([*BYTES[:3], None]), "row 3 of .* has no image"),
    "no rows": (holding([], pyarrow.binary()), "has 0 rows"),
    "no columns": (lambda path: written(path, {}), "but nothing"),
    "a class too few": (holding(BYTES, label=[*LABELS[:-1], None]), "no class for '11'"),
    "a class of -1": (holding(BYTES, label=[-1, *LABELS[1:]]), "the class -1 for '0'"),
    "a long class": (holding(BYTES[:1], label=["x" * 5000]), "a text of 5,000 letters"),
    "junk": (lambda p: p.write_bytes(b"PAR1" + b"junk" * 100) and str(p), "is damaged"),
    "cut short": (cut, "is damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_table_that_cannot_be_used_is_named(kind, tmp_path):
    make, words = BAD[kind]
    path = make(tmp_path / "x.parquet")
    start, before = time.process_time(), pyarrow.total_allocated_bytes()
    with pytest.raises(InputError, match=words) as caught:
        load_dataset(path)
    assert time.process_time() - start < 2
    assert pyarrow.total_allocated_bytes() - before < 1 << 28
    assert "x.parquet" in caught.value.what
    assert caught.value.hint


def test_files_of_other_columns_are_refused(tmp_path):
    written(tmp_path / "a.parquet", {"x": pyarrow.array(BYTES)})
    written(tmp_path / "b.parquet", {"y": pyarrow.array(BYTES)})
    with pytest.raises(InputError, match=r"b\.parquet has another column 'x'"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("form", ["snappy", "none", "arrow"])
def test_of_damaged_tables_nothing_else_comes_out_than_an_error_that_names_them(form, tmp_path):
    if form == "arrow":
        path = next(as_saved(tmp_path).glob("*.arrow"))
    else:
        path = tmp_path / "x.parquet"
        parquet.write_table(table(), path, compression=form, row_group_size=5)
    whole, refused = path.read_bytes(), set()
    for seed in range(150):
        path.write_bytes(damaged(whole, random.Random(seed)))
        start = time.process_time()
        try:
            data = load_dataset(str(path), in_memory=False)
            data.images[torch.arange(len(data))]
            data.fingerprint()
        except InputError as error:
            refused.add(path.name in error.what)
        assert time.process_time() - start < 2
    assert refused == {True}
