"""status.json: where a run stands or how it ended, kept true however it ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cmtool.errors import Paused, ResourceError, Stopped, UserError
from cmtool.system.files import write_json

StatusWriter = Callable[..., None]
"""Writes status.json: the given fields replace those before."""


def launcher() -> str:
    """Return the name of the torchrun that started this process; "" without one."""
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    return f"{platform.node()}:{os.getppid()}" if elastic else ""


def launched_by(out: Path, launchers: Sequence[str]) -> bool:
    """Tell whether one of these torchruns has begun, or resumed, the run in `out`.

    Then its workers are not the first: it starts new ones when one fails (`--max-restarts`).
    """
    before = read_json(out / "status.json").get("launchers")
    return isinstance(before, list) and not {*before}.isdisjoint(filter(None, launchers))


@contextmanager
def keep_status(out: Path, launchers: Sequence[str] = ()) -> Iterator[StatusWriter]:
    """Keep status.json true during a block: running, done, stopped or failed, step, exit code."""
    facts: dict[str, object] = {
        "state": "running",
        "step": 0,
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "launchers": sorted(filter(None, set(launchers))),
    }

    def write(**fields: object) -> None:
        facts.update(fields)
        try:
            write_json(out / "status.json", facts, durable=facts["state"] != "running")
        except ResourceError:  # the disk is full; to write over the old file needs no room
            _overwrite(out / "status.json", json.dumps(facts, indent=1, sort_keys=True))

    def end(state: str, code: object, error: str | None = None) -> None:
        with suppress(OSError):  # the error that ended the run is still shown
            write(state=state, exit_code=code, **({"error": error} if error else {}))

    write()
    try:
        yield write
    except (Stopped, Paused) as stop:
        end("stopped", stop.exit_code)
        raise
    except UserError as error:
        end("failed", error.exit_code, error.what)
        raise
    except SystemExit as stop:
        end("stopped", stop.code, "stopped without saving")
        raise
    except BaseException as error:
        end("failed", 1, repr(error))
        raise


def _overwrite(path: Path, text: str) -> None:
    with path.open("r+") as file:
        file.write(text + "\n")
        file.truncate()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one for a file that holds none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
