import gc
import subprocess
import sys

import pytest
import torch  # noqa: F401  # it is imported, as far as the first test knows

from cmtool.cli._devices import importing_torch


def test_the_collector_works_on_where_torch_is_imported_already():
    gc.unfreeze()
    with importing_torch():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_rests_while_torch_is_imported(monkeypatch, fails):
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with importing_torch():
            assert not gc.isenabled()
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def ends(arguments, stdout, extra="pass"):
    """Return a process of the command that was installed, after it ended."""
    code = f"import atexit, sys, threading, cmtool.cli; {extra}; cmtool.cli.entry()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def test_a_process_that_ends_early_loses_no_output_and_tells_how_it_ended(tmp_path):
    out = tmp_path / "out"
    with out.open("w") as file:
        ended = ends(["--version"], file, "atexit.register(print, 'the last word')")
    assert ended.returncode == 0
    assert out.read_text().split("\n")[1:] == ["the last word", ""]
    assert ends(["sample", "--nothing"], subprocess.PIPE).returncode == 2
    with open("/dev/full", "w") as full:
        assert ends(["--version"], full).returncode not in (0, 1)


def test_a_process_waits_for_its_threads():
    late = "threading.Timer(0.3, lambda: print('late')).start()"
    assert "late" in ends(["--version"], subprocess.PIPE, late).stdout


def test_checkpoint_info_reads_a_file_with_its_imports_left_out_of_collections():
    """Files of 200,000 lists are refused in half of the time."""
    told = "atexit.register(lambda: print(__import__('gc').get_freeze_count()))"
    ended = ends(["checkpoint", "info", "/dev/null"], subprocess.PIPE, told)
    assert ended.returncode == 3
    assert int(ended.stdout) > 100_000
