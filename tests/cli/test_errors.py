"""Bad input: two lines on stderr that name the value and the remedy, nothing on stdout."""

import pytest
import torch

from cmtool.cli import with_homes
from cmtool.data.decoding import read_image
from cmtool.data.drawing import animation_bytes, png_bytes
from cmtool.formats.native import write_weights
from cmtool.models import ASSETS
from cmtool.presets.build import build_network
from cmtool.presets.toml import load_preset, to_toml
from tests.cli.conftest import TINY

FEATURES = str(ASSETS / "digits-features.safetensors")
HTML = b"<!DOCTYPE html><html>404</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "page.safetensors").write_bytes(HTML)
    (tmp_path / "pointer.safetensors").write_bytes(POINTER)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "text.png").write_bytes(b"not a picture")
    (tmp_path / "d.png").write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    (tmp_path / "big.png").write_bytes(png_bytes(torch.zeros(3, 16, 16, dtype=torch.uint8)))
    (tmp_path / "mask.png").write_bytes(png_bytes(torch.zeros(1, 8, 8, dtype=torch.uint8)))
    (tmp_path / "mask9.png").write_bytes(png_bytes(torch.zeros(1, 9, 9, dtype=torch.uint8)))
    moving = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    (tmp_path / "moving.webp").write_bytes(animation_bytes(moving, ".webp"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:50])
    (tmp_path / "bad.toml").write_text("this is = = not toml")
    (tmp_path / "loop.toml").write_text('extends = "loop"')
    grey = load_preset("digits-ct", {
        "model.channels": 1, "model.num_classes": 0, "model.network.model_channels": 16,
        "model.network.norm_groups": 4, "model.network.head_channels": 16,
    })  # fmt: skip
    about = {"kind": "consistency", "weights": "ema", "preset": grey.model_dump(mode="json")}
    write_weights(tmp_path / "grey.safetensors", build_network(grey.model).state_dict(), about)
    (tmp_path / "folder").mkdir()


CASES = [
    (["preset", "show", "digits-ce"], 2, "'digits-ce'", "did you mean digits-c"),
    (["preset", "show", "nowhere.toml"], 3, "nowhere.toml", "check the path"),
    (["preset", "show", "bad.toml"], 2, "bad.toml is not TOML", "mend"),
    (["preset", "show", "loop.toml"], 2, "extends itself", "circle"),
    (["preset", "show", "digits-cd", "--set", "train.stps=5"], 2, "'train.stps'", "'train.steps'"),
    (["preset", "show", "digits-cd", "--set", "train.steps=many"], 2, "'many'", "train.steps"),
    (["preset", "show", "digits-cd", "--set", "train.lr=-1"], 2, "-1", "train.lr"),
    (["preset", "show", "digits-cd", "--set", "train.steps"], 2, "not KEY=VALUE", "--set"),
    (["train", *TINY, "--set", "loss.levels=lognorml"], 2, "'lognorml'", "'lognormal'"),
    (["train", *TINY, "--set", "loss.levels.men=1"], 2, "no option 'men'", "'mean'"),
    (["train", *TINY, "--set", "model.network.model_chanels=1"], 2, "'model_chanels'", "channels"),
    (["train", *TINY, "--set", "model.network.model_channels=wide"], 2, "'wide'", "type"),
    (["train", *TINY, "--set", "model.network.norm_groups=7"], 2, "cannot be built", "network"),
    (["train", *TINY, "--set", "loss.levels.mean=abc"], 2, "'abc'", "type"),
    (["train", *TINY, "--set", "train.optimizer.maximize=true"], 2, "'maximize'", "betas"),
    (["train", "--preset", "digits-ct", "--set", "loss.curriculum.mu0=0"], 2, "mu0 = 0", "mu0"),
    (["train", *TINY, "--out", "d.png"], 3, "d.png is a file", "--out"),
    (["sample", "-c", "digits-cd", "--sigmas", "inf"], 2, "inf", "lower"),
    (["sample", "-c", "digits-cd", "--sigmas", "80,nan"], 2, "not finite", "numbers"),
    (["sample", "-c", "digits-cd", "--sigmas", "500"], 2, "above the model's 80", "lower"),
    (["sample", "-c", "digits-cd", "--sigmas", "80", "--steps", "2"], 2, "both --steps", "one"),
    (["sample", "-c", "digits-cd", "--out", "x.jpg"], 2, "x.jpg", ".png"),
    (["eval", "fid", "folder", "-c", "digits-cd"], 2, "both images and", "one"),
    (["train", *TINY, "--set", "train.optimizer=sgd"], 2, "'sgd'", "adam"),
    (["train", "--preset", "digits-cd"], 2, "needs a teacher", "cmtool distill"),
    (["train", "--set", "loss=l1"], 2, "loss = 'l1'", "edm loss"),
    (["train", "--set", "loss=5"], 2, "loss = 5", "edm loss"),
    (["train", "--set", "loss.pair=[1]"], 2, "loss.pair = '[1]'", "loss.method"),
    (["train", "--set", "run.ema_every=9"], 2, "error: run.ema_every stores", "ema_every=0"),
    (["distill", "--set", "loss.method=consistency_training"], 2, "digits-cd has no", "cmtool"),
    (["distill", "--preset", "digits-ct"], 2, "no teacher", "cmtool train"),
    (["distill", "--metric", "l3"], 2, "'l3'", "l2"),
    (["distill", "--teacher", "digits-cd"], 3, "not a teacher", "edm"),
    (["distill", "--teacher", "nowhere"], 3, "no model 'nowhere'", "run folder"),
    (["train", "--resume"], 2, "--resume without", "--out"),
    (["train", "--resume", "--out", "folder"], 3, "no run to resume", "leave --resume out"),
    (["train", "--data", "nowhere"], 3, "'nowhere'", "digits"),
    (["train", "--data", "folder"], 3, "no images in folder", ".png"),
    (["train", "--device", "tpu9"], 2, "'tpu9'", "cpu"),
    (["sample", "-c", "digits-cd", "--device", "meta"], 2, "device 'meta' computes", "cpu"),
    (["sample", "-c", "digits-edm", "--set", "s_churn=nan"], 2, "s_churn is not a number", "=40"),
    (["sample", "-c", "digits-edm", "--set", "name=heun"], 2, "does not choose", "--sampler heun"),
    (["sample", "-c", "digits-cd", "--precision", "fp8"], 2, "'fp8'", "bf16"),
    (["sample", "-c", "page.safetensors"], 3, "HTML page", "download"),
    (["sample", "-c", "pointer.safetensors"], 3, "LFS pointer", "git lfs pull"),
    (["sample", "-c", "empty.safetensors"], 3, "is empty", "again"),
    (["sample", "-c", "noise.safetensors"], 3, "noise.safetensors is not a model", "EDM pickle"),
    (["sample", "-c", FEATURES], 3, "does not hold a denoiser", "cmtool train"),
    (["sample", "--seeds", "0-99999999999"], 2, "too many images", "at most"),
    (["preset", "show", "digits-cd", "--set", "model.image_size=8"], 2, "model.image_size", "set"),
    (["preset", "show", "digits-cd", "--set", "train.ema=5"], 2, "train.ema", "edm train.ema"),
    (["preset", "show", "digits-cd", "--set", "train.lr.x=1"], 2, "train.lr", "edm train.lr"),
    (["sample", "-c", "folder"], 3, "no checkpoint in folder", "run folder"),
    (["sample", "--seeds", "5-2"], 2, "'5-2'", "--seeds 2-5"),
    (["sample", "--sigmas", "80,x"], 2, "'80,x'", "80,0.8"),
    (["sample", "-c", "digits-cd", "--sigmas", "1,80"], 2, "1,80 do not go from high", "80,1"),
    (["sample", "-c", "digits-cd", "--sigmas", "80,0.0001"], 2, "below sigma_min", "raise"),
    (["sample", "-c", "digits-cd", "--class", "10"], 2, "no class 10", "0 to 9"),
    (["sample", "-c", "digits-cd", "--sampler", "heun"], 2, "'heun'", "multistep"),
    (["sample", "-c", "digits-edm", "--sampler", "multistep"], 2, "is a teacher", "heun"),
    (["sample", "-c", "digits-cd", "--out", "d.png/x"], 3, "cannot make d.png/x", "--out"),
    (["sample", "-c", "digits-cd", "--out", "d.png"], 2, "d.png exists", "--overwrite"),
    (["edit", "inpaint", "d.png", "--mask", "mask9.png"], 3, "mask is 9x9", "resize"),
    (["edit", "inpaint", "gone.png", "--mask", "mask.png"], 3, "no such image: gone.png", "path"),
    (["edit", "inpaint", "d.png", "--mask", "gone.png"], 3, "no such image: gone.png", "path"),
    (["edit", "inpaint", "text.png", "--mask", "mask.png"], 3, "text.png is not an image", "PNG"),
    (["edit", "inpaint", "--mask", "mask.png"], 3, "nothing on stdin", "pipe"),
    (["edit", "inpaint", "big.png", "--mask", "big.png"], 3, "16x16, the model makes 8x8", "8x8"),
    (["edit", "inpaint", "d.png", "--mask", "mask.png", "-c", "digits-edm"], 3, "digits-edm is not",
     "--checkpoint"),
    (["edit", "inpaint", "d.png"], 2, "which part", "--mask"),
    (["edit", "inpaint", "d.png", "--box", "7,0,2,8"], 2, "7,0,2,8 is not within 8x8", "pixels"),
    (["edit", "inpaint", "d.png", "--box", "1,2"], 2, "'1,2'", "LEFT,TOP"),
    (["edit", "inpaint", "d.png", "--text", "word"], 2, "does not fit", "fewer letters"),
    (["edit", "superres", "d.png", "--factor", "3"], 2, "factor of 3", "2, 4"),
    (["edit", "superres", "d.png", "--factor", "100000", "--fit", "tile"], 2, "--factor 100000",
     "give 2 to 8"),
    (["edit", "superres", "big.png"], 3, "big.png, to be enlarged 2 times,", "tile"),
    (["edit", "colorize", "d.png", "--sigmas", "1,2"], 2, "1,2 do not go from high", "2,1"),
    (["edit", "colorize", "d.png", "--sigmas", "99"], 2, "above the model's 80", "lower"),
    (["edit", "colorize", "d.png", "--class", "11"], 2, "no class 11", "0 to 9"),
    (["edit", "colorize", "text.png"], 3, "text.png is not an image", "PNG"),
    (["edit", "colorize", "moving.webp"], 3, "3 frames: give a single picture", "replace"),
    (["edit", "colorize", "cut.png"], 3, "cut.png cannot be decoded", "replace"),
    (["edit", "colorize", "d.png", "--fit", "stretch"], 2, "'stretch'", "tile"),
    (["edit", "colorize", "d.png", "d.png"], 2, "2 pictures and --out -", "folder"),
    (["edit", "colorize", "d.png", "folder/d.png", "--out", "o"], 3, "no such image", "path"),
    (["edit", "colorize", "d.png", "--out", "mask.png/x.png"], 3, "mask.png", "--out"),
    (["edit", "colorize", "d.png", "-c", "grey.safetensors"], 3, "makes grey pictures", "colour"),
    (["sample", "-c", "grey.safetensors", "--class", "3"], 2, "an unconditional model", "leave"),
    (["edit", "colorize", "d.png", "-c", "grey.safetensors", "--class", "3"], 2, "unconditional",
     "leave"),
    (["edit", "denoise", "d.png", "--sigma", "0.0001"], 2, "--sigma 0.0001", "0.002"),
    (["edit", "interpolate", "d.png"], 2, "1 pictures and 0 seeds", "two"),
    (["edit", "interpolate", "--seeds", "1,2", "--out", "x.jpg"], 2, "x.jpg", ".gif"),
    (["sample", "-c", "digits-cd", "--ts", "0,9", "--grid", "40"], 2, "--ts 0,9", "end with 39"),
    (["sample", "-c", "digits-cd", "--ts", "a"], 2, "'a'", "0,22,39"),
    (["sample", "-c", "digits-cd", "--grid", "40"], 2, "without --ts", "--ts"),
    (["sample", "-c", "digits-cd", "--seeds", "1,1"], 2, "a seed twice", "once"),
    (["sample", "-c", "digits-cd", "--rounding", "up"], 2, "'up'", "nearest"),
    (["sample", "-c", "digits-edm", "--sampler", "huen"], 2, "'huen'", "'heun'"),
    (["search", "-c", "digits-cd", "--steps", "90", "--out", "l.json"], 2, "grid of 13", "12"),
    (["search", "-c", "digits-edm"], 3, "not a consistency model", "--checkpoint"),
    (["eval", "is", "x.zip", "--reference-num", "5"], 2, "no reference", "--reference-num out"),
    (["eval", "is", "x.zip", "--reference", "y.zip"], 2, "no reference", "leave --reference out"),
    (["eval", "fid", "a.parquet", "b.parquet"], 2, "one set", "a.parquet --reference b.parquet"),
    (["eval", "fid", "a.tgz", "b.tar.xz"], 2, "one set", "a.tgz --reference b.tar.xz"),
    (["eval", "fid", "folder"], 3, "no images in folder", ".png"),
    (["eval", "fid", "d.png"], 3, "1 image to evaluate", "2 or more"),
    (["eval", "fid", "d.png", "big.png"], 3, "big.png is 16x16", "one size"),
    (["eval", "fid", "big.png", "big.png"], 3, "8x8", "bundled digits"),
    (["eval", "fid", "d.png", "text.png"], 3, "text.png is not an image", "PNG"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "what", "hint"), CASES, ids=lambda v: None)
@pytest.mark.usefixtures("files", "digits_by_default")
def test_the_message_names_value_and_remedy(cmtool, arguments, code, what, hint):
    result = cmtool(*arguments)
    assert result.code == code, result.err
    assert result.out == b""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    error = next(line for line in lines if line.startswith("error: "))
    remedy = next(line for line in lines if line.startswith("hint: "))
    assert what in error
    assert hint in remedy


def test_a_library_that_finds_no_memory_is_a_lack_of_memory(cmtool, monkeypatch):
    """As under `ulimit -v`, with which clusters hold jobs to the memory they asked for."""

    def load(_):
        raise ImportError("libtorch_cuda.so: failed to map segment from shared object")

    monkeypatch.setattr("cmtool.cli.build_app", load)
    result = cmtool("sample")
    assert result.code == 5
    error, hint = result.err.splitlines()
    assert error.startswith("error: no memory to load a library: libtorch_cuda.so")
    assert "ulimit -v" in hint


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_no_more_memory_is_a_lack_of_it_and_no_fault(cmtool, monkeypatch, error):
    def load(_):
        raise error

    monkeypatch.setattr("cmtool.cli.build_app", load)
    for command, way in {"sample": "--batch", "train": "--accumulate", "edit": "picture"}.items():
        result = cmtool(command)
        assert (result.code, result.out) == (5, b"")
        what, hint = result.err.splitlines()
        assert (what, hint.startswith("hint: "), way in hint) == (
            "error: out of memory",
            True,
            True,
        )


def test_another_error_stays_one_of_ours(cmtool, monkeypatch):
    def load(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("cmtool.cli.build_app", load)
    with pytest.raises(RuntimeError, match="a bug"):
        cmtool("sample")


@pytest.mark.parametrize(
    ("command", "made_by", "preset"),
    [("distill", "train", "digits-edm"), ("train", "distill", "digits-cd")],
)
def test_a_run_of_the_other_command_is_resumed_by_that_one(
    cmtool, tmp_path, command, made_by, preset
):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "preset.toml").write_text(to_toml(load_preset(preset)))
    result = cmtool(command, "--out", "my run", "--resume")
    assert result.code == 2
    assert result.err.splitlines() == [
        f"error: the run in my run was made by cmtool {made_by}",
        f"hint: cmtool {made_by} --out 'my run' --resume",
    ]


@pytest.mark.usefixtures("files")
def test_pictures_are_mixed_by_a_model_of_grey_ones(cmtool, tmp_path):
    made = cmtool("edit", "interpolate", "d.png", "d.png", "--frames", "2", "--sigmas", "5",
                  "-c", "grey.safetensors", "--out", "g.png")  # fmt: skip
    assert made.code == 0, made.err
    assert read_image(tmp_path / "g.png").shape == (3, 8, 16)


@pytest.mark.usefixtures("files")
def test_a_home_is_found_behind_an_equals_sign(cmtool, tmp_path, monkeypatch):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "grey.safetensors").rename(tmp_path / "home/grey.safetensors")
    for words in (["--checkpoint=~/grey.safetensors"], ["-c", "~/grey.safetensors"]):
        made = cmtool("sample", *words, "--seeds", "0", "--out=~/pics", "--overwrite")
        assert made.code == 0, made.err
    assert [path.name for path in (tmp_path / "home/pics").glob("*.png")] == ["seed000000.png"]
    assert not (tmp_path / "~").exists()


def test_a_tilde_that_is_no_home_stays():
    words = ["edit", "inpaint", "~/a.png", "--text=~", "--set=data.path=~/x", "x=~/y"]
    assert with_homes(words) == words


def test_a_wrong_flag_is_a_usage_error(cmtool):
    assert cmtool("sample", "--sedes", "1").code == 2
    assert cmtool("smaple").code == 2
