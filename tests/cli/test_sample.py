import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmtool.core.images import png_info, read_image

SMALL = ["sample", "-c", "digits-cd", "--device", "cpu"]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.png")}


def test_paths_go_to_stdout_and_images_are_functions_of_their_seeds(cmtool, tmp_path):
    result = cmtool(*SMALL, "--seeds", "0-7", "--batch", "3", "--out", "a")
    assert result.code == 0, result.err
    assert result.text.splitlines() == [f"a/seed00000{i}.png" for i in range(8)]
    assert "1 network calls each" in result.err
    assert cmtool(*SMALL, "--seeds", "0-7", "--batch", "8", "--out", "b").code == 0
    assert cmtool(*SMALL, "--seeds", "7,5-6,0-4", "--out", "c").code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


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
    assert "model: digits-cd" in cmtool("sample", "--seeds", "0", "--out", "a").err


def test_every_weight_file_of_a_checkpoint_can_be_chosen(cmtool, tiny_run, tmp_path):
    for weights in ("ema", "model", "target"):
        arguments = ["--weights", weights, "--seeds", "0", "--out", weights]
        assert cmtool("sample", "-c", tiny_run, *arguments).code == 0
        assert png_info(tmp_path / weights / "seed000000.png")["cmtool:weights"] == weights


def test_weights_that_are_not_there_name_those_that_are(cmtool, tiny_run):
    result = cmtool("sample", "-c", tiny_run, "--weights", "ema-9", "--seeds", "0", "--out", "a")
    assert result.code == 3
    assert "it holds ema, model, target" in result.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
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
