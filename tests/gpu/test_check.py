"""The check of a real card, tried without one: in tiny sizes, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.check import __main__ as check
from tests.gpu.check import trial
from tests.gpu.check.__main__ import CHECKS, Row
from tests.gpu.check.trial import NotRun

ROOT = Path(__file__).parent.parent.parent
FOR_A_GPU = {"norm_kernel", "overflow", "memory", "compiled", "peers"}


def run(*words, prepare=""):
    """The script in a process of its own, on the CPU, as it is run on a card."""
    code = f"import sys; {prepare}\nfrom tests.gpu.check.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_check_runs_in_tiny_sizes(tmp_path):
    out = tmp_path / "check.json"
    done = run("--minutes", "30", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())["checks"]
    assert list(found) == list(CHECKS)
    ran = {name for name, result in found.items() if result["status"] in ("PASS", "INFO")}
    assert ran == set(CHECKS) - FOR_A_GPU
    for result in found.values():
        assert result["rows"]
        assert {row["status"] for row in result["rows"]} <= {"PASS", "INFO", "not run"}
        assert all(row["figure"] is not None for row in result["rows"])


def test_a_chosen_check_runs_and_the_others_are_told(tmp_path):
    out = tmp_path / "check.json"
    done = run("--only", "optimizers", "snapshot", "--skip", "snapshot", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["about"]["device"] == "cpu"
    assert found["checks"]["optimizers"]["status"] == "INFO"
    assert "INFO optimizers, ms for" in done.stdout
    others = {r["why"] for name, r in found["checks"].items() if name != "optimizers"}
    assert others == {"not asked for"}


def test_a_missing_package_is_named_and_its_checks_are_not_run():
    prepare = "sys.modules['typer'] = sys.modules['lpips'] = None"
    done = run("--only", "commands", "pictures", prepare=prepare)
    assert done.returncode == 0, done.stderr
    assert "missing: typer, for the checks: commands" in done.stdout
    assert 'not run the check: "typer is missing"' in done.stdout
    assert "PASS pictures of CPU and GPU" in done.stdout


@pytest.fixture
def calm(monkeypatch, tmp_path):
    """The script in this process, whose alarm belongs to the tests."""
    monkeypatch.setattr(check.signal, "alarm", lambda _: None)
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(check.warnings, "filterwarnings", lambda *_: None)

    def call(checks, *words):
        monkeypatch.setattr(check, "CHECKS", checks)
        out = tmp_path / "check.json"
        code = check.main(["--device", "cpu", "--tiny", "--out", str(out), *words])
        return code, json.loads(out.read_text())["checks"]

    return call


def good(trial):
    trial.say("it", True, 1.0)


def bad(trial):
    trial.say("it", True, 1.0)
    trial.say("it", False, 2.0)


def broken(trial):
    raise ZeroDivisionError("by zero")


def absent(trial):
    raise NotRun("nothing here")


def test_a_failure_is_exit_code_1_and_the_others_go_on(calm, capsys):
    rows = {"bad": Row(bad, 1), "broken": Row(broken, 1), "absent": Row(absent, 1),
            "good": Row(good, 1)}  # fmt: skip
    code, found = calm(rows)
    assert code == 1
    statuses = {name: result["status"] for name, result in found.items()}
    assert statuses == {"bad": "FAIL", "broken": "FAIL", "absent": "not run", "good": "PASS"}
    assert found["broken"]["rows"][-1]["figure"] == "ZeroDivisionError: by zero"
    assert "1 checks passed, 2 failed: bad, broken" in capsys.readouterr().out
    assert calm({"good": Row(good, 1)})[0] == 0


def test_what_the_time_does_not_allow_is_told_as_not_run(calm):
    code, found = calm({"good": Row(good, 1)}, "--minutes", "0")
    assert code == 0
    assert found["good"] == {"status": "not run", "why": "no time left", "rows": []}


def test_the_default_checks_fit_into_seven_minutes():
    assert sum(row.seconds for row in CHECKS.values() if row.is_default) < 420


def test_a_device_without_waits_counts_none_and_a_call_takes_time(tmp_path):
    made = trial.Trial("cpu", True, tmp_path)
    assert made.waits(lambda: None) == 0
    assert made.milliseconds(lambda: None) > 0


def test_without_a_card_the_way_out_is_told(monkeypatch, capsys):
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: torch sees no GPU"
    assert hint == "hint: --device cpu --tiny"
