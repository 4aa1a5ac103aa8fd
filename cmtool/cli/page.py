"""cmtool edit page: edit and sample in a browser."""

from __future__ import annotations

import secrets
import webbrowser
from typing import Annotated

from typer import Option

from cmtool.cli import _options as shared
from cmtool.cli._devices import pick_device
from cmtool.cli._output import emit, say
from cmtool.errors import MissingError, Stopped

PORT = 7870
LOCAL = "127.0.0.1"


def page(
    checkpoint: shared.Checkpoint = None,
    port: Annotated[
        int, Option(min=0, max=65535, help="Port of the page; 0 is any free one.")
    ] = PORT,
    share: Annotated[
        bool,
        Option(
            "--share",
            help="Let other machines of the network use the page too: all who have its address.",
        ),
    ] = False,
    browser: Annotated[
        bool, Option("--browser", help="Open the page in the browser of this machine.")
    ] = False,
    weights: shared.Weights = "ema",
    preset: shared.ModelPreset = None,
    device: shared.Device = "auto",
) -> None:
    """Edit and sample on a page in the browser: draw a mask, see the answer.

    `cmtool edit page`

    `cmtool edit page -c runs/mine --browser`

    The page is at http://127.0.0.1:7870 until Ctrl-C. Only this machine can open it. It says which
    command makes the same picture in a shell.
    """
    try:
        from cmtool.page.server import build, listening, serve
    except ModuleNotFoundError as error:
        what = f"cmtool edit page needs the package {error.name}"
        raise MissingError(what, "pip install 'cmtool[page]'") from None
    from cmtool.page.desk import Desk

    where = pick_device(device)
    name = checkpoint or shared.default_model("consistency")
    model = shared.pick_model(name, weights, where, kind="consistency", preset=preset)
    given = {
        "--weights": (weights, "ema"),
        "--device": (device, "auto"),
        "--preset": (preset, None),
    }
    words = [word for o, (value, usual) in given.items() if value != usual for word in (o, value)]
    desk = Desk(model, name, tuple(word for word in words if word is not None), weights)
    with listening("" if share else LOCAL, port) as listener:
        taken = listener.getsockname()[1]
        key = secrets.token_urlsafe(16) if share else ""
        hosts = None if share else {f"{host}:{taken}" for host in (LOCAL, "localhost")}
        address = f"http://{address_of_this() if share else LOCAL}:{taken}/{key}{'/' * share}"
        if share:
            say("warning: --share lets everybody who has this address use this page and machine")
        say("The page is ready. Ctrl-C ends it.")
        emit(address)
        if browser:
            webbrowser.open(address)
        try:
            serve(build(desk, hosts, key), listener)
        except (Stopped, KeyboardInterrupt):
            say("The page is closed.")


def address_of_this() -> str:
    """Return the address under which other machines know this one, as far as it is known."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it only chooses the way out
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
