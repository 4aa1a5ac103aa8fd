"""Models of a hub: found, fetched once, checked, pinned, and told where they are not."""

import errno
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from cmtool.data.decoding import read_image
from cmtool.errors import InputError, MissingError, ResourceError, UserError
from cmtool.hub import NETWORKS, _chosen, fetched, parsed
from cmtool.models import ASSETS, load_model
from tests.cli.conftest import cmtool  # noqa: F401

STUDENT = (ASSETS / "digits-cd.safetensors").read_bytes()
NAME = "someone/digits"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a/b@v1.0", ("a/b", "v1.0", None)),
        ("hf:a/b@refs/pr/3", ("a/b", "refs/pr/3", None)),
        ("hf:a/b/x.pt", ("a/b", None, "x.pt")),
        ("hf:a/b@0123abc/unet/x.pt", ("a/b", "0123abc", "unet/x.pt")),
        ("hf:open-ai/cd_x.y@main", ("open-ai/cd_x.y", "main", None)),
    ],
)
def test_a_name_says_repository_revision_and_file(name, meant):
    assert parsed(name) == meant


@pytest.mark.parametrize("name", ["hf:", "hf:a", "hf:a/", "hf:/b", "hf:a/b@", "hf:a/b@x@y"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="names no model of a hub"):
        fetched(name)


def test_a_single_file_is_fetched_once_and_its_commit_is_on_record(hub):
    commit = hub.push(NAME, {"README.md": b"x", "digits.safetensors": STUDENT})
    model = load_model(f"hf:{NAME}")
    assert model.source == f"hf:{NAME}@{commit}/digits.safetensors"
    assert model.kind == "consistency"
    ours = load_model("digits-cd")
    assert all(
        torch.equal(a, b) for a, b in zip(model.f.parameters(), ours.f.parameters(), strict=True)
    )
    assert not any("README" in path for _, path, _ in hub.asked)  # what is not needed stays there
    gets = [path for how, path, _ in hub.asked if how == "GET" and "/resolve/" in path]
    assert len(gets) == 1
    load_model(f"hf:{NAME}")
    again = [path for how, path, _ in hub.asked if how == "GET" and "/resolve/" in path]
    assert again == gets
    assert load_model(model.source).sha256 == model.sha256


def test_a_revision_stays_and_a_branch_that_moved_is_told(hub):
    first = hub.push(NAME, {"a.safetensors": STUDENT})
    assert load_model(f"hf:{NAME}").notes == ()
    other = (ASSETS / "digits-edm.safetensors").read_bytes()
    second = hub.push(NAME, {"a.safetensors": other})
    moved = load_model(f"hf:{NAME}")
    assert moved.kind == "teacher"
    assert f"main moved from {first[:12]} to {second[:12]}" in moved.notes[0]
    assert load_model(f"hf:{NAME}@{first}").kind == "consistency"


def test_without_a_network_the_cache_is_used(hub, monkeypatch):
    commit = hub.push(NAME, {"a.safetensors": STUDENT})
    load_model(f"hf:{NAME}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.asked)
    assert commit in load_model(f"hf:{NAME}").source
    assert commit in load_model(f"hf:{NAME}@{commit}").source
    assert len(hub.asked) == asked
    with pytest.raises(MissingError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_model("hf:someone/else")


@pytest.mark.parametrize(("etag", "said"), [(None, "gave another"), ("7f", "came as another")])
def test_a_file_of_another_hash_is_refused_and_removed(hub, etag, said):
    hub.push(NAME, {"a.safetensors": STUDENT})
    hub.etag, hub.lies["a.safetensors"] = etag, STUDENT[:-1] + b"!"
    with pytest.raises(InputError, match=f"{said} file"):
        load_model(f"hf:{NAME}")
    hub.lies.clear()
    assert load_model(f"hf:{NAME}").kind == "consistency"


def test_what_the_hub_has_not_is_told(hub):
    hub.push(NAME, {"a.safetensors": STUDENT, "b.pt": b"1"})
    hub.status["someone/gated"] = 403
    hub.branches["someone/gated", "main"] = "0" * 40
    for name, said in {
        "hf:no/where": "there is no such model",
        f"hf:{NAME}@v9": "there is no such revision",
        "hf:someone/gated": "gated",
        f"hf:{NAME}/c.pt": "has no file c.pt",
        f"hf:{NAME}": "has 2 weight files",
    }.items():
        with pytest.raises(InputError, match=said):
            load_model(name)


def test_a_pickle_alone_is_read_safely(hub, tmp_path):
    harm = f"cos\nmkdir\n(S'{tmp_path}/harm'\ntR.".encode()
    pickle.loads(harm)
    (tmp_path / "harm").rmdir()  # so it does what it says where it is unpickled
    hub.push(NAME, {"model.pkl": harm})
    with pytest.raises(InputError):
        load_model(f"hf:{NAME}")
    assert not (tmp_path / "harm").exists()


def test_a_hub_that_answers_with_a_page_is_no_hub(hub):
    hub.push(NAME, {"a.safetensors": STUDENT})
    hub.kind = "text/html"
    with pytest.raises(InputError, match="is no hub"):
        load_model(f"hf:{NAME}")


@pytest.mark.parametrize("file", ["../../x.safetensors", "/etc/x.safetensors", "a\\..\\x.pt"])
def test_names_that_lead_elsewhere_are_refused(file):
    with pytest.raises(InputError, match="has a file with the name"):
        _chosen("hf:a/b", parsed("hf:a/b"), [file])


@pytest.mark.parametrize("best", range(len(NETWORKS)))
def test_the_best_of_several_weights_is_taken(best):
    files = ["unet/config.json", "model_index.json", *(f"unet/{n}" for n in NETWORKS[best:])]
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    chosen = _chosen("hf:a/b", parsed("hf:a/b"), [*files, *shards, "vae/config.json"])
    is_index = NETWORKS[best].endswith(".json")
    assert chosen == [
        "model_index.json", "unet/config.json", f"unet/{NETWORKS[best]}", *shards * is_index
    ]  # fmt: skip


def test_the_old_norm_of_imagenet_is_told(hub):
    hub.push("openai/cd_imagenet64", {"x.pt": STUDENT})
    assert not fetched("hf:openai/cd_imagenet64").notes
    hub.push("openai/cd_imagenet64", {"config.json": b"{}", "diffusion_pytorch_model.bin": b"1"})
    assert any("older than a fix" in note for note in fetched("hf:openai/cd_imagenet64").notes)


def test_two_at_once_fetch_once(hub):
    hub.push(NAME, {"a.safetensors": STUDENT})
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetched(f"hf:{NAME}").path, range(2)))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == STUDENT


def test_commands_take_models_of_the_hub_and_say_which_commit(hub, cmtool, tmp_path, monkeypatch):  # noqa: F811
    student = hub.push(NAME, {"digits.safetensors": STUDENT})
    teacher = hub.push(
        "someone/edm", {"t.safetensors": (ASSETS / "digits-edm.safetensors").read_bytes()}
    )
    drawn = cmtool("sample", "-c", f"hf:{NAME}", "--seeds", "0-3", "--out", "hub.png")
    assert drawn.code == 0, drawn.err
    assert cmtool("sample", "-c", "digits-cd", "--seeds", "0-3", "--out", "ours.png").code == 0
    assert torch.equal(read_image(tmp_path / "hub.png"), read_image(tmp_path / "ours.png"))
    with Image.open(tmp_path / "hub.png") as theirs, Image.open(tmp_path / "ours.png") as ours:
        source = f"hf:{NAME}@{student}/digits.safetensors"
        assert theirs.text == {**ours.text, "cmtool:source": source}
    told = cmtool("sample", "-c", f"hf:{NAME}", "--seeds", "0", "--out", "a", "--json")
    assert json.loads(told.text)["source"] == source
    measured = cmtool("eval", "fid", "-c", f"hf:{NAME}", "--num", "20")
    assert measured.code == 0, measured.err
    assert f"hf:{NAME}@{student}" in measured.text
    more = ["--set", "train.steps=1", "--set", "train.batch=4", "--device", "cpu", "--out", "run"]
    taught = cmtool("distill", "--teacher", "hf:someone/edm", "--preset", "digits-cd", *more)
    assert taught.code == 0, taught.err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["teacher"]["source"] == f"hf:someone/edm@{teacher}/t.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.asked)
    assert cmtool("sample", "-c", f"hf:{NAME}", "--seeds", "0", "--out", "a.png").code == 0
    assert len(hub.asked) == asked


def test_weights_that_were_cut_are_told_never_used_and_gone_on_with(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("cmtool.system.download.time.sleep", lambda _: None)
    hub.push(NAME, {"digits.safetensors": STUDENT})
    hub.left = here = len(STUDENT) // 2
    with pytest.raises(ResourceError, match="could not be fetched"):
        load_model(f"hf:{NAME}")
    assert not list((tmp_path / "hub").rglob("snapshots/*/*.safetensors"))
    hub.left = None
    assert load_model(f"hf:{NAME}").sha256 == load_model("digits-cd").sha256
    ranges = [asked for how, path, asked in hub.asked if how == "GET" and "/resolve/" in path]
    assert ranges == [None, *[f"bytes={here}-"] * (len(ranges) - 1)]
    assert hub.sent == len(STUDENT)


def test_a_small_file_that_was_cut_is_told_and_never_used(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.push(NAME, {"config.json": b" " * 999, "diffusion_pytorch_model.safetensors": STUDENT})
    hub.left = 500
    with pytest.raises(ResourceError, match="no whole answer"):
        load_model(f"hf:{NAME}")
    assert not list((tmp_path / "hub").rglob("snapshots/*/config.json"))


def test_the_token_is_sent_with_weights_and_small_files(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.push(NAME, {"config.json": b"{}", "diffusion_pytorch_model.safetensors": STUDENT})
    with pytest.raises(InputError):  # of the configuration: both files are there
        load_model(f"hf:{NAME}")
    assert {how for how, _, _ in hub.asked} == {"GET", "HEAD"}
    assert set(hub.tokens) == {"Bearer hf_secret"}


def test_a_hub_that_is_not_there_is_told(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError) as error:
        load_model(f"hf:{NAME}")
    assert "HF_ENDPOINT" in error.value.hint


def test_no_room_on_the_disk_is_told_and_nothing_half_is_used(hub, monkeypatch):
    hub.push(NAME, {"digits.safetensors": STUDENT})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", full)
        with pytest.raises(ResourceError, match="no room on the disk"):
            load_model(f"hf:{NAME}")
    assert load_model(f"hf:{NAME}").kind == "consistency"
