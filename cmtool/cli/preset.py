"""cmtool preset: list the presets, show one, or make one for your own images."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli._devices import pick_device
from cmtool.cli._options import AsJson, Device, LabelRule, Overwrite
from cmtool.cli._output import check_free, emit, emit_json, make_folder, say, write_bytes
from cmtool.cli._table import show_table
from cmtool.errors import UserError, nearest

app = typer.Typer(
    no_args_is_help=True, help="List presets, show one, or make one for your own images."
)


HEAD = ("preset", "method", "data", "FID 1", "FID 2", "Mimg", "description")
"""Columns of the list; --sort takes them in lower case."""
MOST_HOURS = 1_000_000
Hours = Annotated[
    float, Option(min=0, max=MOST_HOURS, help="Hours that the training may take here.")
]


@app.command("list")
def list_(
    sort: Annotated[
        str, Option("--sort", "-s", help="Column to sort by: preset, method, data, fid, mimg.")
    ] = "preset",
    as_json: AsJson = False,
) -> None:
    """List the presets: method, data, the FID of the paper, and millions of training images.

    `cmtool preset list`

    `cmtool preset list --sort fid`

    FID 1 and FID 2 are what the authors report for one and two steps. In a pipe, tabs separate the
    columns.
    """
    from cmtool.presets.toml import load_preset, preset_names, published

    orders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "preset": lambda row: row["preset"],
        "method": lambda row: (row["method"], row["preset"]),
        "data": lambda row: (row["data"], row["preset"]),
        "fid": lambda row: (row["fid_1"] or row["fid_2"] or math.inf, row["preset"]),
        "mimg": lambda row: (row["mimg"], row["preset"]),
    }
    if sort not in orders:
        raise UserError(f"unknown --sort {sort!r}", nearest(sort, orders))
    rows = []
    for name in preset_names():
        preset, paper = load_preset(name), published(name)
        rows.append({
            "preset": name, "kind": preset.kind, "method": preset.loss.method.name,
            "data": preset.data.path, **paper.model_dump(),
            "mimg": preset.train.steps * preset.train.batch / 1e6,
            "description": preset.description,
        })  # fmt: skip
    rows.sort(key=orders[sort])
    if as_json:
        emit_json({"presets": rows})
        return
    cells = [
        (
            row["preset"], row["method"], row["data"] or "-",
            *("-" if row[key] is None else f"{row[key]:g}" for key in ("fid_1", "fid_2")),
            f"{row['mimg']:.3g}", row["description"],
        )
        for row in rows
    ]  # fmt: skip
    show_table(HEAD, cells, with_head=sys.stdout.isatty())


@app.command("show")
def show(
    name: Annotated[
        str,
        Argument(
            autocompletion=_completion.presets,
            help="A preset's name, or the path of a TOML file.",
        ),
    ],
    keys: Annotated[
        list[str] | None,
        Argument(
            metavar="[KEY]...",
            help="Keys or tables to explain: loss.distance, train. Default: all, in short.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="KEY=VALUE over the preset; repeatable.")
    ] = None,
) -> None:
    """Print a resolved preset: each value, where it comes from, and what it means.

    `cmtool preset show digits-cd --set train.lr=1e-4 > mine.toml`

    `cmtool preset show digits-cd loss.distance train.lr`

    With a key it prints what that key may be.
    """
    from cmtool.presets.toml import flat, origin_of, parse_override, resolve, to_toml

    resolved = resolve(name, {"--set": dict(map(parse_override, set_ or []))})
    if not keys:
        emit(to_toml(resolved.preset, resolved.origins, explain=True).rstrip())
        return
    from cmtool.presets.manual import explained, keys_of

    values = dict(flat(resolved.preset.model_dump()))
    for key in (inner for named in keys for inner in keys_of(named, values)):
        known = explained(key, values)
        emit(f"{known.line} # {origin_of(known.key, resolved.origins)}")
        for line in known.text:
            emit(f"    {line}")


@app.command("new")
def new(
    data: Annotated[str, Option(help="Your images: a folder, zip, npz, or another data set.")],
    method: Annotated[
        str, Option(help="Preset to extend: edm, cd, ct, ict, ect, pd.", show_default=True)
    ] = "edm",
    size: Annotated[
        str | None,
        Option(help="Size of the network: small, base, large. Default: small on a CPU, else base."),
    ] = None,
    image_size: Annotated[
        int | None,
        Option(min=4, help="Side of the images in pixels. Default: theirs, to 32 on a CPU or 64."),
    ] = None,
    hours: Hours = 1.0,
    labels: LabelRule = "auto",
    out: Annotated[
        Path | None, Option(help="File to write, or - for stdout. Default: DATA-METHOD.toml.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a preset for your own images: it fits them, this device, and the time you have.

    `cmtool preset new --data photos/`

    `cmtool preset new --data photos/ --method ict --image-size 64 --hours 8 --out faces.toml`

    Network and batch follow from the images and --size. The steps are those that --hours leaves
    time for, by three short steps that are timed here. Prints the path of the file; stderr has the
    next command.
    """
    from cmtool.data.datasets import DATASETS
    from cmtool.presets.build import needs_teacher
    from cmtool.presets.toml import extension, is_method_preset, preset_names
    from cmtool.system.files import expanded
    from cmtool.training.planning import Wish, facts_of, planned

    methods = [name for name in preset_names() if is_method_preset(name)]
    if method not in methods:
        raise UserError(f"unknown --method {method!r}", nearest(method, methods))
    if math.isnan(hours):
        raise UserError("--hours nan", "give a number of hours, for example 8")
    path = out or Path(f"{_plain(Path(data).stem)}-{method}.toml")
    is_file = _prepare_file(path, overwrite)
    where = data if data.partition(":")[0] in DATASETS else str(expanded(data).absolute())
    wish = Wish(size, image_size, hours)
    facts = facts_of(where, labels)
    resolved, layers = planned(method, pick_device(device), {}, facts=facts, wish=wish)
    command = "distill --teacher RUN" if needs_teacher(resolved.preset) else "train"
    command = f"cmtool {command} --preset {shlex.quote(str(path)) if is_file else 'FILE'}"
    more = f"A key that is not here: cmtool preset show {method}"
    text = extension(method, layers, f"{command}\n{more}")
    if is_file:
        write_bytes(str(path), text.encode(), tell=True)
    else:
        emit(text.rstrip())
    why = resolved.origins["train.steps"]
    say(f"{facts.images:,} images, {facts.classes or 'no'} classes; {why}")
    if is_file:
        say(f"next: {command}")


def _prepare_file(path: Path, overwrite: bool) -> bool:
    """Make the folder of a new preset; return False for stdout.

    Raises UserError for a path that cannot be a preset.
    """
    if str(path) == "-":
        return False
    if path.suffix != ".toml":
        raise UserError(f"{path} is not a .toml", "give the preset a name that ends in .toml")
    check_free(path, overwrite)
    make_folder(path.parent)
    return True


def _plain(name: str) -> str:
    """Return a name of letters, digits and dashes for a file."""
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "images"
