"""Print the figures of the published configurations: `python -m tests.gpu.pretend python -m
tests.gpu.pretend.figures [NAME ...]`. A table on stderr, JSON on stdout."""

import json
import sys

from tests.gpu.pretend.published import CONFIGURATIONS, Figures, figures

COLUMNS = (*Figures._fields, "step_ms")


def main():
    found = {}
    print("  ".join(["configuration".ljust(14), *COLUMNS]), file=sys.stderr)
    for name in sys.argv[1:] or CONFIGURATIONS:
        made = figures(name)
        found[name] = {**made._asdict(), "step_ms": made.step_ms}
        row = [str(found[name][column]).rjust(len(column)) for column in COLUMNS]
        print("  ".join([name.ljust(14), *row]), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
