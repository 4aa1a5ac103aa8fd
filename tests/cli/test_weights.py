"""Published weights by name: listed, fetched when asked for, checked, and never without consent."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cmtool import weights
from cmtool.weights import PUBLISHED
from tests.site import CONTENT, SHA256


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path, site):
    """A cache of the test's own, and a mirror."""
    for name, value in {
        "CMTOOL_CACHE": tmp_path / "cache",
        "TORCH_HOME": tmp_path / "torch",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CMTOOL_MIRROR", site.url.rpartition("/")[0])
    for name in ("CMTOOL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def publish(monkeypatch, name, sha256):
    monkeypatch.setitem(PUBLISHED, name, PUBLISHED[name]._replace(sha256=sha256))


def test_all_addresses_are_of_their_publishers_and_names_are_told_apart():
    hosts = {wanted.url.split("/")[2] for wanted in PUBLISHED.values()}
    assert hosts == {
        "openaipublic.blob.core.windows.net", "nvlabs-fi-cdn.nvidia.com", "download.pytorch.org",
        "dl.fbaipublicfiles.com", "openaipublic.azureedge.net",
    }  # fmt: skip
    assert all(wanted.url.startswith("https://") for wanted in PUBLISHED.values())
    assert {w.url.split("/")[2] for w in PUBLISHED.values() if w.wants_consent} == {
        "nvlabs-fi-cdn.nvidia.com"
    }
    assert len({w.url for w in PUBLISHED.values()}) == len(PUBLISHED) >= 30
    assert PUBLISHED["lpips-squeeze"].sha256 == "b8a52dc0"


def test_files_of_one_name_do_not_share_a_place():
    assert len({wanted.path for wanted in PUBLISHED.values()}) == len(PUBLISHED)


def test_get_fetches_once_and_prints_the_path(cmtool, site, monkeypatch, tmp_path):
    publish(monkeypatch, "cd_imagenet64_l2", SHA256)
    got = cmtool("weights", "get", "cd_imagenet64_l2")
    assert got.code == 0, got.err
    assert got.text == f"{tmp_path}/cache/weights/cd_imagenet64_l2.pt\n"
    assert (tmp_path / "cache/weights/cd_imagenet64_l2.pt").read_bytes() == CONTENT
    assert cmtool("weights", "get", "cd_imagenet64_l2").code == 0
    assert len(site.ranges) == 1
    assert cmtool("weights", "path", "cd_imagenet64_l2").text == got.text
    assert cmtool("weights", "verify").text == "cd_imagenet64_l2\tthere\n"
    listed = json.loads(cmtool("weights", "list", "--json").text)["weights"]
    assert listed["cd_imagenet64_l2"]["state"] == "there"
    assert listed["inception"]["state"] == "missing"


def test_terms_are_told_and_asked_for(cmtool, site, monkeypatch):
    publish(monkeypatch, "inception", SHA256)
    refused = cmtool("weights", "get", "inception")
    assert refused.code == 2
    assert "no commercial use" in refused.err
    assert "hint: if you agree: cmtool weights get inception --accept-terms" in refused.err
    assert not site.ranges
    assert cmtool("weights", "get", "inception", "--accept-terms").code == 0


def test_a_hash_that_nobody_states_is_kept_and_holds_from_then_on(cmtool, site, tmp_path):
    first = cmtool("weights", "get", "ct_cat256")
    assert SHA256 in first.err
    path = tmp_path / "cache/weights/ct_cat256.pt"
    path.write_bytes(b"another")
    bad = cmtool("weights", "verify", "ct_cat256")
    assert (bad.code, bad.text) == (3, "ct_cat256\tchanged\n")
    site.content, site.tag = CONTENT[::-1], '"two"'
    again = cmtool("weights", "get", "ct_cat256")
    assert again.code == 3
    assert "gave another file" in again.err
    site.content, site.tag = CONTENT, '"one"'
    assert cmtool("weights", "get", "ct_cat256").code == 0
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("variable", ["CMTOOL_OFFLINE", "HF_HUB_OFFLINE"])
def test_without_a_network_the_command_for_another_machine_is_told(
    cmtool, site, monkeypatch, variable
):  # fmt: skip
    monkeypatch.setenv(variable, "1")
    result = cmtool("weights", "get", "inception", "--accept-terms")
    assert result.code == 4
    assert variable in result.err
    assert f"curl -Lo inception-2015-12-05.pt {PUBLISHED['inception'].url}" in result.err
    assert not site.ranges


def test_a_name_is_a_model_where_its_file_is_there(cmtool):
    missing = cmtool("sample", "-c", "edm-ffhq-64x64-uncond-vp", "--seeds", "0", "--out", "x.png")
    assert missing.code == 4
    assert "cmtool weights get edm-ffhq-64x64-uncond-vp --accept-terms" in missing.err
    assert cmtool("weights", "get", "edm-ffhq-64x64-uncond-vp", "--accept-terms").code == 0
    found = cmtool("checkpoint", "info", "edm-ffhq-64x64-uncond-vp")
    assert found.code == 3  # the server's file is no model, and it was looked at
    assert "edm-ffhq-64x64-uncond-vp.pkl" in found.err


def test_unknown_names_are_refused_before_anything_is_fetched(cmtool, site):
    result = cmtool("weights", "get", "ct_cat256", "inceptoin")
    assert result.code == 2
    assert "did you mean 'inception'" in result.err
    assert not site.ranges


def test_a_diffusers_pipeline_is_its_network_and_scheduler_alone(hub, tmp_path, cmtool):
    assert cmtool("checkpoint", "convert", "digits-cd", "pipeline").code == 0
    folder = tmp_path / "pipeline"
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    commit = hub.push(
        "someone/digits", {**files, "safety/pytorch_model.bin": b"0" * 9, "sample.png": b"1"}
    )
    drawn = cmtool(
        "sample",
        "-c",
        "hf:someone/digits",
        "--preset",
        "digits-cd",
        "--seeds",
        "0-1",
        "--out",
        "a.png",
    )
    assert drawn.code == 0, drawn.err
    assert not any(word in path for _, path, _ in hub.asked for word in ("safety", "sample.png"))
    assert commit in cmtool("checkpoint", "info", "hf:someone/digits", "--json").text


GET = "import sys; from cmtool.cli import main; main(['weights', 'get', 'ct_cat256'])"


@pytest.mark.slow
def test_killed_five_times_and_run_again_no_byte_is_fetched_twice(site, tmp_path):
    site.content = CONTENT * 8
    site.pause = 0.02
    path = tmp_path / "cache/weights/ct_cat256.pt"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", GET])
        before = path.with_name(f"{path.name}.part")
        size = before.stat().st_size if before.exists() else 0
        while not before.exists() or before.stat().st_size < size + 300_000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not path.exists()
    assert subprocess.run([sys.executable, "-c", GET], check=False).returncode == 0
    assert path.read_bytes() == site.content
    starts = [int(each.removeprefix("bytes=").rstrip("-")) for each in site.ranges[1:]]
    assert len(starts) == 5
    assert starts == sorted(starts)
    assert weights.PUBLISHED["ct_cat256"].path == path
