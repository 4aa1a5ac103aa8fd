"""The Tab key: names of ours and runs of the user's, by no import of torch, and never an error."""

import os
import subprocess
import sys

import pytest

from cmtool.cli import _completion
from cmtool.core.distances import DISTANCES
from cmtool.core.samplers import SAMPLERS
from cmtool.data.datasets import DATASETS
from cmtool.docs import titles
from cmtool.evaluation.features import PROTOCOLS
from cmtool.evaluation.metrics import METRICS
from cmtool.models import BUNDLED
from cmtool.presets.toml import preset_names


@pytest.fixture
def tab(cmtool, monkeypatch):
    """What is offered where a line ends, in bash."""

    def press(*words):
        monkeypatch.setenv("_CMTOOL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["cmtool", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        result = cmtool()
        assert (result.code, result.err) == (0, "")
        return result.text.split()

    return press


def make_run(folder, preset="", status="{}"):
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(status)
    (folder / "preset.toml").write_text(preset)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sam"], ["sample"]),
        (["runs", ""], ["list", "compare"]),
        (["eval", "f"], ["fid"]),
        (["sample", "--sampler", ""], list(SAMPLERS)),
        (["sample", "--sampler", "dpm"], [name for name in SAMPLERS if name.startswith("dpm")]),
        (["sample", "--preset", "cifar10-c"],
         [name for name in preset_names() if name.startswith("cifar10-c")]),
        (["eval", "fid", "--protocol", ""], list(PROTOCOLS)),
        (["eval", "fid", "--reference", ""], list(DATASETS)),
        (["edit", "inpaint", "--device", "c"], ["cpu", "cuda"]),
        (["sample", "--precision", ""], ["auto", "fp32", "bf16", "fp16"]),
        (["explain", "e"], [topic for topic in titles() if topic.startswith("e")]),
        (["sample", "--class", ""], list("0123456789")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_names_of_ours_are_offered(tab, words, expected):
    assert tab(*words) == expected


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [("core/samplers.py", "SAMPLERS", SAMPLERS), ("core/distances.py", "DISTANCES", DISTANCES),
     ("evaluation/features.py", "PROTOCOLS", PROTOCOLS),
     ("evaluation/metrics.py", "METRICS", METRICS),
     ("data/datasets.py", "DATASETS", DATASETS), ("models.py", "BUNDLED", BUNDLED)],
)  # fmt: skip
def test_a_registry_is_read_without_importing_it(file, name, expected):
    assert _completion.registry(file, name) == list(expected)


@pytest.mark.parametrize("words", [["sample", "-c"], ["checkpoint", "info"], ["search", "-c"]])
def test_runs_and_bundled_models_are_offered(tab, tmp_path, words):
    make_run(tmp_path / "runs/mine")
    make_run(tmp_path / "x/other")
    (tmp_path / "runs/no-run").mkdir()
    assert tab(*words, "") == [*BUNDLED, "runs/mine"]
    assert tab(*words, "runs/m") == ["runs/mine"]
    assert tab(*words, "x/") == ["x/other"]
    assert tab(*words, str(tmp_path / "x/")) == []
    assert tab(*words, f"{tmp_path}/x/") == [f"{tmp_path}/x/other"]
    assert tab("runs", "compare", "runs/mine", "") == ["runs/mine"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_that_a_shell_would_run_are_not_offered(cmtool, monkeypatch, tmp_path, shell):
    """zsh evaluates what Typer gives it, and a backslash undoes Typer's own before a dollar."""
    for name in ("x\\$(touch pwned)", "x`touch pwned`", "x$HOME", "x';touch pwned;'", 'x"', "x;y",
                 "x\ny", "x\x1b[2J", "x*", "x|y", "x<y"):  # fmt: skip
        make_run(tmp_path / "runs" / name)
    make_run(tmp_path / "runs/xäöü-1.5")
    for key, value in {"_CMTOOL_COMPLETE": f"complete_{shell}", "COMP_CWORD": "3",
                       "COMP_WORDS": "cmtool sample -c runs/x",
                       "_TYPER_COMPLETE_ARGS": "cmtool sample -c runs/x",
                       "_TYPER_COMPLETE_FISH_ACTION": "get-args"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    told = cmtool()
    assert "runs/xäöü-1.5" in told.text
    assert not {*"\\$`;|<\x1b"} & {*told.text}
    assert "touch" not in told.text


def test_classes_are_those_of_the_run_that_is_named(tab, tmp_path):
    make_run(tmp_path / "runs/a", "[model]\nnum_classes = 3\n")
    make_run(tmp_path / "runs/many", "[model]\nnum_classes = 1000\n")
    assert tab("sample", "-c", "runs/a", "--class", "") == ["0", "1", "2"]
    assert len(tab("sample", "-c", "runs/many", "--class", "")) == _completion.MOST


@pytest.mark.parametrize("preset", ["", "[model", "[model]\nnum_classes = 'x'\n"])
def test_what_cannot_be_read_offers_nothing(tab, tmp_path, preset):
    make_run(tmp_path / "runs/a", preset)
    assert tab("sample", "-c", "runs/a", "--class", "") == []
    assert tab("sample", "-c", "nowhere", "--class", "") == []
    assert _completion.runs(None, "\0/") == []


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tab, tmp_path):
    make_run(tmp_path / "runs/a")
    for name in ("preset.toml", "status.json"):
        (tmp_path / "runs/a" / name).unlink()
        os.mkfifo(tmp_path / "runs/a" / name)
    assert tab("sample", "-c", "runs/a", "--class", "") == []
    assert tab("sample", "-c", "runs/") == []


def test_the_key_imports_no_torch(tmp_path):
    make_run(tmp_path / "runs/mine")
    line = "cmtool sample -c "
    script = (
        "import sys\nfrom cmtool.cli import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    about = {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | about, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == [*BUNDLED, "runs/mine"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_for_cmtool_however_it_was_started(tmp_path, shell):
    detection = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "cmtool", "--show-completion", shell], timeout=60,
        capture_output=True, text=True, check=True, env=os.environ | detection,
    )  # fmt: skip
    assert "_CMTOOL_COMPLETE" in result.stdout
    assert "python" not in result.stdout
