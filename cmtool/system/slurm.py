"""Slurm's tasks as processes that work together: `srun cmtool ...` is like torchrun.

srun says which task this is in variables of its own; torch.distributed reads torchrun's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 20_000, 20_000


def ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a task of srun; nothing for one task, or under torchrun."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environ or not tasks.isdigit() or int(tasks) < 2:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    node = int(environ.get("SLURM_NODEID", "0"))
    job, step = (environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID"))
    offset = (int(job) * 31 + int(step)) % PORTS if job.isdigit() and step.isdigit() else 0
    here = tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    return {
        "RANK": environ.get("SLURM_PROCID", "0"),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(here[node] if node < len(here) else 1),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(FIRST_PORT + offset)),
    }


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's list of nodes: n07 of "n[07-09,12],m3"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^\[,]*)", nodes)
    if match is None:
        return "localhost"
    first = re.split("[,-]", match[2])[0] if match[2] else ""
    return match[1] + first + match[3]


def tasks_of_nodes(counts: str) -> list[int]:
    """Return the tasks of each node: [4, 4, 3] of "4(x2),3"."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found
