"""Averages of the weights that a run stores, and others that are made of them after it.

Karras et al. (2024), sec. 3.2: of averages with powers as profiles, taken at many steps, a sum
comes near to any other such average. So the width can be chosen when the run is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from cmtool.core.ema import Profile, gamma_of, posthoc_weights
from cmtool.errors import InputError, ResourceError, UserError, is_full
from cmtool.formats.checkpoints import checkpoints
from cmtool.formats.native import read_about, write_weights
from cmtool.models import Model, load_model
from cmtool.system.files import replacing
from cmtool.system.parallel import whole
from cmtool.training.state import TrainState

FOLDER = "averages"
HINT = (
    "train with --set run.ema_every=1000 and two averages: --set"
    " \"train.ema=[{name='ema', sigma_rel=0.05}, {name='ema-long', sigma_rel=0.1}]\""
)


class Stored(NamedTuple):
    """An average in a file: which step's, and of which profile."""

    path: Path
    profile: Profile


def average_tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each average with a power as its profile, whole, by its name.

    All processes of a sharded model must call this.
    """
    return {
        name: {key: whole(t.detach()) for key, t in ema.model.network.state_dict().items()}
        for name, ema in state.emas.items()
        if ema.gamma is not None
    }


def store(run: Path, step: int, averages: dict[str, dict[str, Tensor]], about: Any) -> None:
    """Write averages/step-NNNNNNN/NAME.safetensors, each a whole model."""
    folder = run / FOLDER / f"step-{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in averages.items():
        with replacing(folder / f"{name}.safetensors") as temporary:
            try:
                write_weights(temporary, tensors, {**about, "weights": name, "step": step})
            except SafetensorError as error:  # it is no OSError
                if not is_full(error):
                    raise
                what = f"no room on the disk for {folder / name}.safetensors"
                raise ResourceError(what, "free disk space") from None


def stored_in(run: Path, last: int | None = None) -> list[Stored]:
    """Return the stored averages of a run, up to a step, by step. Raises InputError for none.

    Raises UserError where all are of later steps.
    """
    found, later = [], []
    for folder in checkpoints(run / FOLDER):
        step = int(folder.name[5:])
        if last is not None and step > last:
            later.append(step)
        if step == 0 or later:
            continue
        for path in sorted(folder.glob("*.safetensors")):
            width = widths(read_about(path)).get(path.stem)
            if width is None:
                raise InputError(f"{path} is not an average of this run", "remove it")
            found.append(Stored(path, Profile(step, gamma_of(width))))
    if later and not found:
        hint = f"the first is --step {later[0]}"
        raise UserError(f"no average up to step {last} is stored in {run}", hint)
    if not found:
        raise InputError(f"{run} has no stored averages", HINT)
    return found


def widths(about: dict[str, Any]) -> dict[str, float]:
    """Return sigma_rel of each average that has one, by name, as a file's header tells it."""
    try:
        rows = about["preset"]["train"]["ema"]
        return {row["name"]: float(row["sigma_rel"]) for row in rows if row["sigma_rel"]}
    except (KeyError, TypeError, ValueError):
        return {}


def average(run: Path, sigma_rel: float, step: int | None = None) -> tuple[Model, list[Stored]]:
    """Return a run's model with the average of another width, and the averages it is made of.

    It is as at the end of `step`, the last stored one if None. Raises InputError for a run without
    stored averages, UserError for a step of which none is stored.
    """
    stored = stored_in(run, step)
    newest = stored[-1].profile.step
    if step is not None and newest != step:
        hint = f"the nearest before it is --step {newest}"
        raise UserError(f"no average of step {step} is stored in {run}", hint)
    factors = posthoc_weights(
        [s.profile for s in stored], Profile(newest, gamma_of(sigma_rel))
    ).tolist()
    model = load_model(stored[-1].path)
    names = [name for name, _ in model.f.network.named_parameters()]  # buffers are no averages
    summed = weighted_sum([s.path for s in stored], factors, names)
    model.f.network.load_state_dict(summed, strict=False)
    source = f"{run} with sigma_rel {sigma_rel:g} at step {newest}"
    return replace(model, source=source, weights="ema", held=("ema",)), stored


def weighted_sum(
    paths: Sequence[Path], factors: Sequence[float], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the sum of the files' tensors times the factors, float32, one tensor at a time."""
    out = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safetensors.safe_open(path, "pt")) for path in paths]
        for name in names:
            total = torch.zeros((), dtype=torch.float64)
            for file, factor in zip(files, factors, strict=True):
                total = total + factor * file.get_tensor(name).double()
            out[name] = total.float()
    return out
