"""JSON files of a known form. Anyone may have written them, so each is checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmtool.errors import InputError
from cmtool.system.files import read_own

Count = Annotated[int, Field(ge=0, le=1 << 62)]


class Facts(BaseModel):
    """What a JSON file holds. Other keys are left out, and no type is converted."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


F = TypeVar("F", bound=Facts)


def read_facts(path: Path, kind: type[F]) -> F | None:
    """Return what a JSON file holds, None for a file that is missing or empty.

    A power cut may leave an empty file, or one of zeros. Raises InputError for any other file that
    is not of this kind; it names the file and the key.
    """
    hint = "remove it, or put back a copy that is whole"
    try:
        content = read_own(path)
        if not content.strip(b"\0 \r\n"):
            return None
        return kind.model_validate(json.loads(content))
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise InputError(what, "check its permissions") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path} is damaged: {key}: {first['msg'].lower()}", hint) from None
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path} is damaged: {reason}", hint) from None


def known_facts(path: Path, kind: type[F]) -> F | None:
    """Return what a JSON file holds, None for a file that is missing, empty or damaged."""
    try:
        return read_facts(path, kind)
    except InputError:
        return None
