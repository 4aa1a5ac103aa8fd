"""What the page may ask for: checked before anything else sees it."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.functional_validators import BeforeValidator

MAX_BYTES = 12 << 20
"""Bytes of pixels that a request may carry: 2,048 x 2,048 in RGB."""
MAX_SEED = 2**31 - 1
MAX_STEPS = 40


def _decoded(value: object) -> bytes:
    """Return the bytes of a text in base64. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("pixels are a text in base64")
    if len(value) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"a picture may have {MAX_BYTES:,} bytes")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("pixels are a text in base64") from None


Pixels = Annotated[bytes, BeforeValidator(_decoded)]
"""Bytes of a picture, row by row, a byte a channel; in JSON a text in base64."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Class = Annotated[int, Field(ge=0)]


class Asked(BaseModel):
    """A request; a key that is none of its own is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AskedEdit(Asked):
    """An edit of a picture of the model's size.

    `mask` is a byte a pixel, above 127 where the picture is made anew. `amount` is what the row of
    the edit calls so. `steps` are the numbers of network calls to compare, None for the edit's own.
    """

    edit: str
    picture: Pixels
    mask: Pixels | None = None
    amount: Annotated[float, Field(allow_inf_nan=False)] | None = None
    steps: Annotated[
        list[Annotated[int, Field(ge=1, le=MAX_STEPS)] | None], Field(min_length=1, max_length=2)
    ] = [1]
    seed: Seed = 0
    variations: Annotated[int, Field(ge=1, le=8)] = 1
    label: Class | None = None


class AskedSamples(Asked):
    """Pictures of `count` seeds from `first` on, at these noise levels."""

    first: Seed = 0
    count: Annotated[int, Field(ge=1, le=64)] = 16
    sigmas: Annotated[list[Level], Field(min_length=1, max_length=8)]
    label: Class | None = None


class AskedMorph(Asked):
    """The way from one seed's picture to another's."""

    start: Seed
    end: Seed
    frames: Annotated[int, Field(ge=2, le=48)] = 12
    sigmas: Annotated[list[Level], Field(min_length=1, max_length=8)]
    label: Class | None = None


class AskedHarm(Asked):
    """A picture to be noised or blurred, so that there is something to mend."""

    picture: Pixels
    how: Annotated[str, Field(pattern="^(noise|blur)$")]
    amount: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
    seed: Seed = 0
