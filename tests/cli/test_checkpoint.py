import json
import time

import onnxruntime
import pytest
import torch

from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.data.decoding import read_image
from cmtool.data.images import to_uint8
from cmtool.models import load_model
from cmtool.sampling import sample
from tests.golden import GOLDEN, golden


def test_info_of_a_bundled_model_for_people_and_programs(cmtool):
    result = cmtool("checkpoint", "info", "digits-cd")
    assert result.code == 0
    lines = dict(line.split(maxsplit=1) for line in result.text.splitlines())
    assert lines["parameters"] == "828,771"
    assert lines["kind"] == "consistency"
    told = json.loads(cmtool("checkpoint", "info", "digits-cd", "--json").out)
    assert told["image_size"] == [8, 8]
    assert told["classes"] == 10
    assert told["held"] == ["ema"]
    assert len(told["sha256"]) == 64


def test_info_of_a_run_names_all_its_weights(cmtool, tiny_run):
    told = json.loads(cmtool("checkpoint", "info", tiny_run, "--json").out)
    assert told["held"] == ["ema", "model", "target"]
    assert told["weights"] == "ema"


@pytest.mark.parametrize(
    ("name", "form", "kind", "parameters", "size"),
    [
        ("edm_adm.pkl", "edm", "teacher", 828_771, [16, 16]),
        ("openai_unet_cond.pt", "openai", None, 515_491, [32, 32]),
        ("jcm_checkpoint_80", "jcm", None, 190_819, [32, 32]),
        ("diffusers_cm", "diffusers", "consistency", 828_643, [16, 16]),
    ],
)
def test_info_of_foreign_files(cmtool, tmp_path, name, form, kind, parameters, size):
    result = cmtool("checkpoint", "info", golden(name, tmp_path), "--json")
    told = json.loads(result.out)
    assert (told["format"], told["kind"], told["parameters"]) == (form, kind, parameters)
    assert told["image_size"] == size
    assert (kind is None) == ("does not say its kind" in result.err)


def test_an_unknown_kind_must_be_said_before_sampling(cmtool, tmp_path):
    path = golden("jcm_checkpoint_80", tmp_path)
    result = cmtool("sample", "-c", path, "--seeds", "0", "--out", "a.png")
    assert result.code == 2
    assert "--kind teacher or --kind consistency" in result.err
    result = cmtool("sample", "-c", path, "--seeds", "0", "--out", "a.png", "--kind", "consistency")
    assert result.code == 0
    assert "image size" in result.err
    assert (tmp_path / "a.png").exists()
    assert cmtool("sample", "-c", path, "--kind", "student").code == 2


def test_a_preset_says_what_a_file_does_not(cmtool, tmp_path):
    path = golden("openai_unet_cond.pt", tmp_path)
    preset = GOLDEN / "openai_unet_cond.toml"
    told = json.loads(cmtool("checkpoint", "info", path, "--preset", preset, "--json").out)
    assert told["image_size"] == [16, 16]
    assert told["kind"] == "teacher"


def test_convert_prints_the_path_and_what_it_left_behind(cmtool, tiny_run, tmp_path):
    result = cmtool("checkpoint", "convert", tiny_run, "small.safetensors")
    assert result.text == "small.safetensors\n"
    assert "left behind: model, target" in result.err
    assert "equal answers" in result.err
    again = cmtool("checkpoint", "convert", tiny_run, "small.safetensors")
    assert again.code == 2
    assert "exists" in again.err
    told = json.loads(cmtool("checkpoint", "convert", "small.safetensors", "pipe", "--json").out)
    assert told["format"] == "diffusers"
    assert told["from"]["format"] == "native"
    one, other = (  # the files differ: each names its model
        read_image(cmtool("sample", "-c", model, "--seeds", "3", "--out", "-").out)
        for model in ("pipe", tiny_run)
    )
    assert torch.equal(one, other)


def test_a_foreign_teacher_is_distilled(cmtool, tmp_path):
    """The student starts from an EDM pickle's weights: class-conditional digits of 8x8."""
    assert cmtool("checkpoint", "convert", "digits-edm", "t.safetensors").code == 0
    result = cmtool(
        "distill", "--teacher", "t.safetensors", "--set", "train.steps=2", "--out", "run"
    )
    assert result.code == 0, result.err
    mismatch = cmtool("distill", "--teacher", golden("edm_adm.pkl", tmp_path), "--out", "other")
    assert mismatch.code == 3
    assert "16x16" in mismatch.err


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["info", "nowhere.pkl"], 3, "no model 'nowhere.pkl'"),
        (["info", "digits-cd", "--weights", "x"], 0, ""),
        (["convert", "digits-edm", "pipe"], 3, "it is a teacher"),
        (["convert", "digits-cd", "x.pt"], 2, "writes no pickles"),
        (["convert", "digits-cd", "x.SAFETENSORS"], 2, "writes no .SAFETENSORS files"),
        (["convert", "digits-cd", "."], 2, "exists"),
        (["convert", "digits-cd", "-"], 2, "not written to stdout"),
        (["convert", "nowhere.pkl", "."], 2, ". exists"),  # before a large file is read
    ],
)
def test_bad_input(cmtool, arguments, code, what):
    result = cmtool("checkpoint", *arguments)
    assert result.code == code, result.err
    assert what in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes", "side"), [("digits-cd", 10, 8), ("emoji-cmt", 9, 32)])
def test_a_bundled_model_becomes_onnx(cmtool, tmp_path, name, classes, side):
    """Its pictures of 100 seeds are those of `cmtool sample`, to one grey level."""
    made = cmtool("checkpoint", "convert", name, "model.onnx", "--steps", "2")
    assert made.code == 0, made.err
    assert made.text == "model.onnx\n"
    assert "within" in made.err
    again = cmtool("checkpoint", "convert", name, "model.onnx")
    assert (again.code, "--overwrite" in again.err) == (2, True)
    model, seeds = load_model(name), range(100)
    start = time.perf_counter()
    ours = to_uint8(sample(model, seeds, steps=2))
    between = time.perf_counter()
    draw = SeededNoise(seeds)
    noise = torch.stack([draw(torch.empty(100, 3, side, side)) for _ in range(2)])
    inputs = {"noise": noise.numpy(), "labels": seeded_labels(seeds, classes).numpy()}
    (images,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, inputs)
    took = between - start, time.perf_counter() - between
    apart = (to_uint8(torch.from_numpy(images)).int() - ours.int()).abs()
    print(f"{name}: cmtool {took[0]:.3f} s, ONNX Runtime with its start {took[1]:.3f} s")
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["digits-cd", "x.trt"], 2, "writes no .trt files"),
        (["digits-cd", "x.mp4"], 2, "an .onnx file or a folder"),
        (["digits-edm", "x.onnx"], 3, "distill it first"),
        (["digits-cd", "x.safetensors", "--steps", "2"], 2, "only for .onnx files"),
    ],
)
def test_what_no_format_has_is_refused(cmtool, tmp_path, arguments, code, said):
    refused = cmtool("checkpoint", "convert", *arguments)
    assert refused.code == code
    assert said in refused.err
    assert not (tmp_path / arguments[1]).exists()
