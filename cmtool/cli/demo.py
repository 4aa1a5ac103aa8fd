"""cmtool demo: the tour. It runs the ordinary commands and shows each as it does."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli._output import emit, make_folder, say
from cmtool.errors import InputError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.data.datasets import Dataset

NUM = "2048"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the tour makes.")] = Path(
        "cmtool-demo"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier tour.")
    ] = False,
) -> None:
    """Distill, sample, edit and evaluate on bundled digits; a report at the end.

    `cmtool demo`

    It takes about three minutes on two CPU cores and needs no network. Prints the path of the
    report.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "give a folder with --out")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} exists", "give another --out, or --overwrite it")
        if not (out / "student" / "run.json").is_file():
            raise UserError(f"{out} is no earlier tour", "give another --out")

    import torch

    from cmtool.data.datasets import digits
    from cmtool.data.images import grid, png_bytes, read_image
    from cmtool.system.files import write_atomic
    from cmtool.training.report import Figure, Row, write_report

    start = time.monotonic()
    tour = Tour()
    make_folder(out)
    student, teacher = out / "student", "digits-edm"
    replace = ["--overwrite"] if overwrite else []
    tell("A teacher comes bundled: an EDM diffusion model of small coloured digits. It needs 35")
    tell("network calls an image. Distillation turns it into a model that needs one.\n")
    tour.run("distill", "--teacher", teacher, "--out", str(student), *replace)

    tell("\nImages from the same noise: the teacher, then the student in one step and in two.\n")
    grids = {}
    for name, arguments in {
        "teacher": ["-c", teacher],
        "one-step": ["-c", str(student)],
        "two-steps": ["-c", str(student), "--steps", "2"],
    }.items():
        grids[name] = out / f"{name}.png"
        tour.run("sample", *arguments, "--seeds", "0-49", "--out", str(grids[name]), *replace)

    tell("\nThe same model mends a picture it has never seen: white in the mask is regenerated.\n")
    pictures = first_of_each_class(digits("held-out"))
    mask = right_half(pictures[0])
    write_atomic(out / "mask.png", png_bytes(mask))
    answers = []
    for index, picture in enumerate(pictures):
        source, answer = out / f"digit-{index}.png", out / f"mended-{index}.png"
        write_atomic(source, png_bytes(picture))
        tour.run(
            "edit", "inpaint", str(source), "--mask", str(out / "mask.png"), "-c", str(student),
            "--out", str(answer), *replace,
        )  # fmt: skip
        answers.append(read_image(answer))
    masked = pictures.where(mask == 0, 128)
    mended = out / "inpainting.png"
    rows_of_three = torch.cat([pictures, masked, torch.stack(answers)])
    write_atomic(mended, png_bytes(grid(rows_of_three, len(pictures), scale=6)))

    tell(f"\nfd-digits, the Frechet distance to the training digits, on {NUM} images each.\n")
    rows = []
    for label, arguments in {
        "teacher, Heun, 18 steps": ["-c", teacher],
        "student, 1 step": ["-c", str(student)],
        "student, 2 steps": ["-c", str(student), "--steps", "2"],
        "real digits held out": ["digits:held-out"],
    }.items():
        result = json.loads(tour.run("eval", "fid", *arguments, "--num", NUM))
        rows.append(Row(label, result.get("evaluations"), result["value"]))

    report = out / "report.html"
    write_report(
        report,
        rows=rows,
        figures=[
            Figure("The run", student / "summary.png"),
            Figure("Teacher, 35 network calls an image", grids["teacher"]),
            Figure("Student, 1 network call", grids["one-step"]),
            Figure("Student, 2 network calls", grids["two-steps"]),
            Figure("Inpainting: given, masked, answer", mended),
        ],
        commands=tour.commands,
        seconds=time.monotonic() - start,
    )
    tell("")
    for row in rows:
        calls = "-" if row.calls is None else str(row.calls)
        tell(f"{row.label:<26} {calls:>3} calls   fd-digits {row.value:6.2f}")
    tell(f"\n{time.monotonic() - start:.0f} seconds. Open the report, then try `cmtool --help`.")
    emit(str(report))


def tell(text: str) -> None:
    """Say a text of several lines."""
    for line in text.split("\n"):
        say(line)


def first_of_each_class(data: Dataset) -> Tensor:
    """Return the first image of each class, (num_classes, C, H, W) uint8."""
    import torch

    assert data.labels is not None
    first = [int((data.labels == label).nonzero()[0]) for label in range(data.num_classes)]
    return data.images[torch.tensor(first)]


def right_half(picture: Tensor) -> Tensor:
    """Return a mask (1, H, W) uint8 whose right half is white."""
    import torch

    mask = torch.zeros(1, *picture.shape[-2:], dtype=torch.uint8)
    mask[:, :, picture.shape[-1] // 2 :] = 255
    return mask


class Tour:
    """Runs commands in this process, echoing each; `commands` keeps what was run."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, *arguments: str) -> str:
        """Run one command as the shell would and return what it wrote to stdout."""
        from cmtool.cli import app

        line = shlex.join(["cmtool", *arguments])
        self.commands.append(line)
        tell(f"$ {line}")
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            code: Any = app(list(arguments), standalone_mode=False)
        assert not code, f"{line} ended with {code}"
        return captured.getvalue()
