"""Where a run is shown beside its own files: TensorBoard, Weights & Biases, MLflow.

A tracker is one class here and one line in TRACKERS. It gets numbers and sample grids by step.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cmtool.data.images import picture_of
from cmtool.errors import MissingError, ResourceError
from cmtool.presets.schema import Preset
from cmtool.system.files import read_own, write_atomic


class Told(NamedTuple):
    """What a tracker is told of a run when it is opened: its folder, its preset, the steps done."""

    out: Path
    preset: Mapping[str, Any]
    step: int


class Tracker(Protocol):
    """A place where a run is shown. Whatever it raises, the run goes on."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers of a step."""

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Show a picture (C, H, W) uint8 of a step."""

    def close(self) -> None:
        """Finish: nothing follows."""


class TensorBoard:
    """Event files in the run folder. What earlier files say of later steps is dropped."""

    def __init__(self, told: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(told.out / "tensorboard"), purge_step=told.step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers."""
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Write a picture."""
        self.events.add_image(name, image, step)
        self.events.flush()

    def close(self) -> None:
        """Close the file."""
        self.events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, of the project that WANDB_PROJECT names, or cmtool.

    It is resumed with the run. WANDB_MODE=offline keeps it on this machine.
    """

    def __init__(self, told: Told) -> None:
        import wandb

        self.api = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cmtool"),
            name=told.out.name,
            id=kept_id(told.out / "wandb.id", lambda: uuid.uuid4().hex),
            resume="allow",
            config=dict(told.preset),
            dir=told.out,
            settings=wandb.Settings(silent=True, console="off", symlink=False),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self.run.log(dict(values), step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Log a picture."""
        self.run.log({name: self.api.Image(picture_of(image))}, step=step)

    def close(self) -> None:
        """Wait until all is sent, or written."""
        self.run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, or in the file mlflow.db of the working folder."""

    def __init__(self, told: Told) -> None:
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cmtool")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)

        def begun() -> str:
            run = self.client.create_run(experiment, run_name=told.out.name)
            for key, value in told.preset.items():
                self.client.log_param(run.info.run_id, key, str(value)[:500])
            return str(run.info.run_id)

        self.run = kept_id(told.out / "mlflow.id", begun)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Log a picture."""
        self.client.log_image(self.run, picture_of(image), key=name, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run)


TRACKERS: dict[str, tuple[Callable[[Told], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}
"""The classes, and the packages that they need, by what `run.trackers` may list."""


def kept_id(path: Path, make: Callable[[], str]) -> str:
    """Return the name that a tracker knows the run by: the one in a file, else a new one."""
    try:
        return read_own(path, 1 << 10).decode()
    except FileNotFoundError:
        name = make()
        write_atomic(path, name.encode())
        return name


def trackers_of(preset: Preset) -> tuple[str, ...]:
    """Return the names of a preset's trackers; `run.tensorboard` is the word of 0.1 for one."""
    also = ("tensorboard",) * preset.run.tensorboard
    return tuple(dict.fromkeys((*also, *preset.run.trackers)))


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise MissingError for a tracker whose package is not there."""
    for name in names:
        package = TRACKERS[name][1]
        try:
            _imported(name)
        except ImportError as error:
            what = f"run.trackers = {name!r} needs the package {package}: {error}"
            raise MissingError(what, f"pip install 'cmtool[{package}]', or leave it out") from None


def _imported(name: str) -> None:
    if name == "tensorboard":
        import torch.utils.tensorboard  # noqa: F401
    elif name == "wandb":
        import wandb  # noqa: F401
    else:
        import mlflow  # noqa: F401


@contextmanager
def told_as_ours(name: str) -> Iterator[None]:
    """Raise ResourceError for whatever a tracker raises in the block: a run goes on without it."""
    try:
        yield
    except Exception as error:
        raise ResourceError(f"{name}: {type(error).__name__}: {error}", "") from None
