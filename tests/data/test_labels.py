"""Classes of images, as people write them: from tables, folders and the names of files."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch

from cmtool.data.datasets import load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError
from cmtool.evaluation.sets import open_set

PICTURE = png_bytes(torch.zeros(3, 4, 4, dtype=torch.uint8))
NAMES = ["0.png", "1.png", "2.png", "3.png"]


def zipped(root, more, names=NAMES):
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, PICTURE)
        for name, content in more.items():
            archive.writestr(name, content)
    return str(root / "x.zip")


def table(*labels):
    """A labels.csv of four images."""
    return "\n".join(f"{name},{label}" for name, label in zip(NAMES, labels, strict=True))


def json_of(*labels):
    """A dataset.json of four images; each label is written as it stands."""
    pairs = [f'["{name}", {label}]' for name, label in zip(NAMES, labels, strict=True)]
    return f'{{"labels": [{", ".join(pairs)}]}}'


READ = {
    "numbers": (table(3, 0, 1, 1), [3, 0, 1, 1]),
    "numbers and a header": ("name,class\n" + table(3, 0, 1, 1), [3, 0, 1, 1]),
    "numbers as spreadsheets write them": (table(" 3", "10.0", "+1", "02"), [3, 10, 1, 2]),
    "names": (table("dog", "cat", "dog", "cat"), [1, 0, 1, 0]),
    "names, the first alone, without a header": (table("dog", "cat", "cat", "cat"), [1, 0, 0, 0]),
    "names with spaces": (table("dog", " cat", "dog ", "cat"), [1, 0, 1, 0]),
    "names with a header": ("file,kind\n" + table("dog", "cat", "dog", "cat"), [1, 0, 1, 0]),
    "lines of spreadsheets": (table(3, 0, 1, 1).replace("\n", "\r\n") + "\n,\n", [3, 0, 1, 1]),
    "lines of old macOS": (table(3, 0, 1, 1).replace("\n", "\r"), [3, 0, 1, 1]),
    "paths of find": (table(3, 0, 1, 1).replace("\n", "\n./"), [3, 0, 1, 1]),
    "a line twice": (table(3, 0, 1, 1) + "\n0.png,3", [3, 0, 1, 1]),
}


@pytest.mark.parametrize("kind", READ)
def test_a_table_means_what_people_mean(tmp_path, kind):
    text, wanted = READ[kind]
    found = load_dataset(zipped(tmp_path, {"labels.csv": text}))
    assert found.labels.tolist() == wanted
    assert found.class_names == (("cat", "dog") if "names" in kind else ())
    assert not found.notes


@pytest.mark.parametrize("odd", ["--5", "\u00b2", "1e9", "9" * 5000, "1_0", "7"])
def test_a_note_says_where_what_looks_like_a_number_is_a_name(tmp_path, odd):
    found = load_dataset(zipped(tmp_path, {"labels.csv": table("cat", odd, "cat", "dog")}))
    assert found.labels.tolist()[1] == found.class_names.index(odd)
    place = found.class_names.index(odd)
    assert [f"{odd[:40]!r} is class {place}" in note for note in found.notes] == [True] * (
        odd != "1e9"
    )


def test_a_table_of_quoted_commas_has_names_with_commas(tmp_path):
    found = load_dataset(zipped(tmp_path, {"labels.csv": table('"a, b"', "c", '"a, b"', "c")}))
    assert (found.labels.tolist(), found.class_names) == ([0, 1, 0, 1], ("a, b", "c"))


def test_of_two_tables_the_one_that_does_not_count_is_told(tmp_path):
    more = {"dataset.json": json_of(0, 1, 0, 1), "labels.csv": table(1, 0, 1, 0)}
    found = load_dataset(zipped(tmp_path, more))
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert [f"{tmp_path}/x.zip is not read: dataset.json counts" in n for n in found.notes] == [
        True
    ]
    more["dataset.json"] = '{"labels": null}'
    assert load_dataset(zipped(tmp_path, more)).notes == found.notes


@pytest.mark.parametrize("name", ["cafe\u0301", "caf\u00e9"])
def test_accents_of_macos_are_those_of_others(tmp_path, name):
    """macOS writes an accent as a character of its own."""
    names = [f"{name}/0.png", "th\u00e9/1.png"]
    found = load_dataset(zipped(tmp_path, {}, names))
    assert found.class_names == ("caf\u00e9", "th\u00e9")
    more = {"labels.csv": "caf\u00e9/0.png,1\nthe\u0301/1.png,0"}
    assert load_dataset(zipped(tmp_path, more, names)).labels.tolist() == [1, 0]


REFUSED = {
    "one name, two classes": ("labels.csv", table(0, 1, 1, 1) + "\n0.png,1", "two classes"),
    "two in JSON": ("dataset.json", '{"labels": [["0.png", 0], ["0.png", 1]]}', "two classes"),
    "a name without one": ("labels.csv", table("cat", "dog", "", "dog"), "no class for '2.png'"),
    "an image is missing": ("labels.csv", table(0, 1, 1, 1)[:-8], "no class for '3.png'"),
    "a million": ("labels.csv", table(0, 0, 0, 1_000_000), "class 1000000 for '3.png'"),
    "negative": ("labels.csv", table(0, 0, 0, -1), "class -1 for '3.png'"),
    "UTF-16": ("labels.csv", table(0, 1, 1, 1).encode("utf-16"), "is not a table"),
    "other columns": ("labels.csv", "0.png;1", "other than two columns"),
    "5,000 digits": ("dataset.json", json_of(0, 0, 0, "1" * 5000), "is not {'labels'"),
    "4,000 digits": ("dataset.json", json_of(0, 0, 0, "1" * 4000), "gives the class 111"),
    "infinity": ("dataset.json", json_of(0, 0, 0, "1e400"), "gives the class inf"),
    "no number": ("dataset.json", json_of(0, 0, 0, "NaN"), "gives the class nan"),
    "text": ("dataset.json", json_of(0, 0, 0, '"--5"'), "gives the class '--5'"),
    "numbers and names": ("dataset.json", json_of(0, '"cat"', 0, 0), "gives the class 'cat'"),
    "nested": ("dataset.json", json_of(0, 0, 0, "[" * 9000), "is not {'labels'"),
    "no labels": ("dataset.json", "{}", "is not {'labels'"),
    "names and classes": ("dataset.json", '{"0.png": 0, "1.png": 1}', "is not {'labels'"),
    "a table": ("dataset.json", '{"labels": {"0.png": 0, "1.png": 1}}', "is not {'labels'"),
    "a vector of true": ("dataset.json", json_of(0, 0, 0, "[true, false]"), r"class \[True, False"),
    "three columns": ("labels.csv", ",name,class\n0,0.png,1\n", "other than two columns"),
    "Latin-1": ("labels.csv", table(0, 1, 1, "caf\xe9").encode("latin-1"), "is not a table"),
    "a quote without end": ("labels.csv", '0.png,"1\n' + table(0, 1, 1, 1), "no class for '1.png'"),
    "a long field": ("labels.csv", f'0.png,"{"x" * 140_000}"', "field larger than"),
    "half a vector": ("dataset.json", json_of(0, 0, 0, "[0.5, 0.5]"), r"class \[0.5, 0.5\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_class_is_refused_by_training_and_does_not_matter_to_eval(tmp_path, kind):
    name, content, words = REFUSED[kind]
    path = zipped(tmp_path, {name: content})
    with pytest.raises(InputError, match=words) as caught:
        load_dataset(path)
    assert caught.value.hint
    assert (len(open_set(path)), open_set(path).labels) == (4, None)


def test_a_vector_that_is_no_class_says_what_one_is(tmp_path):
    vectors = [[1.0, float(i)] for i in range(4)]
    path = zipped(tmp_path, {"dataset.json": json_of(*vectors)})
    with pytest.raises(InputError, match=r"gives the class \[1.0, 1.0\]") as caught:
        load_dataset(path)
    assert "one 1 among 0s" in caught.value.hint


@pytest.mark.parametrize("method", [1, 99])  # encrypted; packed in a way that nobody knows
def test_a_table_that_cannot_be_unpacked_is_named(tmp_path, method):
    path = zipped(tmp_path, {"dataset.json": json_of(0, 1, 0, 1)})
    content = bytearray((tmp_path / "x.zip").read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.rindex(signature) + at
        content[place : place + 4] = struct.pack("<HH", *((1, 0) if method == 1 else (0, 99)))
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.zip is damaged: .*(encrypted|not supported)"):
        load_dataset(path)
    assert len(open_set(path)) == 4


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 2, 10**9]),
        np.array([0, 1, 2, 2**63], np.uint64),
        np.array([0, 1, 2, -1]),
        np.array([0.0, 1, 2, 3]),
        np.array([0, 1, 2]),
        np.array(list("abcd")),
        np.zeros((4, 2), int),
    ],
    ids=lambda labels: f"{labels.dtype}-{labels.flat[-1]}",
)
def test_arrays_that_are_no_classes_are_refused_by_training_alone(tmp_path, labels):
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8), labels)
    with pytest.raises(InputError, match=r"arr_1 of .* is not a class per image"):
        load_dataset(str(tmp_path / "x.npz"))
    assert len(open_set(tmp_path / "x.npz")) == 4


def folder(root, names):
    for name in names:
        path = root / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)
    return str(root / "x")


def test_folders_that_are_numbers_say_which_class_they_are(tmp_path):
    found = load_dataset(folder(tmp_path, [f"{i}/a.png" for i in range(11)]))
    assert found.class_names[:3] == ("0", "1", "10")
    assert found.notes == ("class 2 is the folder '10': folders are sorted as text",)
    assert not load_dataset(folder(tmp_path / "b", [f"{i}/a.png" for i in range(10)])).notes
    assert not load_dataset(folder(tmp_path / "c", [f"c{i}/a.png" for i in range(11)])).notes


ODD_FOLDERS = {
    "loose": (["cat/a.png", "dog/b.png", "c.png", "d.png"], "2 of the images are in no folder"),
    "five digits": (["00001/a.png", "00002/b.png"], "as 00001, are not read as classes"),
    "hidden": (["cat/a.png", "dog/b.png", ".fox/c.png"], "1 other files are left out: 1 hidden"),
}


@pytest.mark.parametrize("kind", ODD_FOLDERS)
def test_a_note_says_what_odd_folders_are(tmp_path, kind):
    names, told = ODD_FOLDERS[kind]
    for path in (zipped(tmp_path, {}, names), folder(tmp_path, names)):
        assert [told in note for note in load_dataset(path).notes] == [True]


def test_folders_of_devices_of_windows_are_classes(tmp_path):
    found = load_dataset(folder(tmp_path, ["con/a.png", "nul/b.png", "aux./c.png", "Con/d.png"]))
    assert found.class_names == ("Con", "aux.", "con", "nul")
    assert not found.notes


@pytest.mark.parametrize("splits", [("Train", "Test"), ("training", "testing"), ("TRAIN", "val")])
def test_splits_in_any_letters_are_no_classes(tmp_path, splits):
    names = [f"{split}/{kind}/a.png" for split in splits for kind in ("cat", "dog")]
    path = folder(tmp_path, names)
    with pytest.raises(InputError, match=f"holds {', '.join(sorted(splits))}") as caught:
        load_dataset(path)
    assert caught.value.hint == f"give one of them: {path}/{splits[0]}"
    assert load_dataset(f"{path}/{splits[0]}").class_names == ("cat", "dog")


def test_of_hidden_images_alone_there_are_none(tmp_path):
    for path in (zipped(tmp_path, {}, [".x/a.png"]), folder(tmp_path, [".x/a.png"])):
        with pytest.raises(InputError, match="no images in") as caught:
            load_dataset(path)
        assert "not hidden" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["cat_0.png", "dog_0.png", "dog_1.png", "cat_1.png"], True),
        (["a/cat_0.png", "a/cat_1.png", "a/dog_0.png", "a/dog_1.png"], True),
        (["img_0.png", "img_1.png", "img_2.png"], False),
        (["2020_a.png", "2021_a.png", "2022_a.png"], False),
        (["cat_0.png", "cat_1.png", "dog_0.png", "dog_1.png", "other.png"], False),
    ],
)
def test_names_that_begin_with_a_class_are_told(tmp_path, names, told):
    for path in (zipped(tmp_path, {}, names), folder(tmp_path, names)):
        found = load_dataset(path)
        assert found.labels is None
        assert [("--labels prefix" in note) for note in found.notes] == [True] * told


def test_other_files_are_counted_by_their_endings(tmp_path):
    others = ["a.gif", "d.GIF", "b.avif", "c.npy", "README", ".hidden.gif", "__MACOSX/._a.gif"]
    more = dict.fromkeys([*others, "dataset.json"], json.dumps({"labels": None}))
    path = zipped(tmp_path, more)
    note = f"{path}: 5 other files are left out: 2 .gif, 1 .avif, 1 .npy, 1 without ending"
    assert load_dataset(path).notes == (note,)
    many = folder(tmp_path, [*NAMES, *(f"{i}.x{i}" for i in range(9))])
    (note,) = load_dataset(many).notes
    assert note.endswith("1 .x5, ...")
    assert not load_dataset(zipped(tmp_path, {"dataset.json": json_of(0, 1, 0, 1)})).notes


RULES_OF = {
    "prefix": (["cat_0.png", "a/cat_1.png", "a/dog_x_0.png"], [0, 0, 1], ("cat", "dog")),
    "folders": (["00001/a_0.png", "00002/b.png", "00002/c.png"], [0, 1, 1], ("00001", "00002")),
    "none": (["cat/a.png", "dog/b.png"], None, ()),
}


@pytest.mark.parametrize("rule", RULES_OF)
def test_classes_are_found_by_the_rule_that_is_named(tmp_path, rule):
    names, classes, known = RULES_OF[rule]
    for path in (zipped(tmp_path, {}, names), folder(tmp_path, names)):
        found = load_dataset(path, labels=rule)
        assert (len(found), found.class_names) == (len(names), known)
        if classes is None:
            assert (found.labels, found.num_classes) == (None, 0)
        else:
            named = dict(zip(names, classes, strict=True))
            assert found.labels.tolist() == [named[name] for name in sorted(names)]


@pytest.mark.parametrize("rule", ["folders", "prefix", "none"])
def test_a_table_does_not_matter_to_another_rule(tmp_path, rule):
    names = ["a/x_0.png", "a/x_1.png", "b/y_0.png", "b/y_1.png"]
    found = load_dataset(zipped(tmp_path, {"labels.csv": "no table"}, names), labels=rule)
    assert rule == "none" or found.labels.tolist() == [0, 0, 1, 1]


def test_prefixes_are_those_of_guided_diffusion(tmp_path):
    """Its rule: what stands before the first _ of a file's name, whatever folder it is in."""
    names = ["b/n02_7_1.png", "a/n01_3.png", "a/n02_4.png", "10_5.png", "9_6.png"]
    found = load_dataset(folder(tmp_path, names), labels="prefix")
    starts = [name.split("/")[-1].split("_")[0] for name in sorted(names)]
    classes = {start: place for place, start in enumerate(sorted(set(starts)))}
    assert found.labels.tolist() == [classes[start] for start in starts]
    assert found.class_names == ("10", "9", "n01", "n02")


def test_a_name_without_a_prefix_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'other\.png' in .* has no _") as caught:
        load_dataset(folder(tmp_path, ["cat_0.png", "other.png"]), labels="prefix")
    assert "--labels auto" in caught.value.hint


@pytest.mark.parametrize("rule", ["prefix", "none", "folders"])
def test_splits_are_refused_under_every_rule(tmp_path, rule):
    path = folder(
        tmp_path, [f"{split}/{kind}_0.png" for split in ("train", "val") for kind in "ab"]
    )
    with pytest.raises(InputError, match="holds train, val"):
        load_dataset(path, labels=rule)


@pytest.mark.parametrize("rule", ["prefx", "label", ""])
def test_a_rule_that_is_none_is_refused_with_the_nearest(tmp_path, rule):
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))
    for source in (
        folder(tmp_path, NAMES),
        zipped(tmp_path, {}),
        str(tmp_path / "x.npz"),
        "digits",
    ):
        with pytest.raises(
            InputError, match=f"data.labels = '{rule}'.* has no such column"
        ) as caught:
            load_dataset(source, labels=rule)
        assert "choose from auto, folders, none, prefix" in caught.value.hint


def test_images_without_names_have_their_own_classes_or_none(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))
    for source in (str(tmp_path / "x.npz"), "digits"):
        assert load_dataset(source, labels="none").labels is None
        assert load_dataset(source).labels is not None
        with pytest.raises(InputError, match="have no names of files") as caught:
            load_dataset(source, labels="prefix")
        assert f"cmtool data info {source} --labels auto" in caught.value.hint
