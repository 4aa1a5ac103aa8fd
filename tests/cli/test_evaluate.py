import json
import os
import statistics
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cmtool.cli._watching import ticker
from cmtool.core.rng import seeded_labels
from cmtool.data.datasets import load_dataset
from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
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


def lopsided(folder, counts):
    """Write digits in a folder a class, so many of each."""
    data = load_dataset("digits")
    for label, count in enumerate(counts):
        (folder / str(label)).mkdir(parents=True)
        for i, image in enumerate(data.images[data.labels == label][:count]):
            (folder / str(label) / f"{i}.png").write_bytes(png_bytes(image))


def test_classes_come_as_often_as_the_reference_has_them(cmtool, tmp_path):
    lopsided(tmp_path / "data", [90, 10, *[1] * 8])
    asked = ["eval", "fid", "-c", "digits-cd", "--num", "60", "--reference", "data", "--protocol",
             "pixels", "--classes"]  # fmt: skip
    content, uniform = (value(cmtool(*asked, how)) for how in ("reference", "uniform"))
    assert content["classes"] == "drawn from the seeds, as often as in the reference"
    assert content["value"] < uniform["value"] / 2
    shares = [count / 108 for count in (90, 10, *[1] * 8)]
    labels = seeded_labels(range(60), 10, shares).tolist()
    assert labels.count(0) > 40
    for label in set(labels):
        seeds = ",".join(str(seed) for seed in range(60) if labels[seed] == label)
        drawn = cmtool("sample", "-c", "digits-cd", "--class", str(label), "--seeds", seeds,
                       "--out", f"drawn/{label}")  # fmt: skip
        assert drawn.code == 0, drawn.err
    folder = value(cmtool("eval", "fid", "drawn", *asked[6:-1]))
    assert folder["value"] == pytest.approx(content["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", "digits-cd", "--reference", "emoji"], "emoji has 9 classes, and the model 10"),
        (["-c", "digits-cd", "--reference", "flat"], "flat has 0 classes, and the model 10"),
        (["-c", "digits-cd", "--reference", "s.npz"], "holds no images with classes"),
        (["digits:held-out"], "says how a model draws, and images were given"),
    ],
)
def test_classes_need_a_reference_that_has_those_of_the_model(cmtool, tmp_path, options, message):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png_bytes(load_dataset("digits").images[i]))
    made = cmtool("eval", "reference", "digits:held-out", "--protocol", "pixels", "-o", "s.npz")
    assert made.code == 0, made.err
    result = cmtool("eval", "fid", *options, "--num", "8", "--protocol", "pixels", "--classes",
                    "reference")  # fmt: skip
    assert result.code in (2, 3)
    assert message in result.err
    assert "hint:" in result.err


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
    few = ["--num", "2048"]
    real = value(cmtool("eval", "fid", "digits:held-out"))["value"]
    one = value(cmtool("eval", "fid", "-c", "digits-cd", *few))["value"]
    two = value(cmtool("eval", "fid", "-c", "digits-cd", "--steps", "2", *few))["value"]
    blur = value(cmtool("eval", "fid", "-c", "digits-edm", "--steps", "1", *few))["value"]
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
    assert kid["settings"] == {"subsets": 100, "size": 30, "seed": 0}
    some = value(cmtool("eval", "fid", *drawn, *HELD_OUT, "--reference-num", "500"))
    assert some["reference"]["images"] == 500
    refused = cmtool("eval", "kid", *drawn, "--reference", "stats/ref.npz")
    assert refused.code == 3
    assert "holds mu and sigma only" in refused.err
    assert "--keep-features" in refused.err
    itself = cmtool("eval", "reference", "set.npz", "-o", "set.npz", "--overwrite")
    assert (itself.code, "is the data itself" in itself.err) == (2, True)
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
    assert content["mean"] == pytest.approx(statistics.fmean(each))
    assert content["spread"] == pytest.approx(statistics.stdev(each))
    assert content["seeds"] == "0-191"
    assert len(content["fingerprint"].split(",")) == 3
    assert cmtool("eval", "fid", "digits", "--runs", "2").code == 2
    scored = value(cmtool("eval", "is", *drawn[2:], "--protocol", "digits", "--runs", "2"))
    assert scored["value"] == pytest.approx(sum(scored["runs"]) / 2)
    assert scored["value_is"] == "mean of 2 runs"
    both = value(cmtool("eval", "pr", *drawn[2:], "--runs", "2"))
    for name, mean in both["value"].items():
        assert mean == pytest.approx(sum(run[name] for run in both["runs"]) / 2)


def test_few_images_are_told(cmtool, sets):
    result = cmtool("eval", "fid", "folder")
    content = value(result)
    assert content["rank_deficient"]
    assert content["proxy"]
    assert "40 images are no more than the 64 features" in result.err


def test_settings_are_those_that_were_used(cmtool, sets):
    result = cmtool("eval", "all", "set.npz", *HELD_OUT, "--num", "25")
    settings = value(result)["settings"]
    assert settings["kid"] == {"subsets": 100, "size": 25, "seed": 0}
    assert settings["is"] == {"split": 25}
    assert settings["pr"] == {"k": 3}
    assert "the subsets of KID have 25 images, not 1,000" in result.err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["folder", "a b.zip"], "cmtool eval fid folder --reference 'a b.zip'"),
        (["set.npz", "folder"], "cmtool eval fid set.npz --reference folder"),
        (["folder", "set.zip", "set.npz"], "give one folder, zip or npz"),
    ],
)
def test_a_second_set_is_no_image_and_the_hint_says_what_it_is(cmtool, sets, given, hint, tmp_path):
    (tmp_path / "set.zip").rename(tmp_path / "a b.zip")
    result = cmtool("eval", "fid", *given)
    assert result.code == 2
    assert "measures one set of images" in result.err
    assert hint in result.err


def test_thresholds_go_both_ways(cmtool, sets):
    score = ["eval", "is", "set.npz", "--protocol", "digits"]
    assert cmtool(*score, "--fail-below", "9.9").code == 8
    assert cmtool(*score, "--fail-below", "1.1").code == 0
    same = repr(value(cmtool(*score))["value"])
    assert cmtool(*score, "--fail-below", same, "--fail-above", same).code == 0
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


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "2"], ["--sigmas", "80"], ["--sampler", "heun"], ["--weights", "model"],
        ["--preset", "digits-cd"], ["--kind", "teacher"], ["--first-seed", "5"], ["--runs", "2"],
        ["--precision", "bf16"], ["--feature-weights", "x.pt"], ["--trust"],
        ["--feature-precision", "bf16"], ["--fail-above", "nan"], ["--fail-below", "nan"],
        ["--protocol", "vgg16"], ["--cross-check"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(cmtool, option):
    refused = cmtool("eval", "fid", "digits:held-out", "--workers", "0", *option)
    assert (refused.code, refused.out) == (2, b"")
    assert option[0] in refused.err or "nan" in refused.err


def test_statistics_have_no_number_of_images_to_choose(cmtool, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(64), sigma=np.eye(64))
    plain = ["--protocol", "digits", "--workers", "0"]
    for given in (
        ["fid", "adm.npz", "--num", "3"],
        ["fid", "digits:held-out", "--reference", "adm.npz", "--reference-num", "3"],
        ["all", "digits:held-out", "--reference", "adm.npz", "--reference-num", "5"],
        ["is", "digits:held-out", "--reference-num", "3"],
        ["reference", "adm.npz", "-o", "out.npz", "--num", "3"],
    ):
        assert cmtool("eval", *given, *plain).code == 2
    some = value(cmtool("eval", "kid", "adm.npz", "--num", "3", *HELD_OUT, *plain))
    assert some["num_images"] == 3  # of its images
    both = value(cmtool("eval", "all", "digits:held-out", "--reference", "adm.npz", *plain))
    assert (both["reference"]["images"], both["reference"]["single_images"]) == (None, 6)
    unsaid = value(cmtool("eval", "fid", "adm.npz", *HELD_OUT, *plain))
    assert (unsaid["num_images"], unsaid["proxy"]) == (None, None)


def test_one_size_is_asked_of_all_batches_and_workers(cmtool, tmp_path):
    for i in range(8):
        side = 8 if i < 4 else 9
        picture = torch.full((3, side, side), i * 9, dtype=torch.uint8)
        (tmp_path / f"{i}.png").write_bytes(png_bytes(picture))
    for workers in ("0", "2"):
        mixed = cmtool("eval", "fid", ".", "--batch", "4", "--workers", workers)
        assert (mixed.code, "4.png is 9x9 but ./0.png is 8x8" in mixed.err) == (3, True)
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    assert cmtool("eval", "fid", "none.npz").code == 3
    assert cmtool("eval", "fid", "").code == 3  # an empty variable is not this folder


def test_names_on_stdin_are_bytes_between_newlines(cmtool, tmp_path):
    names = [b"a\xe2\x80\xa8b.png", b"\xff \x0c.png"]  # a separator of Unicode's, and no UTF-8
    for i, name in enumerate(names):
        content = png_bytes(torch.full((3, 8, 8), i * 90, dtype=torch.uint8))
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    options = ["--workers", "0", "--json"]
    found = value(cmtool("eval", "fid", "-", *options, stdin=b"\r\n".join(names)))
    assert found["value"] == value(cmtool("eval", "fid", ".", *options))["value"]
    marked = b"\xef\xbb\xbf" + b"\n".join(names)  # as PowerShell writes a list
    assert value(cmtool("eval", "fid", "-", *options, stdin=marked))["value"] == found["value"]
    others = value(cmtool("eval", "fid", "digits", "--num", "2", *options))
    assert others["images"]["fingerprint"] != found["images"]["fingerprint"]


@pytest.fixture
def broken(tmp_path):
    """Return the path of a consistency model whose weights are NaN."""
    held = files("cmtool") / "assets" / "digits-cd.safetensors"
    with safe_open(held, "pt") as opened:
        about = opened.metadata()
    weights = {name: t * float("nan") for name, t in load_file(held).items()}
    save_file(weights, tmp_path / "nan.safetensors", about)
    return "nan.safetensors"


@pytest.mark.parametrize(
    "command",
    [
        "eval fid --num-images 2",
        "eval consistency --levels 2 --substeps 1 --num-images 2",
        "sample --seeds 0-1 --out made",
        "sample --seeds 0-1 --out made.zip",
        "sample --seeds 0-1 --out -",
        "edit denoise digit.png --sigma 0.5 -o made.png",
        "edit interpolate --seeds 1,2 -o made.png",
        "edit interpolate digit.png digit.png --sigmas 5,2 -o made.gif",
    ],
)
def test_a_model_that_makes_no_numbers_makes_no_picture_and_has_no_value(
    cmtool, tmp_path, broken, command
):
    digit = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    (tmp_path / "digit.png").write_bytes(png_bytes(digit))
    ended = cmtool(*command.split(), "-c", broken)
    assert (ended.code, ended.out) == (3, b"")
    assert "makes values that are not finite" in ended.err
    assert not [path for path in tmp_path.glob("made*") if path.is_file() or any(path.iterdir())]


def test_a_reference_that_says_how_it_was_made_is_believed_and_held_to_it(cmtool, tmp_path):
    made = ["eval", "reference", "digits:held-out", "--protocol", "digits", "-o"]
    assert cmtool(*made, "mine_clean_2.npz").code == 0  # a name like those of clean-fid
    fid = ["eval", "fid", "digits:held-out", "--reference"]
    assert value(cmtool(*fid, "mine_clean_2.npz"))["value"] == pytest.approx(0, abs=1e-6)
    stored = dict(np.load(tmp_path / "mine_clean_2.npz"))
    about = json.loads(str(stored["about"]))
    about["features"]["sha256"] = "0" * 64  # the same network of other weights
    np.savez(tmp_path / "other.npz", **{**stored, "about": np.array(json.dumps(about))})
    other = cmtool(*fid, "other.npz")
    assert (other.code, "was made with sha256" in other.err) == (3, True)


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
    for made in (None, 5, ["edm"], "fid"):  # no protocol that could be given
        about = json.dumps({"protocol": made, "features": {"name": [1]}})
        np.savez(tmp_path / "odd.npz", mu=np.zeros(64), sigma=np.eye(64), about=np.array(about))
        odd = cmtool(*fid, "odd.npz")
        assert (odd.code, "was made with name [1]" in odd.err) == (3, True)
        assert "hint: give its --feature-weights, or make it again" in odd.err
    np.savez(tmp_path / "named.npz", mean=np.zeros(64), cov=np.eye(64))
    assert "named.npz has no arr_0, but mean, cov" in cmtool(*fid, "named.npz").err


def test_without_the_weights_eval_ends_before_it_samples(cmtool, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = cmtool("eval", "fid", "-c", "digits-cd", "--reference", "ref.npz")
    assert result.code == 4
    assert result.out == b""
    assert "inception-2015-12-05.pt is missing" in result.err
    assert str(tmp_path / "cache" / "weights") in result.err
    checked = cmtool("eval", "fid", "digits", "--protocol", "clean", "--cross-check")
    assert (checked.code, "inception-2015-12-05.pt is missing" in checked.err) == (4, True)
    refused = cmtool("eval", "kid", "digits", "--protocol", "clean", "--cross-check")
    assert (refused.code, len(refused.err.splitlines())) == (2, 2)
    cut = tmp_path / "cache" / "weights" / "inception-2015-12-05.pt"
    cut.parent.mkdir(parents=True, exist_ok=True)
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


def test_a_pass_that_begins_after_a_long_one_has_a_rate_at_once(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = ticker()
    progress("reference", 5, 0)
    progress("drawn", 58, 0)
    assert capsys.readouterr().err == "drawn: 58 images, 2 a second\n"
