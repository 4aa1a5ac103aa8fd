"""Tar archives of images, and the same images in every form."""

import pickle
import random
import tarfile
import time

import pytest
import torch

from cmtool.data import datasets as data_module
from cmtool.data import entries as entries_module
from cmtool.data.batches import batches
from cmtool.data.datasets import load_dataset
from cmtool.data.headers import headers
from cmtool.errors import InputError
from tests.data.forms import (
    FILES,
    FORMS,
    KINDS,
    LABELS,
    NAMES,
    PICTURES,
    N,
    as_folder,
    as_shards,
    as_tar,
    as_zip,
    member,
)
from tests.data.pictures import damaged

ALL = torch.arange(N)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images_and_classes_and_is_the_same_data(form, tmp_path):
    path = str(FORMS[form](tmp_path))
    (tmp_path / "wanted").mkdir()
    wanted = str(as_folder(tmp_path / "wanted"))
    for is_in_memory in (True, False):
        found, folder = (load_dataset(p, in_memory=is_in_memory) for p in (path, wanted))
        assert torch.equal(found.images[ALL], PICTURES)
        assert (found.labels.tolist(), found.class_names) == (LABELS, KINDS)
        assert found.fingerprint() == folder.fingerprint()
        assert not found.notes


def streamed_mark(path):
    return load_dataset(str(path), in_memory=False).fingerprint()


def test_the_fingerprint_of_streamed_images_is_of_sizes_contents_order_and_classes(tmp_path):
    first, (name, content) = streamed_mark(as_zip(tmp_path)), next(iter(FILES.items()))
    flipped = content[:50] + bytes([content[50] ^ 1]) + content[51:]
    last = NAMES[-1]
    others = {
        "longer": FILES | {name: content + b"x"},
        "another": FILES | {name: flipped},
        "swapped": FILES | {name: FILES[last], last: content},
        "of other classes": {n.replace("fox/006", "cat/006"): c for n, c in FILES.items()},
        "fewer": {n: c for n, c in FILES.items() if n != last},
    }
    others["of other classes"] = {n.replace("cat", "dog"): c for n, c in FILES.items()}
    assert len({first, *(streamed_mark(as_zip(tmp_path, files)) for files in others.values())}) == 6
    renamed = {n.replace("cat", "ant").replace("/", "/a"): c for n, c in FILES.items()}
    assert streamed_mark(as_zip(tmp_path, renamed)) == first
    load = {"labels": "none", "in_memory": False}
    assert load_dataset(str(as_zip(tmp_path)), **load).fingerprint() != first


def test_a_file_that_is_not_hashed_counts_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(entries_module, "HASHED", 4)  # of 12: the first, fourth, seventh and tenth
    first, name = streamed_mark(as_zip(tmp_path)), NAMES[1]
    assert streamed_mark(as_zip(tmp_path, FILES | {name: FILES[name] + b"x"})) != first


def test_an_image_that_cannot_be_read_has_a_fingerprint_too(tmp_path):
    folder = as_folder(tmp_path)
    (folder / NAMES[3]).unlink()
    (folder / NAMES[3]).symlink_to("gone.png")
    assert len(streamed_mark(folder)) == 16


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["shards", "parquet", "saved"])
def test_streams_of_every_form_are_the_batches_of_the_folder(
    form, workers, shards, tmp_path, monkeypatch
):
    """In any number of processes and parts, from any step."""
    plan = {"batch": 4, "shards": shards, "seed": 1, "device": "cpu", "flip": True}
    wanted = batches(load_dataset(str(as_folder(tmp_path))), **plan)
    monkeypatch.setattr(data_module, "MAX_IN_MEMORY", 0)
    data = load_dataset(str(FORMS[form](tmp_path)))
    ranks = [
        batches(data, **plan, workers=workers, rank=rank, world_size=shards)
        for rank in range(shards)
    ]
    for step in [0, 1, 2, 7, 8]:  # a run that resumes jumps
        for rank, ahead in enumerate(ranks):
            for ours, theirs in zip(ahead(step, rank), wanted(step, rank), strict=True):
                assert torch.equal(ours, theirs)


LONG = "folder/" * 20 + "picture.png"
LONGER = "b/" * 60 + "y" * 150 + ".png"
ODD_NAMES = ["a.png", "é/ü.png", LONG, "x" * 120 + ".png", LONGER, "./c.png"]


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_those_that_tarfile_reads(how, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=how, pax_headers={"comment": "of all"}) as t:
        for size, name in enumerate(ODD_NAMES):
            if how != tarfile.USTAR_FORMAT or max(map(len, name.split("/"))) <= 100:
                member(t, name, b"x" * 300 * size, mtime=1.5 if how == tarfile.PAX_FORMAT else 1)
        member(t, "folder", type=tarfile.DIRTYPE)
        member(
            t,
            "link",
            type=tarfile.SYMTYPE,
            linkname="z" * (100 if how == tarfile.USTAR_FORMAT else 200),
        )
        member(t, "hard", type=tarfile.LNKTYPE, linkname="a.png")
        claiming = tarfile.TarInfo("hard too")
        claiming.type, claiming.linkname, claiming.size = tarfile.LNKTYPE, "a.png", 5000
        t.addfile(claiming)  # no content follows
        member(t, "device", type=tarfile.CHRTYPE)
        member(t, "pipe", type=tarfile.FIFOTYPE)
    content = (tmp_path / "x.tar").read_bytes()
    with (tmp_path / "x.tar").open("rb") as file:
        found = list(headers(file, len(content)))
    with tarfile.open(tmp_path / "x.tar") as t:
        theirs = t.getmembers()
    assert [h.name.rstrip("/") for h in found] == [m.name for m in theirs]
    sizes = [0 if m.islnk() else m.size for m in theirs]
    assert [(h.start, h.size) for h in found] == [
        (m.offset_data, size) for m, size in zip(theirs, sizes, strict=True)
    ]
    kinds = ["folder", "a link", "a link", "a link", "a device", "a pipe"]
    assert [h.kind for h in found] == ["file"] * (len(theirs) - 6) + kinds


def samples(path, beside, files=FILES):
    """A tar of images in no folders, each with other files beside it."""
    with tarfile.open(path, "w") as archive:
        for i, content in enumerate(files.values()):
            member(archive, f"{i:03d}.png", content)
            for ending, text in beside(i).items():
                member(archive, f"{i:03d}.{ending}", text.encode())
    return str(path)


WITH_CLASSES = {
    "cls": lambda i: {"cls": f"{LABELS[i]}\n", "json": '{"label": 7}'},
    "cls of names": lambda i: {"cls": KINDS[LABELS[i]]},
    "json": lambda i: {"json": f'{{"width": 8, "label": {LABELS[i]}}}'},
    "json of names": lambda i: {"json": f'{{"cls": "{KINDS[LABELS[i]]}"}}'},
    "float": lambda i: {"json": f'{{"class": {LABELS[i]}.0}}'},
}


@pytest.mark.parametrize("kind", WITH_CLASSES)
def test_classes_are_beside_the_images(kind, tmp_path):
    found = load_dataset(samples(tmp_path / "x.tar", WITH_CLASSES[kind]))
    assert torch.equal(found.images, PICTURES)
    assert found.labels.tolist() == LABELS
    assert found.class_names == (KINDS if "names" in kind else ())
    assert load_dataset(str(tmp_path / "x.tar"), labels="none").labels is None


def test_classes_by_a_key_of_the_json_files(tmp_path):
    path = samples(tmp_path / "x.tar", lambda i: {"cls": "0", "json": f'{{"kind": "{i % 2}0"}}'})
    assert load_dataset(path, labels="kind").labels.tolist() == [0, 10] * 6
    with pytest.raises(InputError, match="has no such column") as caught:
        load_dataset(path, labels="prefx")
    assert "did you mean 'prefix'" in caught.value.hint


def test_views_of_one_sample_share_its_class(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.left.png", "a.right.png", "b.left.png", "b.png"):
            member(archive, name, FILES[NAMES[0]])
        for name, text in (("a.cls", b"1"), ("b.cls", b"2")):
            member(archive, name, text)
    assert load_dataset(str(tmp_path / "x.tar")).labels.tolist() == [1, 1, 2, 2]


BAD_CLASSES = {
    "one without": (lambda i: {"cls": "1"} if i != 3 else {}, "'003.png' in .* has no .cls"),
    "one json without": (
        lambda i: {"json": '{"label": 1}' if i else "{}"},
        "'000.png' in .* no .j",
    ),
    "negative": (lambda i: {"cls": str(-i)}, "gives the class '-1' for '001.png'"),
    "empty": (lambda i: {"cls": "1" * (i != 2)}, "gives the class '' for '002.png'"),
    "numbers and names": (lambda i: {"json": '{"label": "a"}' if i else '{"label": 1}'}, "class 1"),
    "half": (lambda i: {"json": '{"label": 0.5}'}, "gives the class 0.5"),
    "a flag": (lambda i: {"json": '{"label": true}'}, "gives the class True"),
    "long": (lambda i: {"cls": "1" * 5000}, "'000.cls' has 5,000 bytes"),
}


@pytest.mark.parametrize("kind", BAD_CLASSES)
def test_what_is_no_class_is_named_and_does_not_matter_without_classes(kind, tmp_path):
    beside, words = BAD_CLASSES[kind]
    path = samples(tmp_path / "x.tar", beside)
    with pytest.raises(InputError, match=words) as caught:
        load_dataset(path)
    assert caught.value.hint
    assert len(load_dataset(path, labels="none")) == N


def test_a_table_in_the_archive_or_beside_the_shards_counts(tmp_path):
    rows = "\n".join(f"{i:03d}.png,{LABELS[i]}" for i in range(N)).encode()
    plain = {f"{i:03d}.png": content for i, content in enumerate(FILES.values())}
    assert (
        load_dataset(str(as_tar(tmp_path, plain | {"labels.csv": rows}))).labels.tolist() == LABELS
    )
    folder = as_shards(tmp_path, plain)
    assert load_dataset(str(folder)).labels is None
    (folder / "labels.csv").write_bytes(rows)
    assert load_dataset(str(folder)).labels.tolist() == LABELS


def test_other_members_are_counted_and_none_is_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    more = {"pyd": "x", "npy": "x", "txt": "a cat", "pickle": pickle.dumps(Harm(), 0).decode()}
    path = samples(tmp_path / "x.tar", lambda i: {"cls": "0", **more})
    (note,) = load_dataset(path).notes
    assert note.endswith("48 other files are left out: 12 .npy, 12 .pickle, 12 .pyd, 12 .txt")
    assert not (tmp_path / "canary").exists()


def test_names_in_several_shards_get_those_of_their_shards_and_no_classes_of_them(tmp_path):
    plain = {"0.png": FILES[NAMES[0]], "1.png": FILES[NAMES[1]]}
    for number in range(2):
        as_tar(tmp_path, plain, f"s/{number}.tar")
    found = load_dataset(str(tmp_path / "s"), in_memory=False)
    names = found.images.entries.names
    assert [names[i] for i in range(4)] == ["0/0.png", "0/1.png", "1/0.png", "1/1.png"]
    assert found.labels is None


def hostile(path, *members, tail=b""):
    with tarfile.open(path, "w") as archive:
        member(archive, "0.png", FILES[NAMES[0]])
        for name, facts in members:
            member(archive, name, **facts)
    if tail:
        path.write_bytes(path.read_bytes()[: 2 * 512] + tail)
    return str(path)


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


REFUSED = {
    "sparse": (lambda p: hostile(p, tail=header("1.png", 0, b"S") + bytes(1024)), "sparse"),
    "a terabyte": (lambda p: hostile(p, tail=header("1.png", 1 << 40) + bytes(1024)), "cut short"),
    "a name of 9 GB": (lambda p: hostile(p, tail=header("x", 9 << 30, b"L")), "cut short"),
    "a table of 2 MB": (lambda p: hostile(p, tail=header("x", 2 << 20, b"x") + bytes(3 << 20)),
                        "a header of 2,097,152 bytes"),
    "a negative size": (lambda p: hostile(p, tail=negative()), "is no number|no header"),
    "no header": (lambda p: hostile(p, tail=b"junk" * 256), "no number|no header"),
    "another letter": (lambda p: renamed(p), "no header of a file at byte 1,024"),
    "a link": (lambda p: hostile(p, ("1.png", {"type": tarfile.SYMTYPE, "linkname": "/etc"})),
               "'1.png' in .* is a link"),
    "a hard link": (lambda p: hostile(p, ("1.png", {"type": tarfile.LNKTYPE, "linkname": "0.png"})),
                    "'1.png' in .* is a link"),
    "a device": (lambda p: hostile(p, ("1.png", {"type": tarfile.CHRTYPE})), "is a device"),
    "a pipe": (lambda p: hostile(p, ("1.png", {"type": tarfile.FIFOTYPE})), "is a pipe"),
    "a name twice": (lambda p: hostile(p, ("0.png", {})), "holds '0.png' twice"),
    "an image too large": (lambda p: large(p), "'1.png' in .* has 68,157,440 bytes"),
}  # fmt: skip


def renamed(path):
    """An archive whose second header was changed without its checksum."""
    hostile(path, ("1.png", {}))
    path.write_bytes(path.read_bytes().replace(b"1.png", b"2.png"))
    return str(path)


def negative():
    block = bytearray(header("1.png", 0))
    block[124:136] = b"-0000000512\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block) + bytes(1024)


def large(path):
    """An image of 65 MiB, nearly all of which is a hole of the file."""
    hostile(path, tail=header("1.png", 65 << 20))
    with path.open("r+b") as file:
        file.truncate(1536 + (65 << 20) + 1024)
    return str(path)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_archive_is_refused_by_name_at_once(kind, tmp_path):
    make, words = REFUSED[kind]
    path = make(tmp_path / "x.tar")
    start = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        load_dataset(path)
    assert time.process_time() - start < 0.5
    assert "x.tar" in caught.value.what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar"]


def test_names_that_climb_out_are_only_names(tmp_path):
    files = {
        f"{start}{i}.png": FILES[NAMES[i]] for i, start in enumerate(["../", "/abs/", "a/../../"])
    }
    found = load_dataset(str(as_tar(tmp_path, files)), labels="none", in_memory=False)
    assert len(found.images[torch.arange(3)]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("kept", [0, 511, 512 * 3 + 10])
def test_an_archive_that_is_cut_short_is_refused(kept, tmp_path):
    path = as_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError):
        load_dataset(str(path))


def test_an_archive_without_an_end_is_told(tmp_path):
    path = as_tar(tmp_path)
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3]
    path.write_bytes(path.read_bytes()[: third.offset])
    assert [("it may be cut short" in note) for note in load_dataset(str(path)).notes] == [True]


def test_an_archive_that_changes_later_is_named(tmp_path):
    path = as_tar(tmp_path)
    data = load_dataset(str(path), in_memory=False)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"x\.tar became shorter"):
        data.images[ALL]
    path.unlink()
    with pytest.raises(InputError, match=r"x\.tar cannot be read: No such file"):
        data.images[ALL]


def test_of_damaged_archives_nothing_else_comes_out_than_an_error_that_names_them(tmp_path):
    whole, refused = as_tar(tmp_path).read_bytes(), set()
    for seed in range(300):
        path = tmp_path / "y.tar"
        path.write_bytes(damaged(whole, random.Random(seed)))
        start = time.process_time()
        try:
            data = load_dataset(str(path), in_memory=False)
            data.images[torch.arange(len(data))]
        except InputError as error:
            refused.add("y.tar" in error.what)
        assert time.process_time() - start < 1
    assert refused == {True}


@pytest.mark.parametrize("name", ["pipe:touch canary", "s-{000..009}.tar", "*.tar"])
def test_a_word_that_others_run_or_fill_in_is_only_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no data set or folder") as caught:
        load_dataset(name)
    assert "wildcards and pipe: commands are not supported" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("train-0.tar", "val-0.tar"), ("a/Train/0.tar", "a/test/0.tar")])
def test_splits_are_refused_and_chosen_as_the_hint_says(names, tmp_path):
    for count, name in enumerate(names, 2):
        as_tar(tmp_path, dict(list(FILES.items())[:count]), f"s/{name}")
    with pytest.raises(InputError, match=r"holds (t|T)") as caught:
        load_dataset(str(tmp_path / "s"))
    chosen = caught.value.hint.removeprefix("give one of them: ")
    assert len(load_dataset(chosen)) == 2
    with pytest.raises(InputError, match="has no split 'dev'") as caught:
        load_dataset(f"{tmp_path / 's'}:dev")
    assert chosen in caught.value.hint


def test_a_split_of_a_folder_is_its_folder(tmp_path):
    folder = as_folder(tmp_path)
    assert len(load_dataset(f"{folder}:cat")) == 4
