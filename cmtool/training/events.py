"""TensorBoard's event files: the numbers of the log, and the sample grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cmtool.errors import MissingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def event_writer() -> type[SummaryWriter]:
    """Return the class that writes event files. Raises MissingError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError(
            f"run.tensorboard needs the package tensorboard: {error}",
            "pip install 'cmtool[tensorboard]', or --set run.tensorboard=false",
        ) from None
    return SummaryWriter


class Events:
    """Writes event files into a folder; TensorBoard drops what earlier files say after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        self.writer = event_writer()(str(folder), purge_step=step + 1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a log line."""
        for name, value in scalars(line):
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Write a picture (C, H, W) uint8."""
        self.writer.add_image(name, image, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a log line's numbers under names that TensorBoard takes, tables as `table/key`."""
    for key, value in line.items():
        if key == "eval":
            yield f"eval/{value['metric']}", value["value"]
        elif isinstance(value, Mapping):
            for band, number in value.items():
                if number is not None:
                    yield f"{key}/{band.replace('<', 'below_').replace('>', 'above_')}", number
        elif key not in ("step", "time") and value is not None:
            yield key, value
