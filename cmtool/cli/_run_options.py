"""The options that train and distill share, and what they say together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cmtool.cli import _completion
from cmtool.cli._options import AsJson, Device, Features, FeaturesInput, Trust
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.presets.toml import Resolved

DistanceOption = Annotated[
    str | None,
    Option(
        autocompletion=_completion.distances,
        help="Distance d(x, y) of the loss, loss.distance in a preset:"
        " l1, l2, l2_32, linf, lpips, pseudo_huber.",
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """Options that train and distill share."""

    set_: Annotated[
        list[str] | None, Option("--set", help="KEY=VALUE over the preset; repeatable.")
    ] = None
    data: Annotated[
        str | None,
        Option(
            autocompletion=_completion.data_sets, help="Data set: its name, or a path of images."
        ),
    ] = None
    metric: DistanceOption = None
    out: Annotated[
        Path | None,
        Option(
            autocompletion=_completion.runs,
            help="Run folder. Default: runs/PRESET, numbered if taken.",
        ),
    ] = None
    seed: Annotated[int | None, Option(help="Seed of the run.")] = None
    accumulate: Annotated[
        int | None,
        Option(min=1, help="Parts that each batch is split into, to save memory."),
    ] = None
    precision: Annotated[
        str | None,
        Option(
            autocompletion=_completion.precisions,
            help="Precision of the networks: fp32, bf16, fp16, or auto, which is bf16 where the"
            " device computes in it.",
        ),
    ] = None
    compile_: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="Run the networks by torch.compile. By default a long run on a GPU does; on a CPU"
            " it takes minutes and gains nothing.",
        ),
    ] = None
    max_time: Annotated[
        str | None,
        Option(
            help="Save and stop after this time, with exit code 75: 3600, 90m, 11h30m. A fitted"
            " preset gets as many steps as this time allows."
        ),
    ] = None
    eval_every: Annotated[
        int | None,
        Option(
            min=0,
            help="Measure the EMA weights every so many steps: by run.eval_metric of the preset, or"
            " what --features says. A preset fitted to your images measures fd-pixels.",
        ),
    ] = None
    features: Features = None
    features_input: FeaturesInput = ""
    trust: Trust = False
    device: Device = "auto"
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False
    auto_resume: Annotated[
        bool,
        Option(
            "--auto-resume",
            help="Continue the run in --out, or start it if there is none: for schedulers, which"
            " repeat one command. `--resume auto` is the same.",
        ),
    ] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False
    dry_run: Annotated[
        bool, Option("--dry-run", "-n", help="Print the resolved preset and stop.")
    ] = False
    as_json: AsJson = False

    def __post_init__(self) -> None:
        """Decide whether the run goes on, before any process makes its folder."""
        if not self.auto_resume:
            return
        if self.overwrite:
            raise UserError("--auto-resume and --overwrite", "give one of them")
        if self.out is None:
            raise UserError("--auto-resume without a run folder", "name it with --out runs/NAME")
        from cmtool.training.folder import is_resumable

        object.__setattr__(self, "resume", is_resumable(self.out))

    @property
    def stored(self) -> Path | None:
        """The preset of the run that is resumed, if it has one already."""
        if self.resume and self.out is None:
            raise UserError("--resume without a run folder", "name it with --out runs/NAME")
        if not self.resume or self.out is None:
            return None
        from cmtool.training.folder import refuse_special

        refuse_special(self.out)
        file = self.out / "preset.toml"
        return file if file.is_file() else None

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """The values that the command line sets, by option: {option: {key: value}}."""
        from cmtool.presets.toml import parse_override

        flags: dict[str, dict[str, Any]] = {
            "--data": {"data.path": self.data}, "--metric": {"loss.distance": self.metric},
            "--seed": {"train.seed": self.seed}, "--compile": {"train.compile": self.compile_},
            "--accumulate": {"train.accumulate": self.accumulate},
            "--precision": {"train.precision": self.precision},
            "--eval-every": {"run.eval_every": self.eval_every},
        }  # fmt: skip
        layers = {flag: given for flag, given in flags.items() if None not in given.values()}
        told = dict(map(parse_override, self.set_ or []))
        return {**layers, "--set": told, "--features": self._features(told)}

    def _features(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that --features sets: the file is named by its sha256 in the preset.

        The metric is fid unless it is `told`. Raises UserError, or as `checked_sha256`.
        """
        if self.features is None:
            if self.features_input or self.trust:
                option = "--features-input" if self.features_input else "--trust"
                raise UserError(f"{option} without --features", "name the file: --features FILE.pt")
            return {}
        from cmtool.evaluation.own import Own, checked_sha256

        sha256 = checked_sha256(Own(self.features, trust=self.trust))
        name = told.get("run.eval_metric", told.get("run.eval_metric.name", "fid"))
        about = {"features": str(self.features), "sha256": sha256, "input": self.features_input}
        said = {"name": name, **{key: value for key, value in about.items() if value}}
        return {f"run.eval_metric.{key}": value for key, value in said.items()}

    def resolve(self, preset: str) -> Resolved:
        """Return the preset with what the command line changes; a resumed run has its own."""
        from cmtool.presets.toml import resolve

        return resolve(str(self.stored or preset), self.layers)


def parse_time(text: str | None) -> float | None:
    """Return the seconds of "3600", "90m" or "11h30m". Raises UserError."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or match is None:
        raise UserError(f"--max-time {text!r} is not a time", "for example 3600, 90m or 11h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + seconds
