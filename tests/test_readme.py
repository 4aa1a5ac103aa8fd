"""The README is true: its commands parse, its files exist, its set-up is what CI runs."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from cmtool.cli import app
from cmtool.presets.toml import FOLDER, preset_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def commands():
    for line in "\n".join(BLOCKS).splitlines():
        for part in re.split(r"&&|\||>", line):
            words = shlex.split(part)
            if words and words[0] == "cmtool":
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_parses(words):
    group = get_command(app)
    context = group.make_context("cmtool", list(words), resilient_parsing=False)
    while hasattr(group, "commands"):
        name, group, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = group.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    "setup", [README.split("```sh\n")[1].split("\n")[0], "pip install '.[test]'"]
)
def test_set_up_is_what_ci_runs(setup):
    assert setup in README
    script = (ROOT / ".ci/run").read_text()
    for part in setup.split(" && "):
        assert part in script


def test_the_first_command_is_the_tour():
    assert BLOCKS[0] == "pip install . && cmtool demo\n"


def test_files_and_folders_it_names_exist():
    for name in re.findall(r"`(cmtool/[\w./]+|\.ci/run)`|\]\((\.github/[\w./]+)\)", README):
        path = next(filter(None, name))
        assert (ROOT / path).exists(), path


def test_presets_it_names_exist():
    for name in re.findall(r"--preset (\S+)", README):
        assert name in preset_names()


def test_every_command_is_in_the_readme_and_has_help():
    group = get_command(app)
    for name, command in group.commands.items():
        assert f"cmtool {name}" in README
        assert command.help


def test_presets_ship_with_the_package():
    assert FOLDER.is_dir()
    assert 'presets = "cmtool/_presets"' in (ROOT / "pyproject.toml").read_text()
