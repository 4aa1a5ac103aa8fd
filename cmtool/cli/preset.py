"""cmtool preset: list the presets, or show one."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from cmtool.cli._output import emit

app = typer.Typer(no_args_is_help=True, help="List presets, or show one.")


@app.command("list")
def list_() -> None:
    """List the presets: on each line a name and a description."""
    from cmtool.presets.toml import load_preset, preset_names

    names = preset_names()
    width = max(map(len, names))
    for name in names:
        emit(f"{name:<{width}}  {load_preset(name).description}")


@app.command("show")
def show(
    name: Annotated[str, Argument(help="A preset's name, or the path of a TOML file.")],
    set_: Annotated[
        list[str] | None, Option("--set", help="KEY=VALUE over the preset; repeatable.")
    ] = None,
) -> None:
    """Print a resolved preset, with the origin of every value.

    `cmtool preset show digits-cd --set train.lr=1e-4 > mine.toml`
    """
    from cmtool.presets.toml import parse_override, resolve, to_toml

    resolved = resolve(name, {"--set": dict(map(parse_override, set_ or []))})
    emit(to_toml(resolved.preset, resolved.origins).rstrip())
