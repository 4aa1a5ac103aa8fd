"""What the files of a run say of it: status.json, run.json, state.json, lines of log.jsonl."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from cmtool.system.records import Count, Facts

Seconds = Annotated[float, Field(ge=0, le=1e12)]


class Status(Facts):
    """status.json: how far a run is, who trains it, and how it ended.

    No file says `killed`. `read_status` says it of a run whose process is gone while the file still
    says running.
    """

    model_config = ConfigDict(extra="allow")

    state: Literal["running", "done", "stopped", "failed", "killed"]
    step: Count = 0
    steps: Count | None = None
    pid: Count | None = None
    host: str = "?"
    since: str = "?"
    launchers: list[str] = Field([])
    exit_code: int | None = None
    error: str | None = None
    seconds_left: Seconds | None = None


class Versions(Facts):
    """The versions that a run was started with."""

    cmtool: str


class DataFacts(Facts):
    """The data that a run was started with."""

    name: str
    images: Count
    fingerprint: str
    held_out: str | None = None


class ModelFacts(Facts):
    """The teacher that a run was started with, or the model whose weights it began with."""

    source: str
    sha256: str


class Record(Facts):
    """run.json: what a run was started with."""

    versions: Versions
    processes: Annotated[int, Field(gt=0, le=1 << 20)] | None = None
    data: DataFacts | None = None
    teacher: ModelFacts | None = None
    init: ModelFacts | None = None
    class_names: list[str] = Field([])


class Unlogged(Facts):
    """What the next log line has summed up so far."""

    loss: list[float]
    images: list[float]
    grad_norm: float
    steps: Count
    skipped: Count

    @model_validator(mode="after")
    def _alike(self) -> Unlogged:
        if len(self.loss) != len(self.images):
            raise ValueError("loss and images are not of one length")
        return self


class Counters(Facts):
    """state.json: what a checkpoint holds beside tensors."""

    step: Count
    bad_steps: Count = 0
    unlogged: Unlogged | None = None
    scaler: dict[str, Any] | None = None


class LoggedEvaluation(Facts):
    """The evaluation in a line of log.jsonl."""

    metric: str
    value: float
    step: Count


class LogLine(Facts):
    """A line of log.jsonl, as far as curves and tables show it."""

    step: Count
    loss: float | None = None
    loss_by_sigma: dict[str, float | None] = Field({})
    eval: LoggedEvaluation | None = None
    grad_norm: float | None = None
    lr: float | None = None
    n: float | None = None
    mu: float | None = None
    images: Count | None = None
    images_per_second: float | None = None
    step_seconds: float | None = None
    step_cpu_seconds: float | None = None
    mfu: float | None = None
    data_wait: float | None = None
    memory_gib: float | None = None
