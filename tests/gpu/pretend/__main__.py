"""Run a command with the pretended card: `python -m tests.gpu.pretend COMMAND ...`.

For instance `python -m tests.gpu.pretend pytest -m pretend_gpu`. PRETEND_GPUS cards (1) of
PRETEND_GPU_BYTES each (80 GiB) are there. Exits with 77 and a reason where it cannot be built.
"""

import os
import sys

from tests.gpu.pretend import build

SKIPPED = 77


def main():
    reason = build.missing()
    if reason or len(sys.argv) < 2:
        print(reason or __doc__, file=sys.stderr)
        sys.exit(SKIPPED if reason else 2)
    os.environ.update(build.environment(build.build()))
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
