"""A model onto the Hugging Face hub: its weights, its preset, and a card that says what it is."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmtool import __version__
from cmtool.convert import convert
from cmtool.errors import MissingError, ResourceError, UserError
from cmtool.hub import PREFIX, Named, library, parsed, places, told
from cmtool.models import Model
from cmtool.presets.schema import Preset
from cmtool.presets.toml import to_toml
from cmtool.system.files import file_sha256
from cmtool.system.text import printable
from cmtool.training.history import History, read_history
from cmtool.weights import is_offline

WEIGHTS = "model.safetensors"
SAMPLES = "samples.png"


LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def push(
    model: Model, name: str, licence: str, *, private: bool = False, overwrite: bool = False
) -> str:
    """Put a model into the repository `hf:ORG/NAME`, and return its name with the commit.

    The repository is made unless it is there. Raises UserError for a name with a revision or a
    file, and for a repository with files that would be replaced; MissingError without a network or
    the hub's library; InputError for what the hub refuses, ResourceError for a broken upload.
    """
    named = parsed(name)
    if named.revision or named.file:
        hint = f"write {PREFIX}{named.repository}"
        raise UserError(f"a model is pushed to a repository, not to {name}", hint)
    if not LICENCE.fullmatch(licence):
        hint = "write it as the hub does: apache-2.0, mit, cc-by-4.0, openrail, other"
        raise UserError(f"{printable(licence)[:60]!r} is no name of a licence", hint)
    if is_offline():
        raise MissingError("to push a model needs the network", "unset HF_HUB_OFFLINE")
    hub = library()
    api = hub.HfApi(endpoint=places()["endpoint"])
    with tempfile.TemporaryDirectory(prefix="cmtool-push-") as temporary, told(name):
        files = _written(model, named, licence, Path(temporary))
        api.create_repo(named.repository, private=private or None, exist_ok=True)
        known = api.model_info(named.repository).siblings or []
        there = {each.rfilename for each in known} & {file.name for file in files}
        if there and not overwrite:
            what = f"{name} has {', '.join(sorted(there))} already"
            raise UserError(what, "--overwrite makes a new commit; the old one stays on the hub")
        operations = [hub.CommitOperationAdd(file.name, str(file)) for file in files]
        message = f"{printable(model.preset.description) or model.kind} (cmtool {__version__})"
        try:
            done = api.create_commit(named.repository, operations, commit_message=message)
        except RuntimeError as error:  # what the hub's library makes of a broken upload
            reason = printable(str(error.__cause__ or error))[:200]
            what = f"the files did not reach {name}: {reason}"
            raise ResourceError(what, "try again: what arrived is not sent twice") from None
    return f"{PREFIX}{named.repository}@{done.oid}"


def _written(model: Model, named: Named, licence: str, folder: Path) -> list[Path]:
    """Write what goes onto the hub into a folder, and return the files."""
    run = _run_of(model)
    convert(model, folder / WEIGHTS)
    if isinstance(model.preset, Preset):
        (folder / "preset.toml").write_text(to_toml(model.preset), encoding="utf-8")
    pictures = sorted((run.path / "samples").glob("step-*.png")) if run else []
    if pictures and pictures[-1].is_file() and not pictures[-1].is_symlink():
        shutil.copyfile(pictures[-1], folder / SAMPLES)
    sha256 = file_sha256(folder / WEIGHTS)
    has_samples = (folder / SAMPLES).exists()
    card = model_card(model, named.repository, licence, run, sha256, has_samples)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return sorted(folder.iterdir())


def _run_of(model: Model) -> History | None:
    """Return the run that a model is of, or its checkpoint is in; None for another source."""
    path = Path(model.source).absolute()
    places = [path, *path.parents][:4] if path.exists() else []
    found = next((place for place in places if (place / "run.json").is_file()), None)
    return read_history(found) if found else None


def model_card(
    model: Model,
    repository: str,
    licence: str,
    run: History | None = None,
    sha256: str = "",
    has_samples: bool = False,
) -> str:
    """Return the README.md of a model: what it is, how it was trained, and how it is used."""
    lines = [*_front(licence), f"# {repository.rpartition('/')[2]}\n"]
    lines.append(f"{printable(model.preset.description) or f'A {model.kind} model'}.\n")
    lines += [f"![samples]({SAMPLES})\n"] if has_samples else []
    lines += [*_use(model, repository), "## Facts\n", "| | |", "|---|---|"]
    facts = {**_facts(model, run), f"sha256 of {WEIGHTS}": f"`{sha256}`"}
    lines += [f"| {what} | {_cell(value)} |" for what, value in facts.items()]
    return "\n".join([*lines, f"| made with | cmtool {__version__} |\n", *_numbers(run)]) + "\n"


def _front(licence: str) -> list[str]:
    tags = ["consistency-models", "image-generation", "diffusion"]
    return ["---", f"license: {licence}", "library_name: cmtool",
            "pipeline_tag: unconditional-image-generation",
            "tags:", *(f"- {tag}" for tag in tags), "---"]  # fmt: skip


def _use(model: Model, repository: str) -> list[str]:
    name = f"{PREFIX}{repository}"
    distill = [f"cmtool distill --teacher {name} --data images/"] * (model.kind == "teacher")
    sample = f"cmtool sample -c {name} --seeds 0-15 --out grid.png"
    return ["## Use\n", "```sh", *distill, sample, "```\n"]


def _facts(model: Model, run: History | None) -> dict[str, Any]:
    """Return what a card says of a model, and of its training where that is known."""
    card = model.preset
    h, w = card.model.image_size
    facts: dict[str, Any] = {
        "kind": model.kind,
        "images": f"{w}x{h}, {card.model.channels} channels",
        "classes": card.model.num_classes or "none",
        "network": f"{card.model.network.name}, "
        f"{sum(p.numel() for p in model.f.parameters()):,} parameters",
        "weights": f"{model.weights} of {model.format} format",
    }
    if isinstance(card, Preset):
        facts |= {
            "method": card.loss.method.name,
            "training": f"{card.train.steps:,} steps of {card.train.batch} images, "
            f"learning rate {card.train.lr:g}",
            "data": Path(card.data.path).name,
        }
    record = run.record if run else None
    if record is not None and record.data is not None:
        mark = record.data.fingerprint
        facts["data"] = f"{Path(record.data.name).name}, {record.data.images:,} images, {mark}"
    if record is not None and record.class_names:
        facts["class names"] = ", ".join(record.class_names[:100])
    for what in ("teacher", "init"):
        made_of = getattr(record, what, None)
        if made_of is not None:
            facts[what] = f"{Path(made_of.source).name}, sha256 {made_of.sha256[:16]}"
    return facts


def _numbers(run: History | None) -> Iterator[str]:
    """Yield the table of a run's last evaluation by each metric."""
    measured: dict[str, Any] = {}
    for line in run.log if run else []:
        if isinstance(found := line.get("eval"), dict) and "metric" in found:
            measured[str(found["metric"])] = found
    if not measured:
        return
    yield "## Numbers\n"
    yield "Measured during training, by the weights that are here or an average of them.\n"
    yield "| metric | value | at step | images |"
    yield "|---|---|---|---|"
    for metric, found in measured.items():
        value, step, num = (found.get(key, "") for key in ("value", "step", "num"))
        shown = f"{value:.4g}" if isinstance(value, float) else value
        yield f"| {_cell(metric)} | {shown} | {step} | {num} |"


def _cell(value: object) -> str:
    return printable(str(value)).replace("|", "\\|")
