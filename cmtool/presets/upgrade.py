"""Presets and cards of version 0.1, which said loss.pair, read as those of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmtool.errors import UserError

METHOD_OF: dict[tuple[str, bool, bool], str] = {
    ("none", False, False): "denoising",
    ("noise", False, False): "consistency_training",
    ("teacher", False, False): "consistency_distillation",
    ("progressive", False, False): "progressive_distillation",
    ("noise", True, False): "continuous_training",
    ("teacher", True, False): "continuous_distillation",
    ("teacher", True, True): "live_distillation",
}
"""loss.method by version 0.1's loss.pair, loss.continuous, and whether loss.target was live."""


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's tables with loss.method in place of loss.pair and loss.continuous.

    Tables of today come back as they are, and so does a loss that is no table. Raises UserError for
    a combination that never was.
    """
    table = tree.get("loss")
    loss = dict(table) if isinstance(table, Mapping) else {}
    live = loss.get("target") == "live"
    if not ({"pair", "continuous"} & loss.keys() or live):
        return dict(tree)
    method = loss.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    before = {value: key for key, value in METHOD_OF.items()}.get(str(name), ("none", False, False))
    key = (str(loss.pop("pair", before[0])), bool(loss.pop("continuous", before[1])), live)
    if key not in METHOD_OF:
        raise UserError(
            f"loss.pair = {key[0]!r} with loss.continuous = {str(key[1]).lower()} and"
            f" loss.target = {loss.get('target')!r}, as presets of version 0.1 put it",
            f"say loss.method instead: one of {', '.join(METHOD_OF.values())}",
        )
    loss["method"] = METHOD_OF[key]
    if live:
        loss["target"] = "student"
    kind = "teacher" if key[0] in ("none", "progressive") else "consistency"
    return of_kind({**tree, "loss": loss}, tree.get("kind", kind))


def of_kind(tree: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a card's tables with its kind and the scalings that version 0.1 took for it.

    There a consistency model always had its boundary at sigma_min, whatever its card said. A model
    that is no table stays as it is.
    """
    table = tree.get("model", {})
    if not isinstance(table, Mapping):
        return {**tree, "kind": kind}
    model = dict(table)
    scalings = model.get("scalings", "edm")
    name = scalings.get("name") if isinstance(scalings, Mapping) else scalings
    if kind == "consistency":
        model["scalings"] = "consistency"
    elif name == "consistency":
        model["scalings"] = "edm"
    return {**tree, "kind": kind, "model": model}
