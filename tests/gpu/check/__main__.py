"""Check cmtool on a real card: `python -m tests.gpu.check --out check.json`.

It prints PASS, FAIL or a figure as it goes, and ends with exit code 1 if something failed. Checks
that are not asked for, or for which no time is left, are told as not run. It wants PYTHONPATH and
no installation. With `--device cpu --tiny` it is a test of itself.

    python -m tests.gpu.check --minutes 7 --out check.json
    python -m tests.gpu.check --only compiled largest --minutes 10
    python -m tests.gpu.check --only peers --openai DIR --ect DIR
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from tests.gpu.check import commands, numerics, peers, runs, speed, stepping
from tests.gpu.check.trial import Check, NotRun, Trial, missing


class Row(NamedTuple):
    """A check, the seconds that it may take on an H100, and whether it runs without being named."""

    check: Check
    seconds: int
    is_default: bool = True


CHECKS = {
    "environment": Row(numerics.environment, 15),
    "precision": Row(numerics.precision, 15),
    "masks": Row(numerics.masks, 10),
    "norm_kernel": Row(numerics.norm_kernel, 15),
    "speed": Row(speed.speed, 90),
    "methods": Row(stepping.methods, 60),
    "overflow": Row(stepping.overflow, 5),
    "sampling": Row(speed.sampling, 20),
    "pictures": Row(commands.pictures, 5),
    "resume": Row(runs.resume, 40),
    "processes": Row(stepping.processes, 30),
    "memory": Row(commands.memory, 15),
    "features": Row(speed.features, 15),
    "snapshot": Row(speed.snapshot, 10),
    "optimizers": Row(speed.optimizers, 10),
    "commands": Row(commands.commands, 50),
    "quality": Row(runs.quality, 75, is_default=False),
    "largest": Row(speed.largest, 60, is_default=False),
    "compiled": Row(speed.compiled, 300, is_default=False),
    "peers": Row(peers.peers, 60, is_default=False),
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: to test the check itself")
    parser.add_argument("--minutes", type=float, default=7, help="what is left then is not run")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--skip", nargs="+", choices=CHECKS, metavar="NAME", default=[])
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--openai", type=Path, help="checkout of openai/consistency_models")
    parser.add_argument("--ect", type=Path, help="checkout of locuslab/ect")
    return parser.parse_args(words)


def chosen(given: argparse.Namespace) -> set[str]:
    """Return the checks that are asked for; those beside released code by its folders."""
    default = {name for name, row in CHECKS.items() if row.is_default or given.tiny}
    if given.openai or given.ect:
        default.add("peers")
    return set(given.only or default) - set(given.skip)


def too_long(number: int, frame: FrameType | None) -> None:
    """End a check that hangs."""
    raise TimeoutError("took too long")


def outcome(trial: Trial, row: Row, left: float) -> dict[str, Any]:
    """Return what a check found: its status, seconds and rows."""
    trial.rows, began = [], time.monotonic()
    signal.alarm(0 if trial.tiny else round(min(3 * row.seconds + 20, max(left, 1) + 30)))
    try:
        row.check(trial)
    except NotRun as reason:
        trial.not_run("the check", reason)
    except ModuleNotFoundError as error:
        trial.not_run("the check", f"{error.name} is missing")
    except Exception as error:  # a check that breaks is a failure, and the others go on
        traceback.print_exc(limit=-6)
        trial.say("the check", False, f"{type(error).__name__}: {str(error)[:500]}")
    finally:
        signal.alarm(0)
        trial.free()
    found = {entry["status"] for entry in trial.rows}
    status = next((s for s in ("FAIL", "PASS", "INFO") if s in found), "not run")
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "rows": trial.rows}


def main(words: list[str] | None = None) -> int:
    """Run the checks and return the exit code."""
    given, began, found = arguments(words), time.monotonic(), dict[str, dict[str, Any]]()
    about = {"torch": torch.__version__, "device": given.device, "missing": missing()}
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no GPU\nhint: --device cpu --tiny", file=sys.stderr)
        return 2
    for name, checks in missing().items():
        print(f"missing: {name}, for the checks: {checks}", flush=True)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, too_long)
    wanted = chosen(given)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(given.device, given.tiny, Path(folder), given.openai, given.ect)
        for name, row in CHECKS.items():
            left = 60 * given.minutes - (time.monotonic() - began)
            if name not in wanted:
                found[name] = {"status": "not run", "why": "not asked for", "rows": []}
            elif left < min(row.seconds, 25) * (not given.tiny) or left <= 0:
                found[name] = {"status": "not run", "why": "no time left", "rows": []}
                print(f"not run {name}: no time left", flush=True)
            else:
                found[name] = outcome(trial, row, left)
                print(f"-- {name}: {found[name]['seconds']} s", flush=True)
            if given.out:  # after each: the device may be taken away
                text = json.dumps({"about": about, "checks": found}, indent=1, default=str)
                given.out.write_text(text)
    bad = [name for name, result in found.items() if result["status"] == "FAIL"]
    good = sum(result["status"] in ("PASS", "INFO") for result in found.values())
    print(f"{good} checks passed, {len(bad)} failed: {', '.join(bad) or 'none'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
