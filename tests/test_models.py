"""A path becomes a model: what is hashed on the way, and which checkpoint is taken."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from cmtool.cli._options import newest_run
from cmtool.errors import InputError
from cmtool.formats import diffusers_dir
from cmtool.formats.checkpoints import newest_checkpoint
from cmtool.models import ASSETS, find_model, load_model
from cmtool.presets.toml import load_preset
from cmtool.training.checkpoint import load_checkpoint
from cmtool.training.state import build_state
from tests.golden import golden
from tests.training.test_checkpoint import save_checkpoint

ABOUT = {"kind": "consistency", "preset": load_preset("digits-ct").model_dump(mode="json")}


@pytest.fixture
def hashed(monkeypatch):
    """The paths that are hashed, in order."""
    paths, digest = [], hashlib.file_digest

    def counted(opened, name):
        paths.append(os.path.realpath(opened.name))
        return digest(opened, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return paths


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A finished run of three checkpoints."""
    run = tmp_path_factory.mktemp("run") / "runs" / "mine"
    state = build_state(load_preset("digits-ct"), None, "cpu")
    for step in (1, 2, 3):
        state.step = step
        save_checkpoint(run / "checkpoints", state, ABOUT)
    (run / "status.json").write_text('{"state": "done"}')
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "runs" / "mine")


def step(run, number):
    return run / "checkpoints" / f"step-{number:07d}"


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("weights", ["ema", "model", "target"])
def test_of_a_run_one_file_is_hashed_once(run, hashed, weights):
    file = step(run, 3) / f"{weights}.safetensors"
    for path in (run, step(run, 3), file):
        hashed.clear()
        model = load_model(path, weights=weights)
        assert hashed == [str(file)]
        assert model.sha256 == sha256(file)
        assert model.held == ("ema", "model", "target")


def test_a_bundled_model_is_hashed_once(hashed):
    file = ASSETS / "digits-cd.safetensors"
    assert load_model("digits-cd").sha256 == sha256(file)
    assert hashed == [str(file)]


def test_files_from_elsewhere_are_hashed_once(hashed, tmp_path):
    for name in ("diffusers_cm", "openai_unet_cond.pt", "edm_ddpmpp.pkl", "jcm_checkpoint_80"):
        path = golden(name, tmp_path)
        hashed.clear()
        load_model(path, kind="teacher")
        files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        assert sorted(hashed) == sorted(set(hashed))
        assert set(hashed) <= {os.path.realpath(f) for f in files}
        assert hashed


def test_of_two_files_in_a_pipeline_the_one_that_is_read_is_hashed(hashed, tmp_path):
    path = golden("diffusers_cm", tmp_path)
    alone = load_model(path).sha256
    (path / "unet" / diffusers_dir.WEIGHTS[1]).write_bytes(b"not read")
    hashed.clear()
    assert load_model(path).sha256 == alone
    assert len(hashed) == 4


@pytest.mark.parametrize("harm", ["flip", "cut", "other file cut", "no manifest", "no model"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(run, harm):
    newest = step(run, 3)
    match harm:
        case "flip":
            flip(newest / "ema.safetensors")
        case "cut":
            os.truncate(newest / "ema.safetensors", 100)
        case "other file cut":
            os.truncate(newest / "optimizer.safetensors", 100)
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "no model":
            (newest / "model.safetensors").unlink()
    model = load_model(run)
    assert model.sha256 == sha256(step(run, 2) / "ema.safetensors")
    assert "passed over" in model.notes[0]
    assert "step-0000003" in model.notes[0]
    with pytest.raises(InputError):
        load_model(newest)


def test_damage_in_a_file_that_is_not_read_costs_nothing(run, hashed):
    flip(step(run, 3) / "optimizer.safetensors")
    assert load_model(run).notes == ()
    assert hashed == [str(step(run, 3) / "ema.safetensors")]


def test_weights_that_the_newest_checkpoint_lacks_are_not_taken_from_an_older_one(run):
    with pytest.raises(InputError, match="holds no weights 'ema-x'") as caught:
        load_model(run, weights="ema-x")
    assert caught.value.hint == "it holds ema, model, target"


def test_a_run_without_a_whole_checkpoint_is_no_model(run):
    for number in (1, 2, 3):
        flip(step(run, number) / "ema.safetensors")
    with pytest.raises(InputError, match="no checkpoint in"):
        load_model(run)


def test_searched_levels_lie_beside_the_weights(run, tmp_path):
    assert load_model("digits-cd").levels_file is None
    model = load_model(run)
    assert model.levels_file == step(run, 3) / "ema.safetensors.levels.json"
    model.levels_file.write_text(json.dumps({"model": model.sha256, "levels": {"2": [80.0, 1.0]}}))
    assert load_model(run).preset.sample.levels["2"] == [80.0, 1.0]
    assert load_model(run, weights="model").preset.sample.levels["2"] != [80.0, 1.0]
    pipeline = golden("diffusers_cm", tmp_path)
    assert load_model(pipeline).levels_file == pipeline / "levels.json"


def test_the_newest_finished_run_of_a_kind_is_found_and_nothing_is_hashed(run, hashed, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    for name, content in [
        ("running", '{"state": "running"}'), ("torn", '{"state"'), ("list", "[]"),
        ("empty", '{"state": "done"}'),
    ]:  # fmt: skip
        (run.parent / name).mkdir()
        (run.parent / name / "status.json").write_text(content)
    old = shutil.copytree(run, run.parent / "old")
    os.utime(old / "status.json", (1, 1))
    assert newest_run() == newest_run("consistency") == "runs/mine"
    assert newest_run("teacher") is None
    os.truncate(step(run, 3) / "model.safetensors", 100)
    assert newest_run("consistency") == "runs/mine"
    shutil.rmtree(run / "checkpoints")
    assert newest_run("consistency") == "runs/old"
    assert hashed == []


def test_a_resumed_run_hashes_each_file_once(run, hashed):
    path, complaints = newest_checkpoint(run / "checkpoints")
    load_checkpoint(path, build_state(load_preset("digits-ct"), None, "cpu"))
    assert (path, complaints) == (step(run, 3), [])
    files = set(path.iterdir()) - {path / "manifest.json"}
    assert sorted(hashed) == sorted(map(str, files))


LOAD = """
import sys
import torch, safetensors.torch
before = set(sys.modules)  # what an older torch imports by itself
from cmtool.models import load_model
load_model("digits-cd")
print(*(set(sys.modules) - before))
"""


def test_loading_imports_no_compiler_and_no_plots():
    out = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, check=True, text=True)
    unused = {"torch._dynamo", "sympy", "matplotlib", "scipy", "torchvision", "lpips"}
    assert not unused & set(out.stdout.split())


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        find_model(tmp_path)
    with pytest.raises(InputError, match="no model 'nowhere'"):
        find_model("nowhere")
