"""cmtool demo: a tour that runs the ordinary commands and prints each."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cmtool.cli._output import emit, make_folder, say
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.data.datasets import Dataset
    from cmtool.training.report import Figure, Row

EMOJI, TEACHER, PRESET = "emoji-cmt", "digits-edm", "digits-cmt"
NUM = "512"
DISTILLED = ["--set", "train.steps=700"]  # of 1,100, which reach a little more
TEACHER_STEPS, STUDENT_STEPS = (3, 5, 18), (1, 2, 4)
FOLDER = Path("cmtool-demo")
HOW = """
How such a model is made, on a smaller one: a bundled teacher, an EDM diffusion model of small
coloured digits, needs 35 network calls an image. Distillation turns it into a model that needs one.
"""


def demo(
    out: Annotated[Path, Option(help="Folder for everything the demo makes.")] = FOLDER,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Sample and mend bundled emoji, then distill, edit and evaluate digits; a report at the end.

    `cmtool demo`

    It takes about four minutes on two CPU cores and needs no network. Prints the path of the
    report.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} exists", "give another --out, or --overwrite")
        if not (out / "student" / "run.json").is_file():
            raise UserError(f"{out} does not hold an earlier demo", "give another --out")

    from cmtool.data.datasets import digits
    from cmtool.training.report import Figure, write_report

    start = time.monotonic()
    make_folder(out)
    tour = Tour(out, ["--overwrite"] if overwrite else [])
    say_lines("A one-step model of emoji comes bundled: from noise to a picture in one call.\n")
    emoji = show_emoji(tour)
    say_lines(HOW)
    distilled = ["--teacher", TEACHER, "--preset", PRESET, *DISTILLED]
    tour.run("distill", *distilled, "--out", str(tour.student), *tour.replace)
    say_lines(
        "\nImages from the same noise: the teacher, then the student in one step and in two.\n"
    )
    grids = draw_grids(tour)
    say_lines(
        "\nThe same model mends a picture it has never seen: white in the mask is regenerated.\n"
    )
    mended = mend(tour, "digit", digits("held-out"), str(tour.student), 6)
    say_lines(f"\nfd-digits, the Frechet distance to the training digits, on {NUM} images each.\n")
    measurements = measure(tour)
    rows = [row for each in measurements.values() for row in each]

    report = out / "report.html"
    figures = [
        *emoji,
        Figure("Quality against network calls", draw_quality(tour, measurements)),
        Figure("The run", tour.student / "summary.png"),
        Figure("Teacher, 35 network calls an image", grids["teacher"]),
        Figure("Student, 1 network call", grids["one-step"]),
        Figure("Student, 2 network calls", grids["two-steps"]),
        Figure("Inpainting digits: given, masked, answer", mended),
    ]
    seconds = time.monotonic() - start
    write_report(report, rows=rows, figures=figures, commands=tour.commands, seconds=seconds)
    say_lines("")
    for row in rows:
        calls = "-" if row.calls is None else str(row.calls)
        say_lines(f"{row.label:<26} {calls:>3} calls   fd-digits {row.value:6.2f}")
    say_lines(f"\n{seconds:.0f} seconds. Open the report, then try `cmtool --help`.")
    emit(str(report))


class Tour:
    """Runs commands in this process and prints each; `commands` keeps what was run."""

    def __init__(self, out: Path, replace: list[str]) -> None:
        self.out, self.replace, self.student = out, replace, out / "student"
        self.commands: list[str] = []

    def run(self, *arguments: str) -> str:
        """Run one command as the shell would and return what it wrote to stdout."""
        from cmtool.cli import build_app

        line = shlex.join(["cmtool", *arguments])
        self.commands.append(line)
        say_lines(f"$ {line}")
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            code: Any = build_app(arguments[0])(list(arguments), standalone_mode=False)
        assert not code, f"{line} ended with {code}"
        return captured.getvalue()


def draw_grids(tour: Tour) -> dict[str, Path]:
    """Return grids of teacher and student from the same seeds."""
    grids = {}
    for name, arguments in {
        "teacher": ["-c", TEACHER],
        "one-step": ["-c", str(tour.student)],
        "two-steps": ["-c", str(tour.student), "--steps", "2"],
    }.items():
        out = grids[name] = tour.out / f"{name}.png"
        tour.run("sample", *arguments, "--seeds", "0-49", "--out", str(out), *tour.replace)
    return grids


def show_emoji(tour: Tour) -> list[Figure]:
    """Return figures of the bundled model of emoji: samples, and held-out pictures mended."""
    from cmtool.data.datasets import emoji
    from cmtool.training.report import Figure

    out = tour.out / "emoji.png"
    tour.run("sample", "-c", EMOJI, "--seeds", "0-49", "--out", str(out), *tour.replace)
    mended = mend(tour, "emoji", emoji("held-out"), EMOJI, 2)
    return [
        Figure("Emoji, 1 network call each", out),
        Figure("Inpainting emoji that no model has seen: given, masked, answer", mended),
    ]


def mend(tour: Tour, name: str, data: Dataset, model: str, scale: int) -> Path:
    """Return a picture of one of each class, their left halves, and how the model mends them."""
    import torch

    from cmtool.data.decoding import read_image
    from cmtool.data.drawing import grid, png_bytes
    from cmtool.system.files import write_atomic

    pictures = first_of_each_class(data)
    mask = torch.zeros(1, *pictures.shape[-2:], dtype=torch.uint8)
    mask[:, :, pictures.shape[-1] // 2 :] = 255  # white: the right half is regenerated
    hidden = tour.out / f"{name}-mask.png"
    write_atomic(hidden, png_bytes(mask))
    answers = []
    for index, picture in enumerate(pictures):
        source = tour.out / f"{name}-{index}.png"
        answer = tour.out / f"{name}-{index}-mended.png"
        write_atomic(source, png_bytes(picture))
        tour.run(
            "edit", "inpaint", str(source), "--mask", str(hidden),
            "-c", model, "--out", str(answer), *tour.replace,
        )  # fmt: skip
        answers.append(read_image(answer))
    mended = tour.out / f"{name}-inpainting.png"
    rows_of_three = torch.cat([pictures, pictures.where(mask == 0, 128), torch.stack(answers)])
    write_atomic(mended, png_bytes(grid(rows_of_three, len(pictures), scale=scale)))
    return mended


def measure(tour: Tour) -> dict[str, list[Row]]:
    """Return rows of teacher, student and real digits: fd-digits, and network calls an image."""
    models = {
        "teacher": (TEACHER, TEACHER_STEPS),
        "student": (str(tour.student), STUDENT_STEPS),
    }
    rows: dict[str, list[Row]] = {}
    for name, (model, counts) in models.items():
        for count in counts:
            label = f"{name}, {count} step{'' if count == 1 else 's'}"
            row = measured(tour, label, "-c", model, "--steps", str(count))
            rows.setdefault(name, []).append(row)
    rows["real digits"] = [measured(tour, "real digits held out", "digits:held-out")]
    return rows


def measured(tour: Tour, label: str, *arguments: str) -> Row:
    """Return the row of one measurement by `cmtool eval fid`."""
    from cmtool.training.report import Row

    result = json.loads(tour.run("eval", "fid", *arguments, "--num", NUM))
    return Row(label, result.get("evaluations"), result["value"])


def draw_quality(tour: Tour, rows: dict[str, list[Row]]) -> Path:
    """Return the plot of quality against calls; real digits, which take none, are a level line."""
    from cmtool.training.plots import write_curves

    curves = {n: [(row.calls, row.value) for row in each if row.calls] for n, each in rows.items()}
    calls = [count for points in curves.values() for count, _ in points]
    level = rows["real digits"][0].value
    curves["real digits"] = [(min(calls), level), (max(calls), level)]
    path = tour.out / "quality.png"
    write_curves(path, curves, "network calls an image", "fd-digits, lower is better")
    return path


def say_lines(text: str) -> None:
    """Write a text of several lines to stderr."""
    for line in text.split("\n"):
        say(line)


def first_of_each_class(data: Dataset) -> Tensor:
    """Return the first image of each class, (num_classes, C, H, W) uint8."""
    import torch

    assert data.labels is not None
    first = [int((data.labels == label).nonzero()[0]) for label in range(data.num_classes)]
    return data.images[torch.tensor(first)]
