import json

import numpy as np
import pytest

from cmtool.core.images import read_image
from tests.published import write_detector

HELD_OUT = ["--reference", "digits:held-out"]


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
    assert content["classes"] == "drawn from the seeds"


def test_bf16_moves_a_model_by_less_than_a_percent_and_is_on_record(cmtool):
    model = ["eval", "fid", "-c", "digits-cd", "--device", "cpu"]
    full, half = (value(cmtool(*model, "--precision", p)) for p in ("fp32", "bf16"))
    assert (full["model"]["precision"], half["model"]["precision"]) == ("fp32", "bf16")
    assert half["value"] != full["value"]
    assert half["value"] == pytest.approx(full["value"], rel=0.01)  # 0.0004


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


@pytest.fixture
def sets(cmtool, tmp_path):
    """The same 40 images as a folder, a zip, an npz, and their paths in two orders."""
    base = ["sample", "-c", "digits-cd", "--seeds", "0-39", "--out"]
    listed = cmtool(*base, "folder").out
    for name in ("set.zip", "set.npz"):
        assert cmtool(*base, name).code == 0
    lines = listed.splitlines()
    return listed, b"\n".join(lines[::-3] + [line for line in lines if line not in lines[::-3]])


def test_one_set_has_one_number_however_it_comes(cmtool, sets):
    listed, shuffled = sets
    found = [
        value(cmtool("eval", "all", *given, "--batch", batch, *HELD_OUT, stdin=stdin))
        for given, batch, stdin in [
            (["folder"], "256", b""),
            (["folder"], "7", b""),
            (["set.zip"], "16", b""),
            (["set.npz"], "256", b""),
            (["-"], "256", listed),
            (["-"], "9", shuffled),
            (["-c", "digits-cd", "--num", "40"], "13", b""),
        ]
    ]
    for other in found[1:]:
        assert other["value"] == found[0]["value"]
        assert other["standard_error"] == found[0]["standard_error"]
    marks = {(each.get("images") or each)["fingerprint"] for each in found}
    assert len(marks) == 1
    assert set(found[0]["value"]) == {"fid", "kid", "is", "precision", "recall"}


@pytest.mark.parametrize("metric", ["fid", "kid", "is", "pr"])
def test_a_metric_alone_is_the_one_of_all(cmtool, sets, metric):
    options = ["--protocol", "digits", "--workers", "0"]
    every = value(cmtool("eval", "all", "set.npz", *HELD_OUT, *options))["value"]
    compared = [] if metric == "is" else HELD_OUT
    alone = value(cmtool("eval", metric, "set.npz", *compared, *options))["value"]
    expected = {name: every[name] for name in ("precision", "recall")}
    assert alone == (expected if metric == "pr" else every[metric])


def test_a_set_against_itself(cmtool, sets):
    content = value(
        cmtool("eval", "all", "set.zip", "--reference", "folder", "--protocol", "digits")
    )
    assert content["value"]["fid"] == pytest.approx(0, abs=1e-6)
    assert content["value"]["precision"] == content["value"]["recall"] == 1
    assert content["images"]["fingerprint"] == content["reference"]["fingerprint"]


def test_statistics_of_a_set_stand_for_it(cmtool, sets):
    made = cmtool("eval", "reference", "set.zip", "-o", "stats/ref.npz", "--protocol", "digits")
    assert made.text == "stats/ref.npz\n"
    whole = cmtool(
        "eval", "reference", "set.npz", "-o", "rows.npz", "--protocol", "digits", "--keep-features"
    )
    assert whole.code == 0
    drawn = ["-c", "digits-edm", "--num", "30", "--steps", "4"]
    direct = value(cmtool("eval", "all", *drawn, "--reference", "folder", "--protocol", "digits"))
    for reference, metric in [("stats/ref.npz", "fid"), ("rows.npz", "fid"), ("rows.npz", "kid")]:
        stored = value(cmtool("eval", metric, *drawn, "--reference", reference))
        assert stored["value"] == direct["value"][metric]
        assert stored["protocol"] == "digits"  # which the file says
        assert stored["reference"]["images"] == 40
    kid = value(cmtool("eval", "kid", *drawn, "--reference", "rows.npz"))
    assert kid["settings"] == {"subsets": 100, "size": 1000, "seed": 0}
    some = value(cmtool("eval", "fid", *drawn, *HELD_OUT, "--reference-num", "500"))
    assert some["reference"]["images"] == 500
    refused = cmtool("eval", "kid", *drawn, "--reference", "stats/ref.npz")
    assert refused.code == 3
    assert "holds mu and sigma only" in refused.err
    assert "--keep-features" in refused.err
    again = cmtool("eval", "reference", "set.zip", "-o", "rows.npz", "--protocol", "digits")
    assert again.code == 2
    assert "--overwrite" in again.err


def test_runs_give_the_least_value_and_their_spread(cmtool):
    drawn = ["eval", "fid", "-c", "digits-cd", "--num", "64"]
    content = value(cmtool(*drawn, "--runs", "3"))
    each = [value(cmtool(*drawn, "--first-seed", first))["value"] for first in (0, 64, 128)]
    assert content["runs"] == each
    assert content["value"] == min(each)
    assert content["value_is"] == "minimum of 3 runs"
    assert content["spread"] > 0
    assert content["seeds"] == "0-191"
    assert cmtool("eval", "fid", "digits", "--runs", "2").code == 2


def test_few_images_are_told(cmtool, sets):
    result = cmtool("eval", "fid", "folder")
    content = value(result)
    assert content["rank_deficient"]
    assert content["proxy"]
    assert "40 images are no more than the 64 features" in result.err


def test_thresholds_go_both_ways(cmtool, sets):
    score = ["eval", "is", "set.npz", "--protocol", "digits"]
    assert cmtool(*score, "--fail-below", "9.9").code == 8
    assert cmtool(*score, "--fail-below", "1.1").code == 0
    assert cmtool("eval", "pr", "set.npz", "--fail-above", "1").code == 2
    assert cmtool(*score, "--reference", "digits").code == 2


def test_what_cannot_be_evaluated_is_named(cmtool, sets, tmp_path):
    folder = tmp_path / "folder"
    names = sorted(folder.iterdir())
    names[20].write_bytes(names[20].read_bytes()[:40])  # damaged, in the midst
    damaged = cmtool("eval", "fid", "folder")
    assert damaged.code == 3
    assert damaged.out == b""
    assert names[20].name in damaged.err
    names[20].unlink()
    assert cmtool("sample", "-c", "digits-cd", "--seeds", "0", "--out", "grid.png").code == 0
    names[20].write_bytes((tmp_path / "grid.png").read_bytes())
    mixed = cmtool("eval", "fid", "folder")
    assert mixed.code == 3
    assert f"{names[20].name} is 60x60" in mixed.err
    (tmp_path / "empty").mkdir()
    empty = cmtool("eval", "fid", "empty")
    assert (empty.code, "no images in empty" in empty.err) == (3, True)
    alone = cmtool("eval", "fid", names[0])
    assert (alone.code, "1 image to evaluate" in alone.err) == (3, True)
    gone = cmtool("eval", "fid", "-", stdin=b"folder/nowhere.png\n")
    assert (gone.code, "nowhere.png cannot be read" in gone.err) == (3, True)


def test_what_cannot_be_compared_with_is_named(cmtool, sets, tmp_path):
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    fid = ["eval", "fid", "set.npz", "--protocol", "digits", "--reference"]
    wide = cmtool(*fid, "wide.npz")
    assert (wide.code, "has 2048 features an image" in wide.err) == (3, True)
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    assert "not finite" in cmtool(*fid, "nan.npz").err
    np.savez(tmp_path / "cifar10_clean_train_32.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "--protocol clean" in cmtool(*fid, "cifar10_clean_train_32.npz").err
    about = json.dumps({"protocol": "clean", "features": {"name": "digits-features"}})
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), about=np.array(about))
    other = cmtool(*fid, "other.npz")
    assert (other.code, "was made with resize None" in other.err) == (3, True)


def test_without_the_weights_eval_ends_before_it_samples(cmtool, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = cmtool("eval", "fid", "-c", "digits-cd", "--reference", "ref.npz")
    assert result.code == 4
    assert result.out == b""
    assert "inception-2015-12-05.pt is not there" in result.err
    assert str(tmp_path / "cache" / "weights") in result.err
    cut = tmp_path / "inception-2015-12-05.pt"  # where clean-fid leaves a download cut short
    cut.write_bytes(b"0" * 1000)
    result = cmtool("eval", "fid", "-c", "digits-cd", "--reference", "ref.npz")
    assert (result.code, "is not the published" in result.err) == (4, True)
    assert cmtool("eval", "fid", "digits", "--protocol", "tf").code == 2
    assert (
        cmtool("eval", "fid", "digits", "--feature-precision", "fp8", "--protocol", "edm").code == 2
    )


def test_inception_protocols_differ_by_their_resize_alone(cmtool, sets, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    write_detector(path)
    options = ["--num", "6", "--feature-weights", path, "--trust"]

    def evaluate(protocol, reference="digits:held-out"):
        # few images: what counts is that each protocol is carried through
        small = ["--reference", reference, "--protocol", protocol, *options]
        return value(cmtool("eval", "kid", "set.npz", *small))

    made = cmtool(
        "eval", "reference", "digits", "-o", "edm.npz", "--protocol", "edm", "--keep-features",
        *options,
    )  # fmt: skip
    assert made.code == 0
    edm, adm = (evaluate(protocol, "edm.npz") for protocol in ("edm", "adm"))
    assert edm["value"] == adm["value"]
    assert edm["features"]["resize"] == "tf"
    assert len(edm["features"]["sha256"]) == 64
    assert edm["proxy"]
    mixed = cmtool(
        "eval", "kid", "set.npz", "--reference", "edm.npz", "--protocol", "clean", *options
    )
    assert (mixed.code, "--protocol edm" in mixed.err) == (3, True)


def test_consistency_is_a_table_a_plot_and_an_object(cmtool, tmp_path):
    small = ["--num", "4", "--levels", "3", "--substeps", "2"]
    result = cmtool("eval", "consistency", "-c", "digits-cd", "--plot", "c.png", *small)
    content = value(result)
    assert [len(content["levels"]), content["num_images"]] == [3, 4]
    first = content["levels"][0]
    assert first["sigma"] == 80
    assert 0 < first["end"] < first["teacher"]
    assert "f to end" in result.err
    assert read_image(tmp_path / "c.png").shape[0] == 3
    assert cmtool("eval", "consistency", "--plot", "c.png", *small).code == 2
    assert cmtool("eval", "consistency", "-c", "digits-edm", *small).code == 3
    assert cmtool("eval", "consistency", "--plot", "c.txt", *small).code == 2
