"""Presets that nobody would write: an error of two lines that names the key, or what is meant."""

import os
import re
import shlex
import time

import pytest

from cmtool.errors import InputError, UserError
from cmtool.presets.build import build_curriculum
from cmtool.presets.toml import load_preset, parse_override, resolve


def written(root, text, name="p.toml"):
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


ODD = {
    "nested arrays": "x = " + "[" * 50_000,
    "whole nested arrays": "x = " + "[" * 90 + "]" * 90,
    "nested tables": "x = " + "{ a = " * 5000 + "1" + " }" * 5000,
    "a long key": "a" + ".a" * 100_000 + " = 1",
    "deep tables": "".join(f"[{'.'.join(['a'] * n)}]\n" for n in range(1, 60)),
    "5,000 digits": "train.batch = " + "9" * 5000,
    "no UTF-8": b"description = '\xff'",
    "UTF-16": "extends = 'digits-cd'".encode("utf-16"),
    "UTF-32": "extends = 'digits-cd'".encode("utf-32"),
    "JSON": '{"extends": "digits-cd"}',
    "YAML": "extends: digits-cd\ntrain:\n  lr: 1",
    "INI": "[train]\nlr = 1e-4\nname = mine\n",
    "lines of old macOS": "extends = 'digits-cd'\rtrain.lr = 1\r",
    "a key twice": "extends = 'digits-cd'\ntrain.lr = 1\ntrain.lr = 2",
    "a list of tables": "extends = 'digits-cd'\n[[train]]\nlr = 1",
    "many keys": "extends = 'digits-cd'\n[train]\n" + "".join(f"k{i}=1\n" for i in range(30_000)),
    "many tables": "".join(f"[a.b{i}.c]\n" for i in range(30_000)),
    "a long quoted key": '"a' + '"."a' * 50_000 + '" = 1',
    "a list to extend": "extends = ['digits-cd', 'digits-ct']",
    "a page to extend": "extends = 'https://example.org/p.toml'",
    "a file of passwords": "extends = '../../../../../../../../etc/passwd'",
    "half a character": 'description = "\\ud800"',
    "a date": "extends = 'digits-cd'\ntrain.lr = 1979-05-27",
    "NUL": "extends = 'digits\0cd'",
    "a NUL in a name": "extends = 'digits\\u0000cd.toml'",
    "a name of a megabyte": f"extends = '{'x' * 900_000}'",
    "no name": "extends = ''",
    "a number": "extends = 5",
    "a table": "[extends]\na = 1",
    "nobody's home": "extends = '~no-such-user/p.toml'",
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_refused_at_once(tmp_path, kind):
    start = time.process_time()
    with pytest.raises((UserError, OSError)) as caught:
        load_preset(written(tmp_path, ODD[kind]))
    assert time.process_time() - start < 2
    assert getattr(caught.value, "hint", "the command line names the file")


def test_a_chain_and_a_circle_of_presets_end(tmp_path):
    for n in range(2000):
        written(tmp_path, f"extends = 'p{n + 1}'", f"p{n}.toml")
    with pytest.raises(UserError, match="extends more than 32 others"):
        load_preset(str(tmp_path / "p0.toml"))
    written(tmp_path, f"extends = '../{tmp_path.name}/p3'", "p4.toml")
    with pytest.raises(UserError, match="extends itself"):
        load_preset(str(tmp_path / "p0.toml"))
    for n in range(31):
        written(tmp_path, f"extends = 'p{n + 1}'", f"p{n}.toml")
    written(tmp_path, "extends = 'digits-edm'", "p30.toml")
    assert load_preset(str(tmp_path / "p0.toml")) == load_preset("digits-edm")


BEYOND = 10**20
NUMBERS = [
    ("train.batch", BEYOND), ("train.batch", (1 << 20) + 1), ("train.steps", BEYOND),
    ("train.seed", 1 << 63), ("train.accumulate", BEYOND), ("train.warmup_steps", 1e30),
    ("train.steps", "99999999999M"), ("train.batch", float("inf")), ("train.lr", float("inf")),
    ("train.lr", float("nan")), ("train.batch", float("nan")),
    ("train.max_grad_norm", float("inf")),
    ("model.channels", 2000), ("model.num_classes", BEYOND), ("model.image_size", [BEYOND, 8]),
    ("model.sigma_data", float("nan")), ("noise.rho", float("inf")), ("data.workers", BEYOND),
    ("data.timeout", float("inf")), ("run.keep", BEYOND), ("run.eval_num", BEYOND),
    ("run.log_every", BEYOND), ("sample.steps", BEYOND), ("sample.grid", BEYOND),
    ("loss.levels.mean", float("nan")), ("loss.curriculum.n", BEYOND), ("loss.levels.x", -BEYOND),
    ("model.network.channel_mult", [1, BEYOND]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=lambda v: str(v)[:20])
def test_a_number_beyond_use_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=key.rpartition(".")[2]) as caught:
        load_preset("digits-edm", {key: value})
    assert len(caught.value.what) < 500


def test_a_grid_has_at_most_a_million_levels():
    fits = load_preset("digits-cd", {"loss.curriculum.n": 1_000_000})
    build_curriculum(fits)
    for more in ({"loss.curriculum.n": 1_000_001},
                 {"loss.curriculum": {"name": "doubling", "s1": 1 << 24}}):  # fmt: skip
        with pytest.raises(UserError, match=r"loss\.curriculum = .* levels"):
            build_curriculum(load_preset("digits-cd", more))


def test_numbers_of_use_are_taken():
    values = {"train.seed": (1 << 63) - 1, "train.batch": 1 << 20, "train.steps": 10**9}
    preset = load_preset("digits-edm", {**values, "sample.sampler.s_max": float("inf")})
    assert (preset.train.seed, preset.train.steps) == ((1 << 63) - 1, 10**9)


@pytest.mark.parametrize(
    "text", [f"a={'[' * 50_000}", f"{'.'.join(['a'] * 500)}=1", f"a={'{b=' * 20}1{'}' * 20}"]
)
def test_overrides_are_flat(text):
    with pytest.raises(UserError, match=r"brackets in each other|nests") as caught:
        resolve("digits-edm", {"--set": dict([parse_override(text)])})
    assert len(caught.value.what) < 200


@pytest.mark.parametrize(
    ("text", "meant"),
    [("8", "[8,8]"), ("8x16", "[8,16]"), ("(8, 16)", "[8,16]"), ("8,16", "[8,16]"), ("", "[8,8]")],
)
def test_the_size_of_images_is_answered_with_a_list(text, meant):
    with pytest.raises(UserError, match=r"model\.image_size = ") as caught:
        resolve("digits-edm", {"--set": dict([parse_override(f"model.image_size={text}")])})
    override = caught.value.hint.rpartition("--set ")[2]
    assert override == f"model.image_size={meant}"
    resolve("digits-edm", {"--set": dict([parse_override(override)])})


def test_a_key_within_a_list_is_set_by_the_list():
    with pytest.raises(UserError, match=r"image_size\.0 = 99999") as caught:
        load_preset("digits-edm", {"model.image_size": [99999, 8]})
    assert "preset show edm model.image_size" in caught.value.hint


def test_an_override_of_two_lines_sets_one_key():
    """The second line was left out without a word."""
    assert parse_override("train.lr=1e-4\ntrain.steps=5")[1] == "1e-4\ntrain.steps=5"
    assert parse_override("train.lr=1e-4 # low") == ("train.lr", 1e-4)


def test_a_mark_of_windows_and_a_home_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, b"\xef\xbb\xbfextends = 'digits-edm'\r\n[train]\r\nbatch = 3\r\n")
    written(tmp_path, "extends = '~/p.toml'", "q.toml")
    assert load_preset("~/q.toml").train.batch == 3


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "p.toml"
    path.touch()
    os.truncate(path, 1 << 30)
    with pytest.raises(InputError, match="1,073,741,824 bytes"):
        load_preset(str(path))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("data.held_out", 2, r"^data\.held_out = 2: "),
        ("model.image_size", [8], "it must be two numbers"),
        ("train.ema", [{"rate": 0.9}], r"lacks 'train\.ema\.0\.name'$"),
        ("sample.levels", {"two": "80"}, r"^sample\.levels\.two = '80': "),
        ("noise.sigma_min", 99.0, r"^noise = .*: sigma_min must be less than sigma_max$"),
        ("train.ema", [{"name": "a"}], r"^train\.ema\.0 = .*: give one of rate"),
        ("loss.levels.mean", float("nan"), r"^loss\.levels = .*: mean is not a number$"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_an_error_names_a_key_and_a_reason_and_nothing_of_pydantic(key, value, what):
    with pytest.raises(UserError) as caught:
        load_preset("digits-edm", {key: value})
    assert re.search(what, caught.value.what)


def test_averages_to_store_that_there_are_not_are_told_without_the_whole_preset():
    with pytest.raises(UserError, match=r"^run\.ema_every stores .* there is none\n") as caught:
        load_preset("digits-edm", {"run.ema_every": 100})
    words = shlex.split(caught.value.hint.replace(", or ", " "))
    fixes = dict(map(parse_override, words[1::2]))
    assert fixes.keys() == {"run.ema_every", "train.ema"}
    for key, value in fixes.items():
        load_preset("digits-edm", {"run.ema_every": 100, key: value})
