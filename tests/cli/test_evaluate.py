import json

import pytest


def value(result):
    assert result.code == 0, result.err
    return json.loads(result.text)


def test_the_training_digits_are_at_no_distance_from_themselves(cmtool):
    content = value(cmtool("eval", "fid", "digits", "--num", "99999"))
    assert content["value"] == pytest.approx(0, abs=1e-6)
    assert content["metric"] == "fd-digits"


def test_the_number_comes_with_all_it_depends_on(cmtool):
    content = value(cmtool("eval", "fid", "-c", "digits-cd", "--num", "64", "--steps", "2"))
    assert content["num_images"] == 64
    assert content["seeds"] == "0-63"
    assert content["evaluations"] == 2
    assert content["model"]["kind"] == "consistency"
    assert len(content["model"]["sha256"]) == len(content["features"]["sha256"]) == 64
    assert content["reference"]["images"] == 11536


def test_files_paths_on_stdin_and_memory_give_the_same_number(cmtool):
    paths = cmtool("sample", "-c", "digits-cd", "--seeds", "0-49", "--out", "out")
    piped = value(cmtool("eval", "fid", "-", stdin=paths.out))
    implied = value(cmtool("eval", "fid", stdin=paths.out))
    folder = value(cmtool("eval", "fid", "out"))
    memory = value(cmtool("eval", "fid", "-c", "digits-cd", "--num", "50"))
    assert piped["value"] == implied["value"] == folder["value"]
    assert memory["value"] == pytest.approx(folder["value"], rel=1e-9)


def test_a_threshold_is_an_exit_code(cmtool):
    result = cmtool("eval", "fid", "digits:held-out", "--fail-above", "0.001")
    assert result.code == 8
    assert json.loads(result.text)["value"] > 0.001
    assert cmtool("eval", "fid", "digits:held-out", "--fail-above", "1000").code == 0


def test_real_digits_are_nearer_than_noise_and_the_models_nearer_still(cmtool):
    real = value(cmtool("eval", "fid", "digits:held-out"))["value"]
    one = value(cmtool("eval", "fid", "-c", "digits-cd"))["value"]
    two = value(cmtool("eval", "fid", "-c", "digits-cd", "--steps", "2"))["value"]
    blur = value(cmtool("eval", "fid", "-c", "digits-edm", "--steps", "1"))["value"]
    assert max(real, one, two) < 8
    assert blur > 50
