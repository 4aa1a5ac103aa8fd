"""Time how long a step waits for a checkpoint: `python -m tests.bench.checkpoint --millions 337`.

A state of so many million float32 numbers in three models (student and two averages) is saved by
`Saver.save(wait=False)`, first into new memory, then into the memory kept from before, then after
`Saver.prepare` made it behind training's back; beside them six torch.save files, as openai's and
EDM's loops write. Peak memory is about twice the state. Goal: 0.2 s for 337 million.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from cmtool.core.ema import Ema
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.training.checkpoint import Saver, state_tensors
from cmtool.training.state import TrainState

LAYERS = 40
"""Tensors a model is split into, as networks are."""


class Weights(nn.Module):
    """A network of so many numbers that is never called."""

    def __init__(self, count):
        super().__init__()
        size = count // LAYERS
        self.layers = nn.ParameterList(
            nn.Parameter(torch.full((size,), 0.5)) for _ in range(LAYERS)
        )


def make_state(count):
    """Return a student and two averages, `count` numbers in all; the optimizer has no moments."""
    student = Preconditioned(
        Weights(count // 3), edm_scalings, log_label, sigma_data=0.5, sigma_min=0.002
    )
    emas = {name: Ema(student, rate=0.999) for name in ("a", "b")}
    return TrainState(student, None, emas, torch.optim.SGD(student.parameters(), 0.1), step=1)


def blocked(saver, state):
    """Return the seconds save() took, when no write goes on; and those of the write after it."""
    saver.finish(final=True)
    state.step += 1
    start = time.perf_counter()
    saver.save(state, wait=False)
    waited = time.perf_counter() - start
    saver.finish(final=True)
    return waited, time.perf_counter() - start


def plain(state, folder, files=6):
    """Return the seconds that torch.save takes for the same numbers in so many files."""
    tensors = [t for part in state_tensors(state).values() for t in part.values()]
    start = time.perf_counter()
    for i in range(files):
        torch.save(tensors[i::files], folder / f"{i}.pt")
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=337)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; else a temporary folder")
    arguments = parser.parse_args()
    state = make_state(int(arguments.millions * 1e6))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        saver = Saver(folder / "new", {}, keep=2, note=print)
        first, write = blocked(saver, state)
        kept = [blocked(saver, state)[0] for _ in range(arguments.repeats)]
        saver.snapshot = None
        saver.prepare(state)
        prepared, _ = blocked(saver, state)
        (folder / "plain").mkdir()
        torch_save = [plain(state, folder / "plain") for _ in range(arguments.repeats)]
    facts = {
        "GB": round(
            sum(t.nbytes for f in state_tensors(state).values() for t in f.values()) / 1e9, 2
        ),
        "new memory": round(first, 3),
        "kept memory": round(statistics.median(kept), 3),
        "kept memory, best": round(min(kept), 3),
        "prepared memory": round(prepared, 3),
        "the write behind it": round(write, 2),
        "six torch.save": round(statistics.median(torch_save), 2),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
