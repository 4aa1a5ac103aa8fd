"""EDM's snapshots: a pickle of persistent objects around SongUNet or DhariwalUNet.

ECT's files have the same layout with a consistency preconditioner. Nothing in them is executed:
see safe_pickle.py. Source of the layouts: `training/networks.py` of Karras et al. (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.core.networks.adm import AdmOptions
from cmtool.core.networks.song import SongOptions
from cmtool.core.precond import iddpm_sigmas
from cmtool.formats import foreign, torch_pickle
from cmtool.formats.foreign import Foreign, Malformed, Options, Rule
from cmtool.formats.safe_pickle import Box
from cmtool.formats.torch_pickle import Record, StoredTensor

PRECONDITIONERS = {"EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "ECMPrecond"}
MAX_DEPTH = 32
MAX_TENSORS = 20_000
ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


def read(path: Path, weights: str, known: Mapping[str, Any]) -> Foreign:
    """Return the `ema` network of a snapshot. Raises Malformed, Refused, InputError."""
    if weights != "ema":
        raise foreign.wrong_weights(weights, ["ema"])
    size = path.stat().st_size
    with path.open("rb") as opened:
        content = torch_pickle.load(opened, size)
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Record):
        raise Malformed("it holds no network under 'ema'")
    if outer.class_name not in PRECONDITIONERS:
        raise _other_network(outer)
    inner = _table(outer, "_modules").get("model")
    if not isinstance(inner, Record):
        raise Malformed("its preconditioner holds no network 'model'")
    if inner.class_name not in NETWORKS:
        raise Malformed(f"its network is a {inner.class_name[:40]}, not {' or '.join(NETWORKS)}")
    read_options, rules = NETWORKS[inner.class_name]
    given = _arguments(inner)
    resolution = _whole(given, "img_resolution", None, 4096)
    channels, num_classes = _whole(given, "in_channels", None), _whole(given, "label_dim", 0)
    learn_sigma = _whole(given, "out_channels", channels) == 2 * channels
    options = read_options(given, resolution, learn_sigma)
    taps = tuple(options.resample_filter) if isinstance(options, SongOptions) else (1, 1)
    stored = _without_filters(torch_pickle.as_tensors(collect(inner), size), taps)
    names = foreign.tensor_names(options, channels, num_classes)
    dropout = _fraction(given, "label_dropout", 0)
    note = f"its label_dropout {dropout} is for training: not taken over"
    return Foreign(
        options=options,
        tensors=foreign.translate(rules(options, names, resolution), stored),
        channels=channels,
        num_classes=num_classes,
        image_size=(resolution, resolution),
        **_preconditioning(outer),
        notes=(note,) if dropout else (),
    )


def _other_network(outer: Record) -> Malformed:
    """Return the error for a network in a preconditioner that we do not have."""
    given = _arguments(outer)
    kwargs = ", ".join(f"{str(key)[:40]} {_short(given[key])}" for key in list(given)[:8])
    count = sum(math.prod(t.size) for t in collect(outer, ("_parameters",)).values())
    whose = "EDM2's" if outer.class_name == "Precond" else "a"
    return Malformed(
        f"its network is {whose} {outer.class_name[:40]} of {count:,} parameters ({kwargs}),"
        f" not one of {', '.join(sorted(PRECONDITIONERS))}"
    )


def song_rules(o: SongOptions, names: list[str], resolution: int) -> dict[str, Rule]:
    """Return the rule of each name of our Song, from a SongUNet built at `resolution`."""
    prefixes = {"map_noise": "map_noise", "frequencies": "map_noise.freqs"}
    top = len(o.channel_mult) - 1
    aux = "aux_residual" if o.encoder == "residual" else "aux_skip"
    for level in range(top + 1):
        at = f"{resolution >> level}x{resolution >> level}"
        prefixes[f"enc.{level}.entry"] = f"enc.{at}_down" if level else f"enc.{at}_conv"
        prefixes[f"enc.{level}.aux"] = f"enc.{at}_{aux}"
        ours = f"dec.{top - level}"
        prefixes[f"{ours}.entry.0"] = f"dec.{at}_in0" if level == top else f"dec.{at}_up"
        prefixes[f"{ours}.entry.1"] = f"dec.{at}_in1"
        prefixes[f"{ours}.head.0"] = f"dec.{at}_aux_norm"
        prefixes[f"{ours}.head.2"] = f"dec.{at}_aux_conv"
        for index in range(o.num_blocks + 1):
            prefixes[f"enc.{level}.blocks.{index}"] = f"enc.{at}_block{index}"
            prefixes[f"{ours}.blocks.{index}"] = f"dec.{at}_block{index}"
    leaves = {f"attention.{ours}": theirs for ours, theirs in ATTENTION.items()}
    theirs = foreign.renamed(names, prefixes, leaves)
    return {
        name: foreign.interleaved(other, 1, order="hcq") if ".qkv." in name else foreign.same(other)
        for name, other in theirs.items()
    }


def adm_rules(o: AdmOptions, names: list[str], resolution: int) -> dict[str, Rule]:
    """Return the rule of each name of our Adm, from a DhariwalUNet: they are one network."""
    prefixes = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1"}
    prefixes |= {"label_emb": "map_label", "augment_emb": "map_augment"}
    widths = {}
    for stage in foreign.adm_blocks(o):
        side, block, resample, shift = {
            "encoder": ("enc", "block", "down", 1),
            "middle": ("dec", "in", "", 0),
            "decoder": ("dec", "block", "up", -1),
        }[stage.side]
        level = stage.level + (shift if stage.role == "resample" else 0)
        at = f"{side}.{resolution >> level}x{resolution >> level}"
        widths[stage.prefix] = o.model_channels * o.channel_mult[stage.level]
        ends = {"stem": f"{at}_conv", "resample": f"{at}_{resample}"}
        ends |= {role: role for role in ("out_norm", "out_conv")}
        prefixes[stage.prefix] = ends.get(stage.role, f"{at}_{block}{stage.number}")
    leaves = {
        **ATTENTION,
        "in_layers.0": "norm0",
        "in_layers.2": "conv0",
        "emb_layers.1": "affine",
        "out_layers.0": "norm1",
        "out_layers.3": "conv1",
        "skip_connection": "skip",
    }
    out = {}
    for name, other in foreign.renamed(names, prefixes, leaves).items():
        if ".qkv." in name:
            heads = foreign.heads_of(o, 3 * widths[name.split(".qkv.")[0]])
            out[name] = foreign.interleaved(other, heads, order="hcq")
        else:
            out[name] = (
                foreign.transposed(other) if name == "label_emb.weight" else foreign.same(other)
            )
    return out


def song_options(given: dict[str, Any], resolution: int, learn_sigma: bool) -> SongOptions:
    """Return our options for the arguments of a SongUNet. Raises Malformed for unknown ones."""
    mult = _list(given, "channel_mult", [1, 2, 2, 2])
    return SongOptions(
        model_channels=_whole(given, "model_channels", 128),
        channel_mult=mult,
        num_blocks=_whole(given, "num_blocks", 4),
        attention_levels=_levels(given, [16], resolution, len(mult)),
        embedding=_name(given, "embedding_type", ["positional", "fourier"]),
        channel_mult_emb=_whole(given, "channel_mult_emb", 4),
        channel_mult_noise=_whole(given, "channel_mult_noise", 1),
        encoder=_name(given, "encoder_type", ["standard", "skip", "residual"]),
        decoder=_name(given, "decoder_type", ["standard", "skip"]),
        resample_filter=_list(given, "resample_filter", [1, 1]),
        augment_dim=_whole(given, "augment_dim", 0),
        learn_sigma=learn_sigma,
        dropout=_fraction(given, "dropout", 0.10),
    )


def adm_options(given: dict[str, Any], resolution: int, learn_sigma: bool) -> AdmOptions:
    """Return our options for the arguments of a DhariwalUNet. Raises Malformed for unknown ones."""
    mult = _list(given, "channel_mult", [1, 2, 3, 4])
    if _whole(given, "channel_mult_emb", 4) != 4:
        raise Malformed("its channel_mult_emb is not 4")
    return AdmOptions(
        model_channels=_whole(given, "model_channels", 192),
        channel_mult=mult,
        num_res_blocks=_whole(given, "num_blocks", 3),
        attention_levels=_levels(given, [32, 16, 8], resolution, len(mult)),
        head_channels=64,
        min_group_channels=4,
        learn_sigma=learn_sigma,
        augment_dim=_whole(given, "augment_dim", 0),
        dropout=_fraction(given, "dropout", 0.10),
    )


def collect(
    record: Record, tables: Sequence[str] = ("_parameters", "_buffers")
) -> dict[str, StoredTensor]:
    """Return the parameters and buffers of a module tree, or one of both, by dotted name.

    Raises Malformed for a module or name met twice, a tree deeper than 32, or anything but tensors.
    """
    found: dict[str, StoredTensor] = {}
    seen: set[int] = set()

    def visit(module: Any, prefix: str, depth: int) -> None:
        if not isinstance(module, Record | Box) or id(module) in seen or depth > MAX_DEPTH:
            raise Malformed(f"its module {prefix or 'ema'} is shared, too deep, or not a module")
        seen.add(id(module))
        skipped = module.state.get("_non_persistent_buffers_set", set())
        if not isinstance(skipped, set) or len(seen) > MAX_TENSORS:
            raise Malformed("its modules are too many, or badly described")
        for table in tables:
            for name, value in _table(module, table).items():
                if value is None or (table == "_buffers" and name in skipped):
                    continue
                if not isinstance(value, StoredTensor):
                    raise Malformed(f"its {prefix}{name} is not a tensor")
                if f"{prefix}{name}" in found:
                    raise Malformed(f"its {prefix}{name} comes twice")
                found[f"{prefix}{name}"] = value
                if len(found) > MAX_TENSORS:
                    raise Malformed(f"it has more than {MAX_TENSORS:,} tensors")
        for name, child in _table(module, "_modules").items():
            if child is not None:
                visit(child, f"{prefix}{name}.", depth + 1)

    visit(record, "", 0)
    return found


def _table(module: Record | Box, key: str) -> dict[str, Any]:
    table = module.state.get(key, {})
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise Malformed(f"a module's {key} are not a table")
    return table


def _without_filters(stored: dict[str, Tensor], taps: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the tensors but the resampling filters, which must be the ones the options name."""
    line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    wanted = torch.outer(line, line)[None, None]
    filters = {n: tensor for n, tensor in stored.items() if n.endswith(".resample_filter")}
    for name, tensor in filters.items():
        if tensor.shape != wanted.shape or not torch.allclose(tensor.float(), wanted):
            raise Malformed(f"its {name} is not made of resample_filter {list(taps)}")
    return {name: tensor for name, tensor in stored.items() if name not in filters}


def _preconditioning(outer: Record) -> dict[str, Any]:
    """Return kind, scalings, noise label and range of a preconditioner."""
    state = outer.state
    low, high = _number(state, "sigma_min", 0.0), _number(state, "sigma_max", float("inf"))
    # the range that EDM samples in: what the network supports, between 0.002 and 80
    noise = {"sigma_min": max(low, 0.002), "sigma_max": min(high, 80.0)}
    if outer.class_name in ("EDMPrecond", "ECMPrecond"):
        kind = "teacher" if outer.class_name == "EDMPrecond" else "consistency"
        sigma_data = _number(state, "sigma_data", 0.5)
        return {"kind": kind, "noise_label": "log", "sigma_data": sigma_data, **noise}
    family = outer.class_name.removesuffix("Precond").lower()  # vp, ve or iddpm
    names = {"vp": ["beta_d", "beta_min"], "ve": [], "iddpm": ["C_1", "C_2"]}[family]
    label: dict[str, Any] = {n.lower(): _number(state, n, 0.0) for n in names if n in state}
    if "M" in state:
        label["steps"] = _whole(state, "M", None, 100_000)
    if family == "iddpm":
        stored, levels = _table(outer, "_buffers").get("u"), torch.tensor(iddpm_sigmas(**label))
        if not isinstance(stored, StoredTensor) or tuple(stored.size) != (len(levels),):
            raise Malformed("its table of noise levels is missing, or has another length")
        if not torch.allclose(stored.tensor().float(), levels, rtol=5e-3, atol=1e-6):
            raise Malformed("its table of noise levels is not the one of its constants")
    return {
        "kind": "teacher",
        "scalings": family,
        "noise_label": {"name": family, **label},
        **noise,
    }


def _arguments(record: Record) -> dict[str, Any]:
    given = record.state.get("_init_kwargs")
    if not isinstance(given, dict) or record.state.get("_init_args", ()) != ():
        raise Malformed(f"its {record.class_name} was not made with named arguments")
    return given


def _whole(given: dict[str, Any], key: str, default: int | None, most: int = 1 << 20) -> int:
    value = given.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise Malformed(f"its {key} = {_short(value)} is not a whole number up to {most}")
    return value


def _number(given: dict[str, Any], key: str, default: float) -> float:
    value = given.get(key, default)
    if type(value) not in (int, float) or not value >= 0:
        raise Malformed(f"its {key} = {_short(value)} is not a number")
    return float(value)


def _fraction(given: dict[str, Any], key: str, default: float) -> float:
    value = _number(given, key, default)
    if value >= 1:
        raise Malformed(f"its {key} = {value} is not a fraction")
    return value


def _list(given: dict[str, Any], key: str, default: list[int]) -> tuple[int, ...]:
    value = given.get(key, default)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise Malformed(f"its {key} is not a short list")
    return tuple(_whole({key: item}, key, None) for item in value)


def _levels(given: dict[str, Any], default: list[int], side: int, levels: int) -> tuple[int, ...]:
    at = _list(given, "attn_resolutions", default) if given.get("attn_resolutions") != [] else ()
    return tuple(level for level in range(levels) if side >> level in at)


def _name(given: dict[str, Any], key: str, good: list[str]) -> Any:
    value = given.get(key, good[0])
    if value not in good:
        raise Malformed(f"its {key} = {_short(value)} is not one of {', '.join(good)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, int | float | str | bool) else type(value).__name__


NETWORKS: dict[str, tuple[Callable[..., Options], Callable[..., dict[str, Rule]]]] = {
    "SongUNet": (song_options, song_rules),
    "DhariwalUNet": (adm_options, adm_rules),
}
