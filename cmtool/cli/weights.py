"""cmtool weights: published files by name: what there is, where it goes, and fetching it."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer import Argument, Option

from cmtool.cli import _completion
from cmtool.cli._options import AsJson
from cmtool.cli._output import emit, emit_json, say
from cmtool.cli._table import show_table
from cmtool.cli._watching import showing
from cmtool.errors import InputError

app = typer.Typer(
    no_args_is_help=True, help="Published weights by name: list, fetch, find and check them."
)
Names = Annotated[
    list[str],
    Argument(metavar="NAME...", help="Names of weights.", autocompletion=_completion.published),
]
COLUMNS = ("name", "state", "MB", "terms", "what")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the published files that cmtool knows, and which are on this machine.

    `cmtool weights list`

    The state is `there`, `missing`, `changed` (another sha256), or `unknown`, where nobody states a
    sha256 and cmtool did not fetch the file. Nothing is fetched.
    """
    facts = {name: _facts(name) for name in _known()}
    if as_json:
        emit_json({"weights": facts})
        return
    rows = ([name, *(str(each[key] or "-") for key in COLUMNS[1:])] for name, each in facts.items())
    show_table(COLUMNS, rows)


@app.command("get")
def get(
    names: Names,
    accept_terms: Annotated[
        bool, Option("--accept-terms", help="Agree to the terms of files that have some.")
    ] = False,
) -> None:
    """Fetch published files to where cmtool looks for them, and print their paths.

    `cmtool weights get inception --accept-terms`

    `cmtool sample -c "$(cmtool weights get cd_imagenet64_lpips)" --seeds 0-15 --out grid.png`

    An interrupted download continues where it stopped. A file appears only when it is whole and its
    sha256 is the published one. CMTOOL_MIRROR is the address of a folder with copies; with
    CMTOOL_OFFLINE=1 nothing is fetched.
    """
    from cmtool.weights import fetched, published

    for name in names:
        published(name)
    for name in names:
        with showing("bytes") as progress:
            path = fetched(name, accept_terms=accept_terms, progress=progress, note=say)
        emit(os.fspath(path))


@app.command("path")
def path_(name: Annotated[str, Argument(autocompletion=_completion.published)]) -> None:
    """Print where a published file belongs, whether it is there or not.

    `cp inception-2015-12-05.pt "$(cmtool weights path inception)"`
    """
    from cmtool.weights import published

    emit(os.fspath(published(name).path))


@app.command("verify")
def verify(
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="[NAME]...",
            help="Names of weights. Default: all that are there.",
            autocompletion=_completion.published,
        ),
    ] = None,
) -> None:
    """Check files that are there by their sha256. Exit 3 if one is missing or another file.

    `cmtool weights verify inception`
    """
    bad = []
    for name in names or _known():
        state = _facts(name)["state"]
        if names is None and state == "missing":
            continue
        emit(f"{name}\t{state}")
        bad += [name] * (state in ("missing", "changed"))
    if bad:
        raise InputError(f"not as published: {', '.join(bad)}", f"cmtool weights get {bad[0]}")


def _known() -> list[str]:
    from cmtool.weights import PUBLISHED

    return list(PUBLISHED)


def _facts(name: str) -> dict[str, Any]:
    from cmtool.weights import expected_sha256, published, state_of

    wanted = published(name)
    return {
        "what": wanted.what, "state": state_of(wanted), "MB": wanted.megabytes,
        "terms": wanted.terms, "url": wanted.url, "path": os.fspath(wanted.path),
        "sha256": expected_sha256(wanted),
    }  # fmt: skip
