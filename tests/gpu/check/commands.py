"""The commands themselves on the device, and what they say where its memory ends."""

from __future__ import annotations

import contextlib
import io
import signal
import time
from pathlib import Path

import torch

from tests.gpu.check.trial import GIB, NotRun, Trial

SAMPLERS = ("heun", "dpm2", "dpmpp_2m", "ancestral", "stochastic_heun")
CD = ("-c", "digits-cd")
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(*words: str) -> tuple[int, str]:
    """Return the exit code of a command, and what it wrote to stderr; -1 for a traceback."""
    from cmtool.cli import main

    told, before = io.StringIO(), {number: signal.getsignal(number) for number in HANDLED}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        try:
            main(list(words))
        except SystemExit as end:
            return int(end.code or 0), told.getvalue()
        except Exception as error:
            return -1, f"{type(error).__name__}: {str(error)[:300]}"
        finally:  # a command leaves its own, which would keep a signal from ending the check
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0, told.getvalue()


def commands(trial: Trial) -> None:
    """Sampling, edits, evaluation and search end well; the CPU draws the same pictures."""
    pictures = _pictures(trial.folder)
    code, told = run("sample", *CD, "--device", "cuda:9", "--out", str(trial.folder / "z"))
    trial.say("a device that is not there is told", code == 2, told.strip()[-300:])
    for words in _chosen(trial, pictures):
        began = time.perf_counter()
        code, told = run(*words, "--device", trial.device)
        spent = round(time.perf_counter() - began, 2)
        trial.say("cmtool " + " ".join(words[:5]), code == 0, spent if code == 0 else told[-500:])


def _pictures(folder: Path) -> list[str]:
    """Return the paths of two random pictures."""
    from cmtool.data.drawing import png_bytes

    found = []
    for number in range(2):
        path = folder / f"{number}.png"
        path.write_bytes(png_bytes(torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8)))
        found.append(str(path))
    return found


def _chosen(trial: Trial, pictures: list[str]) -> list[tuple[str, ...]]:
    """Return the command lines that are to end with exit code 0."""

    def out(name: str) -> tuple[str, ...]:
        return ("--out", str(trial.folder / name), "--overwrite")

    sampled: list[tuple[str, ...]] = [
        ("sample", "-c", "digits-edm", "--sampler", sampler, "--steps", "6", "--seeds", "0-3",
         *out("s.png"))
        for sampler in SAMPLERS
    ]  # fmt: skip
    edits = (("inpaint", "--box", "4,0,4,8"), ("superres", "--factor", "2"), ("colorize",),
             ("stroke",), ("denoise",), ("interpolate", pictures[1]))  # fmt: skip
    edited = [("edit", name, pictures[0], *more, *CD, *out(f"{name}.png")) for name, *more in edits]
    edited.append(("edit", "interpolate", "--seeds", "0,1", *CD, *out("seeds.png")))
    number = "16" if trial.tiny else "256"
    levels = str(trial.folder / f"{time.time()}.json")
    found = [("eval", metric, *CD, "--num", number) for metric in ("fid", "kid", "pr")]
    found += [("eval", "consistency", *CD)]
    found += [("search", *CD, "--num", "64", "--steps", "2", "--out", levels)]
    bench = ("bench", "--preset", "digits-cd", "--steps", "2", "--json")
    if trial.tiny:
        return [sampled[0], edited[0], edited[-1], found[0]]
    return [*sampled, *edited, *found, bench]


def pictures(trial: Trial) -> None:
    """The pictures of a GPU are those of the CPU, within a few grey levels."""
    from cmtool.models import load_model
    from cmtool.sampling import sample

    drawn = []
    for device in ("cpu", trial.device):
        model = load_model("digits-cd", device=device)
        drawn.append(sample(model, range(16)).double().cpu())
    grey = float((drawn[0] - drawn[1]).abs().max()) * 127.5
    trial.say("pictures of CPU and GPU, grey levels apart", grey <= 4, grey)


def memory(trial: Trial) -> None:
    """Where memory ends, a training and a sampling say so in two lines, with exit code 5."""
    if not trial.on_gpu:
        raise NotRun("a GPU's memory can be limited, that of a CPU ends other programs")
    trial.free()
    share = 1.5 * GIB / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        big = ("--set", "train.batch=8192", "--set", "model.network.model_channels=256")
        out = ("--overwrite", "--device", trial.device, "--out", str(trial.folder / "full"))
        steps = ("--set", "train.steps=2")
        _two_lines(trial, "train", "train", "--preset", "digits-edm", *big, *steps, *out)
        many = ("--seeds", "0-99999", "--batch", "100000")
        code, told = run("sample", *CD, *many, *out[:-1], str(trial.folder / "full.npz"))
        good = code in (0, 5)  # a batch that does not fit may be halved instead
        trial.say("sampling with too large a batch", good, (code, told[-300:]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        trial.free()


def _two_lines(trial: Trial, what: str, *words: str) -> None:
    code, told = run(*words)
    lines = [line for line in told.splitlines() if line.startswith(("error:", "hint:"))]
    good = code == 5 and len(lines) == 2 and "Traceback" not in told
    trial.say(f"out of memory in {what} is told in two lines", good, (code, told[-300:]))
