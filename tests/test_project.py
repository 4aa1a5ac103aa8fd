"""What surrounds the package agrees with it: metadata, workflows, what the wheel takes along."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CI = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
YAML = [ROOT / "CITATION.cff", *sorted((ROOT / ".github").rglob("*.yml"))]


def script(job):
    """The commands of a job of the CI, one a line."""
    return [step["run"] for step in CI["jobs"][job]["steps"] if "run" in step]


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_files_are_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_may_read_and_no_more_unless_it_publishes(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    more = {
        name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
    }
    assert more == ({"publish": {"id-token": "write"}} if file.name == "release.yml" else {})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_ci_has_the_oldest_torch_that_is_allowed():
    allowed = " ".join(PROJECT["project"]["dependencies"])
    rows = CI["jobs"]["fast"]["strategy"]["matrix"]["include"]
    oldest = {
        name: version for row in rows for name, version in re.findall(r"(\w+)==(\S+)", row["torch"])
    }
    assert set(oldest) == {"torch", "torchvision"}
    for name, version in oldest.items():
        assert f"{name}>={version.removesuffix('.0')}" in allowed


def test_ci_runs_both_ends_of_the_supported_pythons():
    rows = CI["jobs"]["fast"]["strategy"]["matrix"]["include"]
    named = [c.split()[-1] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
    assert [row["python"] for row in rows] == [named[0], named[-1]]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_ci_runs_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert script("newcomer")[0] in readme
    for job in ("fast", "slow"):
        install, *tests = script(job)
        for test in tests:
            assert f"{install.split(' $')[0]} && {test.split(' -')[0]}" in readme


def test_typed_pages_and_presets_are_in_the_package():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["cmtool"]
    assert wheel["force-include"] == {"presets": "cmtool/_presets"}
    assert (ROOT / "cmtool/py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
