import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmtool.cli._drawing import Drawing
from cmtool.core.samplers import SAMPLERS
from cmtool.data.datasets import load_dataset
from cmtool.data.decoding import png_info, read_image
from cmtool.evaluation.search import Search
from cmtool.models import ASSETS, load_model
from cmtool.sampling import generate, plan
from tests.processes import run

SMALL = ["sample", "-c", "digits-cd", "--device", "cpu"]


def files(folder):
    """Return the images of a folder, the bytes of a zip, or the arrays of an npz."""
    if folder.suffix == ".npz":  # zipfile writes down the time
        with np.load(folder) as arrays:
            return {name: arrays[name].tobytes() for name in arrays}
    if folder.is_file():
        return folder.read_bytes()
    return {p.name: p.read_bytes() for p in folder.glob("*.png")}


def test_paths_go_to_stdout_and_images_are_functions_of_their_seeds(cmtool, tmp_path):
    result = cmtool(*SMALL, "--seeds", "0-7", "--batch", "3", "--out", "a")
    assert result.code == 0, result.err
    assert result.text.splitlines() == [f"a/seed00000{i}.png" for i in range(8)]
    assert "1 network calls each" in result.err
    assert cmtool(*SMALL, "--seeds", "0-7", "--batch", "8", "--out", "b").code == 0
    assert cmtool(*SMALL, "--seeds", "7,5-6,0-4", "--out", "c").code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_is_the_same_to_the_last_bit_in_any_batch(precision):
    model = load_model("digits-cd")
    chosen = plan(model.preset, steps=2)._replace(precision=precision)

    def draw(seeds, batch):
        return torch.cat(list(generate(model.f, model.preset, chosen, seeds, batch=batch)))

    together = draw(range(100), 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(draw(order, 7), together[order])
    assert torch.equal(draw([17], 1), together[17:18])


@pytest.mark.parametrize(
    ("model", "steps"), [("digits-cd", 1), ("digits-cd", 2), ("digits-edm", 9)]
)
def test_images_in_bf16_are_within_some_grey_levels(model, steps, cmtool, tmp_path):
    draw = ["sample", "-c", model, "--steps", str(steps), "--seeds", "0-49", "--device", "cpu"]
    assert cmtool(*draw, "--out", "full.png").code == 0
    assert cmtool(*draw, "--out", "half.png", "--precision", "bf16").code == 0
    full, half = (read_image(tmp_path / name).int() for name in ("full.png", "half.png"))
    apart = (full - half).abs().float()
    assert 0 < apart.max() <= 6  # 2 to 4 of 255
    assert apart.mean() < 0.4  # 0.19 to 0.23
    about = png_info(tmp_path / "half.png")
    assert about.pop("cmtool:precision") == "bf16"
    assert about == png_info(tmp_path / "full.png")


def test_existing_images_are_skipped_and_others_protected(cmtool, tmp_path):
    assert cmtool(*SMALL, "--seeds", "0-3", "--out", "a").code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    result = cmtool(*SMALL, "--seeds", "0-5", "--out", "a")
    assert result.code == 0
    assert "4 of 6 images are there already" in result.err
    assert len(result.text.splitlines()) == 6
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    result = cmtool(*SMALL, "--seeds", "0-3", "--steps", "2", "--out", "a")
    assert result.code == 2
    assert "holds another image" in result.err
    assert cmtool(*SMALL, "--seeds", "0-3", "--precision", "bf16", "--out", "a").code == 2
    assert cmtool(*SMALL, "--seeds", "0-3", "--steps", "2", "--out", "a", "--overwrite").code == 0


def test_each_image_says_how_it_was_made(cmtool, tmp_path):
    assert (
        cmtool(*SMALL, "--seeds", "17", "--class", "4", "--sigmas", "80,0.5", "--out", "a").code
        == 0
    )
    info = png_info(tmp_path / "a/seed000017.png")
    assert info["cmtool:seed"] == "17"
    assert info["cmtool:class"] == "4"
    assert info["cmtool:sigmas"] == "80.0,0.5"
    assert len(info["cmtool:model"]) == 64


def test_one_grid_to_a_file_or_to_stdout(cmtool, tmp_path):
    result = cmtool(*SMALL, "--seeds", "0-8", "--out", "grid.png")
    assert result.text == "grid.png\n"
    piped = cmtool(*SMALL, "--seeds", "0-8", "--out", "-")
    assert piped.out == (tmp_path / "grid.png").read_bytes()
    assert read_image(piped.out).shape == (3, 168, 168)


def test_json_lists_what_was_written(cmtool):
    result = cmtool(*SMALL, "--seeds", "3,4", "--out", "a", "--json")
    content = json.loads(result.text)
    assert [image["seed"] for image in content["images"]] == [3, 4]
    assert content["sigmas"] == [80.0]


def test_a_teacher_takes_its_own_sampler(cmtool):
    result = cmtool("sample", "-c", "digits-edm", "--steps", "3", "--seeds", "0", "--out", "a")
    assert result.code == 0
    assert "heun" in result.err
    assert "5 network calls each" in result.err


def test_the_newest_finished_run_is_the_default(cmtool, tiny_run, tmp_path):
    (tmp_path / "runs").symlink_to(tiny_run.parent)
    result = cmtool("sample", "--seeds", "0", "--out", "a")
    assert result.code == 0, result.err
    assert "model: runs/tiny" in result.err


def test_without_runs_the_bundled_model_is_the_default(cmtool):
    assert "model: emoji-cmt" in cmtool("sample", "--seeds", "0", "--out", "a").err


def test_every_weight_file_of_a_checkpoint_can_be_chosen(cmtool, tiny_run, tmp_path):
    for weights in ("ema", "model", "target"):
        arguments = ["--weights", weights, "--seeds", "0", "--out", weights]
        assert cmtool("sample", "-c", tiny_run, *arguments).code == 0
        assert png_info(tmp_path / weights / "seed000000.png")["cmtool:weights"] == weights


def test_weights_that_are_not_there_name_those_that_are(cmtool, tiny_run):
    result = cmtool("sample", "-c", tiny_run, "--weights", "ema-9", "--seeds", "0", "--out", "a")
    assert result.code == 3
    assert "it holds ema, model, target" in result.err


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a file that is always full"
)
@pytest.mark.parametrize("out", ["-", "folder"])
def test_a_stdout_without_room_is_told(tmp_path, out):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cmtool", *SMALL, "--seeds", "0-1", "--out", out],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ,
        )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "error: no room on the disk for stdout" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_archives_hold_the_same_images_as_the_folder(cmtool, tmp_path):
    seeds = ["--seeds", "0-4", "--batch", "2"]
    for out in ("a", "a.zip", "a.npz"):
        assert cmtool(*SMALL, *seeds, "--out", out).code == 0
    folder = torch.stack([read_image(p) for p in sorted((tmp_path / "a").glob("*.png"))])
    zipped, stored = load_dataset(str(tmp_path / "a.zip")), load_dataset(str(tmp_path / "a.npz"))
    assert torch.equal(zipped.images, folder)
    assert torch.equal(stored.images, folder)
    classes = [int(png_info(p)["cmtool:class"]) for p in sorted((tmp_path / "a").glob("*.png"))]
    assert zipped.labels.tolist() == stored.labels.tolist() == classes
    with np.load(tmp_path / "a.npz") as content:
        assert content["arr_0"].shape == (5, 8, 8, 3)
        assert content["arr_0"].dtype == np.uint8
    result = cmtool(*SMALL, *seeds, "--out", "a.npz")
    assert result.code == 2
    assert "a.npz exists" in result.err


def test_the_releases_rounding_is_half_a_level_darker(cmtool, tmp_path):
    for name in ("nearest", "floor"):
        result = cmtool(*SMALL, "--seeds", "0-7", "--rounding", name, "--out", f"{name}.npz")
        assert result.code == 0, result.err
    near, floor = (
        load_dataset(str(tmp_path / f"{n}.npz")).images.int() for n in ("nearest", "floor")
    )
    gap = near - floor
    assert set(gap.unique().tolist()) == {0, 1}
    assert float(gap.float().mean()) == pytest.approx(0.5, abs=0.1)


def test_indices_mean_levels_and_the_last_costs_no_call(cmtool):
    result = cmtool(*SMALL, "--ts", "0,22,39", "--grid", "40", "--seeds", "0", "--out", "a")
    assert result.code == 0, result.err
    assert "multistep at sigma 80,1.382: 2 network calls each" in result.err
    result = cmtool(*SMALL, "--ts", "0,6,12", "--seeds", "0", "--out", "b")
    assert "at sigma 80,2.515" in result.err
    result = cmtool(*SMALL, "--ts", "0,22", "--grid", "40", "--seeds", "0", "--out", "c")
    assert result.code == 2
    assert "end with 39" in result.err


def test_classes_are_given_one_per_seed_or_drawn(cmtool, tmp_path):
    result = cmtool(*SMALL, "--seeds", "5-7", "--class", "1,2,3", "--out", "a")
    assert result.code == 0, result.err
    infos = [png_info(tmp_path / f"a/seed00000{seed}.png") for seed in (5, 6, 7)]
    assert [info["cmtool:class"] for info in infos] == ["1", "2", "3"]
    assert cmtool(*SMALL, "--seeds", "6", "--class", "2", "--out", "b").code == 0
    assert files(tmp_path / "b")["seed000006.png"] == files(tmp_path / "a")["seed000006.png"]
    result = cmtool(*SMALL, "--seeds", "5-7", "--class", "1,2", "--out", "c")
    assert "2 classes for 3 seeds" in result.err


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "multistep"])
def test_every_sampler_of_a_teacher_is_a_command_away(cmtool, name):
    result = cmtool("sample", "-c", "digits-edm", "--sampler", name, "--steps", "3",
                    "--seeds", "0", "--out", "a")  # fmt: skip
    assert result.code == 0, result.err
    assert f"{name} at sigma" in result.err


def test_options_of_a_sampler_are_set_and_recorded(cmtool, tmp_path):
    churn = ["sample", "-c", "digits-edm", "--sampler", "stochastic_heun", "--steps", "4"]
    assert cmtool(*churn, "--set", "s_churn=0", "--seeds", "0-1", "--out", "still").code == 0
    assert cmtool(*churn, "--set", "s_churn=2", "--seeds", "0-1", "--out", "churned").code == 0
    heun = ["sample", "-c", "digits-edm", "--sampler", "heun", "--steps", "4"]
    assert cmtool(*heun, "--seeds", "0-1", "--out", "heun").code == 0
    pictures = {
        n: read_image(tmp_path / n / "seed000001.png") for n in ("still", "churned", "heun")
    }
    assert torch.equal(pictures["still"], pictures["heun"])
    assert not torch.equal(pictures["churned"], pictures["heun"])
    info = png_info(tmp_path / "churned/seed000001.png")
    assert info["cmtool:sampler"] == "stochastic_heun(s_churn=2)"
    result = cmtool(*churn, "--set", "s_chrun=2", "--out", "x")
    assert result.code == 2
    assert "'s_churn'" in result.err


def test_nothing_is_told_without_metadata(cmtool, tmp_path):
    assert cmtool(*SMALL, "--seeds", "0", "--no-metadata", "--out", "a").code == 0
    assert png_info(tmp_path / "a/seed000000.png") == {}


def test_images_without_metadata_are_told_apart_by_drawing_one(cmtool, tmp_path):
    plain = [*SMALL, "--seeds", "0-3", "--no-metadata"]
    assert cmtool(*SMALL, "--seeds", "0-3", "--out", "a").code == 0
    for folder, is_same in (("a", "4 of 4 images are there"), ("b", "4 images, ")):
        result = cmtool(*plain, "--out", folder)
        assert result.code == 0, result.err
        assert is_same in result.err
    (tmp_path / "b/seed000002.png").unlink()
    before = files(tmp_path / "a")
    assert "3 of 4 images are there" in cmtool(*plain, "--out", "b").err
    for folder in "ab":
        for other in (["--steps", "2"], ["--class", "7"], ["-c", "digits-edm"]):
            result = cmtool(*plain, *other, "--out", folder)
            assert result.code == 2, result.err
            assert "holds another image" in result.err
    assert files(tmp_path / "a") == before
    (tmp_path / "b/seed000000.png").write_bytes(b"no image")
    assert cmtool(*plain, "--out", "b").code == 2


def test_a_search_finds_levels_is_remembered_and_used(cmtool, tmp_path):
    shutil.copy(ASSETS / "digits-cd.safetensors", tmp_path / "m.safetensors")
    arguments = ["search", "-c", "m.safetensors", "--num", "64", "--device", "cpu"]
    first = cmtool(*arguments)
    assert first.code == 0, first.err
    scores = dict(re.findall(r"sigma (\S+): fd-digits (\S+)", first.err))
    assert first.text.strip() == min(scores, key=lambda key: float(scores[key]))
    again = cmtool(*arguments)
    assert again.out == first.out
    assert again.err.count("(known)") == len(scores)
    drawn = cmtool("sample", "-c", "m.safetensors", "--steps", "2", "--seeds", "0", "--out", "a")
    sigmas = [float(sigma) for sigma in first.text.split(",")]
    assert f"at sigma {sigmas[0]:.4g},{sigmas[1]:.4g}:" in drawn.err
    shutil.copy(ASSETS / "digits-edm.safetensors", tmp_path / "m.safetensors")
    other = cmtool("sample", "-c", "m.safetensors", "--steps", "2", "--seeds", "0", "--out", "b")
    assert "heun at sigma 80,0.002" in other.err  # levels of another file are not used


def test_the_bundled_model_is_not_changed(cmtool):
    result = cmtool("search", "-c", "digits-cd")
    assert result.code == 2
    assert "give an --out" in result.err


def test_a_search_makes_its_folder_before_it_measures(cmtool, tmp_path, monkeypatch):
    """It failed after the first whole evaluation."""

    def levels(wanted, *_):
        assert wanted.file.parent.is_dir()
        return [80.0, float(wanted.num)], 0.0

    monkeypatch.setattr(Search, "levels", levels)
    search = ["search", "-c", "digits-cd", "--num-images", "64", "--device", "cpu", "-o"]
    assert cmtool(*search, "new/l.json").text == "80,64\n"
    (tmp_path / "file").touch()
    assert cmtool(*search, "file/l.json").code == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("out", ["a", "a.zip", "a.npz"])
def test_a_stopped_command_goes_on_when_it_is_typed_again(
    cmtool, tmp_path, monkeypatch, out, number
):
    command = [*SMALL, "--seeds", "0-6", "--batch", "2", "--out", out]
    assert cmtool(*command).code == 0
    whole = (tmp_path / out).rename(tmp_path / f"whole{Path(out).suffix}")
    drawn, draw = [], Drawing.draw

    def stopped(self, indices, *more):
        if len(drawn) == 4:
            os.kill(os.getpid(), number)
        drawn.extend(indices)
        return draw(self, indices, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Drawing, "draw", stopped)
        result = cmtool(*command)
    assert result.code == 128 + number
    where = "a" if out == "a" else f"{out}.part"
    assert f"stopped by signal {number}: 4 of 7 images are there, in {where}" in result.err
    assert "hint: the same command draws the rest" in result.err
    assert [p.name for p in tmp_path.iterdir() if p != whole] == [where]
    drawn.clear()
    monkeypatch.setattr(
        Drawing, "draw", lambda self, i, *m: (drawn.extend(i), draw(self, i, *m))[1]
    )
    other = cmtool(*command, "--sigmas", "80,0.5")
    assert other.code == 2
    assert not drawn
    result = cmtool(*command)
    assert result.code == 0
    assert "4 of 7 images are there already" in result.err
    assert drawn == [4, 5, 6]
    assert files(tmp_path / out) == files(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [out, whole.name]


def test_an_archive_that_is_stopped_before_an_image_leaves_nothing(cmtool, tmp_path, monkeypatch):
    monkeypatch.setattr(Drawing, "draw", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = cmtool(*SMALL, "--seeds", "0-6", "--out", "a.zip")
    assert result.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    outs = {n: [tmp_path / str(n) / name for name in ("a", "a.zip", "a.npz")] for n in (1, 2)}
    jobs = [
        {"processes": n, "arguments": [*SMALL, "--seeds", "0-7", "--batch", "3", "--out", str(out)]}
        for n in outs for out in outs[n]
    ]  # fmt: skip
    ends, said, stderr = run(*jobs)
    assert [codes for codes, _ in ends] == [[0]] * 3 + [[0, 0]] * 3, stderr
    one, two = ([line for line in said if f"/{n}/a" in line] for n in outs)
    assert len(one) == 8 + 2  # pictures and archives
    assert [line.replace("/1/a", "/2/a") for line in one] == two
    assert files(outs[1][0]) == files(outs[2][0])
    assert len(files(outs[2][0])) == 8
    for paths in zip(outs[1][1:], outs[2][1:], strict=True):
        one, two = (load_dataset(str(path)) for path in paths)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
