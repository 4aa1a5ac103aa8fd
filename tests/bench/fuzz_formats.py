"""Damage model files at random for some minutes: `python -m tests.bench.fuzz_formats --minutes 6`.

Prints how many were loaded and refused, and for which reasons. A file that raises anything else,
or takes longer than two seconds, is kept; then the exit code is 1. A hang ends the run with a
traceback after a minute: the file is then `current*` in the folder of the kept ones.
"""

import argparse
import collections
import faulthandler
import re
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from random import Random

from tests.formats.test_fuzz import KINDS, MAX_SECONDS, damaged, outcome, write


def parsed():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--gigabytes", type=int, default=8, help="of address space")
    return parser.parse_args()


def reason(said):
    """Return the kind of a message: without path, numbers and names."""
    tail = said.rsplit(": ", 1)[-1] if " is not a usable " in said else said
    return re.sub(r"\S*[\d_/.]\S*", "*", tail)[:60]


def main():
    options = parsed()
    room = options.gigabytes << 30
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    options.keep.mkdir(parents=True, exist_ok=True)
    made = {
        name: [make(options.keep) for make in KINDS[name].files.values()] for name in options.kinds
    }
    counts, reasons, failures = (collections.Counter() for _ in range(3))
    worst = collections.defaultdict(float)
    end = time.monotonic() + 60 * options.minutes
    number = options.seed
    while time.monotonic() < end:
        rng = Random(number)
        name = rng.choice(options.kinds)
        kind = KINDS[name]
        path = options.keep / f"current{kind.suffix}"
        write(kind, damaged(rng, kind, made[name]), path)
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            said, seconds = outcome(path)
            came = said if said == "loaded" else "refused"
            reasons[reason(said)] += 1
            failed = f"{seconds:.1f} s" if seconds > MAX_SECONDS else None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [at for at in place if "cmtool" in Path(at.filename).parts] or place
            came, seconds = "failed", 0.0
            failed = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        faulthandler.cancel_dump_traceback_later()
        counts[name, came] += 1
        worst[name] = max(worst[name], seconds)
        if failed:
            failures[failed] += 1
            if failures[failed] <= 3:
                kept = options.keep / f"{number}{kind.suffix}"
                (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
                print(f"seed {number}, {name}: {failed}: kept {kept}", flush=True)
        number += 1
    print(f"{number - options.seed:,} files, seeds {options.seed} to {number - 1}")
    for (name, came), count in sorted(counts.items()):
        print(f"{name:<16} {came:<8} {count:>8,}   worst {worst[name]:.2f} s")
    for said, count in reasons.most_common(40):
        print(f"{count:>8,}  {said}")
    for failed, count in failures.most_common():
        print(f"{count:>8,}  FAILED {failed}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
