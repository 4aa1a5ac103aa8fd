"""Hints are true: the commands, options and keys in them exist, and following one helps."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.main import get_command

import cmtool as package
from cmtool.cli import build_app
from cmtool.cli._usage import HABITS
from cmtool.core.paths import SOURCES
from cmtool.data.drawing import png_bytes
from cmtool.presets.toml import _known
from tests.cli.conftest import TINY, cmtool  # noqa: F401  # a fixture

ROOT = Path(package.__file__).parent
OF_PATHS = inspect.signature(SOURCES["paths"]).parameters
ELSEWHERE = {"--nproc-per-node", "--help", "--hard-dereference"}


def hints():
    """Every string in an error or a hint of the package, with {} for what is filled in."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
            is_hint = isinstance(node, ast.Assign | ast.AugAssign) and any(
                getattr(name, "id", "") in ("hint", "remedy", "what")
                for name in getattr(node, "targets", None) or [node.target]
            )
            parts = node.args if is_error else [node.value] if is_hint else []
            for part in parts:
                for text in filter(None, map(words_of, ast.walk(part))):
                    yield pytest.param(text, id=f"{file.stem}: {text[:60]}")


def words_of(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def commands(group, name=""):
    """Every command with its options."""
    for word in group.list_commands(None):
        command = group.get_command(None, word)
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{word} ")
        options = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
        yield f"{name}{word}", options


COMMANDS = dict(commands(get_command(build_app())))
OPTIONS = set().union(*COMMANDS.values(), ELSEWHERE)
HINTS = list(dict.fromkeys(hint.values[0] for hint in hints()))


def test_hints_are_found():
    assert len(HINTS) > 500
    assert any("--accumulate {}" in hint for hint in HINTS)


@pytest.mark.parametrize("text", [t for t in HINTS if "--" in t])
def test_options_in_hints_exist(text):
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert option in OPTIONS, option


@pytest.mark.parametrize("text", [t for t in HINTS if re.search(r"--set [\w.]+=", t)])
def test_keys_in_hints_exist(text):
    options = {f"model.network.{name}": 0 for name in ("model_channels", "augment_dim", "dropout")}
    known = {*_known(options), *options, "kind", *(f"loss.source.{key}" for key in OF_PATHS)}
    for key in re.findall(r"--set ([\w.]+)=", text):
        assert key in known, key


@pytest.mark.parametrize("text", [t for t in HINTS if re.search(r"\bcmtool [a-z]+", t)])
def test_commands_in_hints_exist(text):
    names = {name.split()[0] for name in COMMANDS}
    for words in re.findall(r"\bcmtool ((?:[a-z]+ ?){1,2})", text):
        first = words.split()[0]
        prose = first in ("and", "knows", "reads", "writes", "decodes")
        assert first in names or prose, words


@pytest.mark.parametrize("option", HABITS)
def test_what_a_habit_becomes_exists(option):
    for meant in HABITS[option]:
        words = meant("8")
        assert words[0] in OPTIONS
        if words[0] == "--set":
            assert words[1].partition("=")[0] in _known({})


def write(folder, names, side=8):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((side, side, 3), 40 * index, np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def place(tmp_path):
    """A folder with what the commands below meet."""
    write(tmp_path / "mixed", ["a.png", "b.png"])
    write(tmp_path / "mixed", ["c.png"], side=12)
    write(tmp_path / "pets", ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"])
    write(tmp_path / "bad", ["a.png", "b.png"])
    (tmp_path / "bad" / "b.png").write_bytes(b"no picture")
    write(tmp_path, ["large.png"], side=20)
    pictures = [(tmp_path / "mixed/a.png").read_bytes()]
    parquet.write_table(pa.table({"a": pictures, "b": pictures}), tmp_path / "two.parquet")
    (tmp_path / "digit.png").write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    return tmp_path


def followed(arguments, hint):
    """The command line that a hint tells to type: one that it names, or options to add."""
    if command := re.search(r"\bcmtool (?:(?!\. )[^;])+", hint):
        return shlex.split(command[0].split(", then")[0].rstrip("."))[1:]
    hint = re.sub(r"another --[\w-]+,? or ", "", hint)
    added = re.findall(r"--[\w-]+(?: (?!or |and |to )[^\s,;:]+)?", hint)
    assert added, hint
    first = [word for part in added[:1] for word in shlex.split(part)]
    return [*arguments, *first]


SMALL = ["--device", "cpu", "--set", "train.steps=1", "--set", "train.batch=2"]
DRY = ["--dry-run"]
MET = {
    "a preset of the other command": ["train", "--preset", "digits-cd", *DRY],
    "and the other way": ["distill", "--preset", "digits-edm", *DRY],
    "another tool's option": ["train", "--lr", "1e-3", *DRY],
    "another tool's number": ["sample", "-c", "digits-cd", "--num", "2", "--out", "o"],
    "another tool's batch": ["train", "--batch", "16", *DRY],
    "a key of another table": ["train", "--set", "loss.target=ema", *DRY],
    "warps": ["train", "--set", "data.augment=0.1", *DRY],
    "a kind": ["train", "--set", "kind=consistency", *DRY],
    "a second set": ["eval", "fid", "digits", "digits:held-out"],
    "bad images": ["data", "info", "bad"],
    "bad images in the way": ["data", "prepare", "bad", "x.zip"],
    "images of two sizes": ["data", "prepare", "mixed", "x.zip"],
    "a large picture": ["edit", "inpaint", "large.png", "--box", "1,1,2,2", "--out", "o.png",
                        "-c", "digits-cd"],
    "a file in the way": ["edit", "colorize", "digit.png", "--out", "digit.png", "-c", "digits-cd"],
    "classes": ["train", "--preset", "digits-edm", "--data", "pets", "--out", "r", *SMALL, *TINY],
    "a preset in the way": ["preset", "new", "--data", "pets", "--out", "e.toml"],
    "columns of images": ["data", "info", "two.parquet"],
    "names without a prefix": ["data", "info", "mixed", "--labels", "prefix"],
    "no images": ["train", "--preset", "edm"],
}  # fmt: skip


@pytest.mark.parametrize("name", MET)
def test_following_a_hint_helps(name, cmtool, place):  # noqa: F811
    (place / "e.toml").write_text("")
    arguments = MET[name]
    refused = cmtool(*arguments)
    assert refused.code in (2, 3, 5), refused.err
    (hint,) = (line for line in refused.err.splitlines() if line.startswith("hint: "))
    line = followed(arguments, hint.removeprefix("hint: "))
    if line[0] in ("distill", "train"):
        line = [word.replace("DIR", "pets") for word in line] + DRY * ("--dry-run" not in line)
    helped = cmtool(*line)
    assert helped.code == 0, (line, helped.err)
