"""README and pages are true: commands parse; the files, names and presets they name exist."""

import fnmatch
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from cmtool.cli import build_app
from cmtool.docs import FOLDER as PAGES
from cmtool.docs import page, titles
from cmtool.presets.toml import preset_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(PAGES.glob("*.md"))]
DATA_SETS = "digits|cifar10|imagenet64|bedroom256|cat256|ffhq64|afhq64"


def found(pattern):
    """Each distinct match of a pattern in README and pages, with its file, as parameters."""
    return [
        pytest.param(file, match, id=f"{file.stem}: {match}")
        for file in FILES
        for match in dict.fromkeys(re.findall(pattern, file.read_text()))
    ]


def blocks(language, files=FILES):
    """The blocks of code of a language."""
    pattern = rf"```{language}\n(.*?)```"
    return [b for file in files for b in re.findall(pattern, file.read_text(), re.DOTALL)]


def commands():
    """The words after `cmtool` of every command, whoever starts it."""
    for line in "".join(blocks("sh")).splitlines():
        for part in re.split(r"&&|\||>", line):
            words = shlex.split(part)
            if words[:1] == ["torchrun"]:
                words = words[words.index("cmtool") :]
            if words[:1] == ["cmtool"]:
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_parses(words):
    parse_words(words)


def parse(line):
    """Parse a line as someone would type it, which begins with cmtool."""
    program, *words = shlex.split(line)
    assert program == "cmtool"
    parse_words(words)


def parse_words(words):
    """Parse what stands after `cmtool`, without running it."""
    group = get_command(build_app())
    context = group.make_context("cmtool", list(words), resilient_parsing=False)
    while hasattr(group, "commands"):
        name, group, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = group.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    "file", [file for file in FILES if blocks("python", [file])], ids=lambda file: file.stem
)
def test_the_python_of_a_page_runs(file):
    exec("".join(blocks("python", [file])), {})


@pytest.mark.parametrize(
    "setup", [README.split("```sh\n")[1].split("\n")[0], "pip install '.[test]'"]
)
def test_set_up_is_what_ci_runs(setup):
    assert setup in README
    script = (ROOT / ".ci/run").read_text()
    for part in setup.split(" && "):
        assert part in script


def test_the_first_command_is_the_tour():
    assert blocks("sh")[0] == "pip install . && cmtool demo\n"


@pytest.mark.parametrize(
    ("file", "name"), found(r"(?m)(?:`|^)((?:cmtool|tests|\.ci|\.github)/[\w./-]+(?::\w+)?)(?:`| )")
)
def test_files_and_what_is_named_in_them_exist(file, name):
    path, _, thing = name.partition(":")
    assert (ROOT / path).exists()
    if thing:
        written = rf"^(?:def|class) {thing}\b|^{thing}\b.* ="
        assert re.search(written, (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize(("file", "target"), found(r"\]\((?!https?:)([^)]+)\)"))
def test_links_lead_somewhere(file, target):
    assert (file.parent / target).exists()


@pytest.mark.parametrize(
    ("file", "name"), found(rf"--preset ([\w-]+)|`((?:{DATA_SETS}|\*)-[\w*-]+)`")
)
def test_presets_that_are_named_exist(file, name):
    assert fnmatch.filter(preset_names(), "".join(name))


@pytest.mark.parametrize("command", get_command(build_app()).commands)
def test_every_command_is_in_the_readme_and_has_help(command):
    assert f"cmtool {command}" in README
    assert get_command(build_app()).commands[command].help


@pytest.mark.parametrize("topic", titles())
def test_a_page_has_a_title_and_a_page_of_words(topic):
    assert page(topic).startswith("# ")
    assert 250 <= len(page(topic).split()) <= 620


def test_every_page_is_linked_from_the_readme():
    assert [topic for topic in titles() if f"(cmtool/docs/{topic}.md)" not in README] == []
