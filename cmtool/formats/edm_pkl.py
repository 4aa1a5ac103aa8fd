"""Snapshots of EDM and EDM2: a pickle of persistent objects around a network.

Those of ECT and TCM have the same layouts and hold consistency models. Nothing in them is executed:
see safe_pickle.py. Source of the layouts: `training/networks.py` of Karras et al. (2022); that of
EDM2's network is in edm2_pkl.py.
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
from cmtool.formats.arguments import (
    arguments,
    attention_levels,
    fraction,
    number,
    numbers,
    one_of,
    short,
    whole,
)
from cmtool.formats.edm2_pkl import edm2_options, edm2_rules
from cmtool.formats.foreign import Foreign, Malformed, Options, Rule
from cmtool.formats.safe_pickle import Box
from cmtool.formats.torch_pickle import Record, StoredTensor

PRECONDITIONERS = {
    "EDMPrecond": "model",
    "VPPrecond": "model",
    "VEPrecond": "model",
    "iDDPMPrecond": "model",
    "ECMPrecond": "model",
    "Precond": "unet",
}
"""What each kind calls its network; the last is EDM2's."""
PIXELS = "StandardRGBEncoder"
"""What EDM2's snapshots name beside a network that works on pixels."""
ADM_HEAD = 64
"""Channels of a head in DhariwalUNet; a block of fewer has none, and no attention."""
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
    encoder = content.get("encoder") if isinstance(content, dict) else None
    if isinstance(encoder, Record) and encoder.class_name != PIXELS:
        raise Malformed(f"its images are latents of a {encoder.class_name[:40]}, not pixels")
    if not isinstance(outer, Record):
        raise Malformed("it holds no network under 'ema'")
    if outer.class_name not in PRECONDITIONERS:
        raise _other_network(outer)
    child = PRECONDITIONERS[outer.class_name]
    inner = _table(outer, "_modules").get(child)
    if not isinstance(inner, Record):
        raise Malformed(f"its preconditioner holds no network {child!r}")
    if inner.class_name not in NETWORKS:
        raise Malformed(f"its network is a {inner.class_name[:40]}, not {' or '.join(NETWORKS)}")
    if inner.state.get("emb_norm", False) is not False:
        raise Malformed("its network normalises its embeddings (emb_norm)")
    read_options, rules = NETWORKS[inner.class_name]
    given = arguments(inner)
    resolution = whole(given, "img_resolution", None, 4096)
    channels = whole(given, "img_channels" if child == "unet" else "in_channels", None)
    num_classes = whole(given, "label_dim", 0)
    learn_sigma = whole(given, "out_channels", channels) == 2 * channels
    options = read_options(given, resolution, learn_sigma)
    taps = (1, 1) if isinstance(options, AdmOptions) else options.resample_filter
    stored = _without_filters(torch_pickle.as_tensors(collect(inner), size), taps)
    names = foreign.tensor_names(options, channels, num_classes)
    left = []
    if dropout := fraction(given, "label_dropout", 0):
        left.append(f"its label_dropout {dropout}")
    if has_logvar(outer):
        left.append("its log-variance head")
    return Foreign(
        options=options,
        tensors=foreign.translate(rules(options, names, resolution), stored),
        channels=channels,
        num_classes=num_classes,
        image_size=(resolution, resolution),
        **_preconditioning(outer, inner),
        notes=tuple(f"{what} is for training: not taken over" for what in left),
    )


def _other_network(outer: Record) -> Malformed:
    """Return the error for a network in a preconditioner that we do not have."""
    given = arguments(outer)
    kwargs = ", ".join(f"{str(key)[:40]} {short(given[key])}" for key in list(given)[:8])
    count = sum(math.prod(t.size) for t in collect(outer, ("_parameters",)).values())
    return Malformed(
        f"its network is a {outer.class_name[:40]} of {count:,} parameters ({kwargs}),"
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
    mult = numbers(given, "channel_mult", [1, 2, 2, 2])
    return SongOptions(
        model_channels=whole(given, "model_channels", 128),
        channel_mult=mult,
        num_blocks=whole(given, "num_blocks", 4),
        attention_levels=attention_levels(given, [16], resolution, len(mult)),
        embedding=one_of(given, "embedding_type", ["positional", "fourier"]),
        channel_mult_emb=whole(given, "channel_mult_emb", 4),
        channel_mult_noise=whole(given, "channel_mult_noise", 1),
        encoder=one_of(given, "encoder_type", ["standard", "skip", "residual"]),
        decoder=one_of(given, "decoder_type", ["standard", "skip"]),
        resample_filter=numbers(given, "resample_filter", [1, 1]),
        augment_dim=whole(given, "augment_dim", 0),
        learn_sigma=learn_sigma,
        dropout=fraction(given, "dropout", 0.10),
    )


def adm_options(given: dict[str, Any], resolution: int, learn_sigma: bool) -> AdmOptions:
    """Return our options for the arguments of a DhariwalUNet. Raises Malformed for unknown ones."""
    mult = numbers(given, "channel_mult", [1, 2, 3, 4])
    if whole(given, "channel_mult_emb", 4) != 4:
        raise Malformed("its channel_mult_emb is not 4")
    width = whole(given, "model_channels", 192)
    levels = attention_levels(given, [32, 16, 8], resolution, len(mult))
    return AdmOptions(
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=whole(given, "num_blocks", 3),
        attention_levels=tuple(level for level in levels if width * mult[level] >= ADM_HEAD),
        head_channels=ADM_HEAD,
        middle_attention=width * mult[-1] >= ADM_HEAD,
        min_group_channels=4,
        learn_sigma=learn_sigma,
        augment_dim=whole(given, "augment_dim", 0),
        dropout=fraction(given, "dropout", 0.10),
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


def has_logvar(outer: Record) -> bool:
    """Tell whether a preconditioner holds what weights EDM2's loss; ECT leaves it out."""
    return _table(outer, "_modules").get("logvar_linear") is not None


def _preconditioning(outer: Record, inner: Record) -> dict[str, Any]:
    """Return kind, scalings, noise label and range of a preconditioner around a network.

    Only ECT's of CIFAR-10 shifts the boundary to its sigma_min. TCM's has the same name and the
    same numbers; its networks know a word, emb_norm, that ECT's do not.
    """
    state = outer.state
    low, high = number(state, "sigma_min", 0.0), number(state, "sigma_max", float("inf"))
    # the range that EDM samples in: what the network supports, between 0.002 and 80
    noise = {"sigma_min": max(low, 0.002), "sigma_max": min(high, 80.0)}
    edm = {"noise_label": "log", "sigma_data": number(state, "sigma_data", 0.5), "scalings": "edm"}
    if outer.class_name == "EDMPrecond" or has_logvar(outer):
        return {"kind": "teacher", **edm, **noise}
    if outer.class_name == "ECMPrecond" and "emb_norm" not in inner.state:
        return {"kind": "consistency", **edm, "scalings": "consistency", **noise}
    if outer.class_name in ("ECMPrecond", "Precond"):
        return {"kind": "consistency", **edm, "sigma_min": 0.002, "sigma_max": noise["sigma_max"]}
    family = outer.class_name.removesuffix("Precond").lower()  # vp, ve or iddpm
    names = {"vp": ["beta_d", "beta_min"], "ve": [], "iddpm": ["C_1", "C_2"]}[family]
    label: dict[str, Any] = {n.lower(): number(state, n, 0.0) for n in names if n in state}
    if "M" in state:
        label["steps"] = whole(state, "M", None, 100_000)
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


NETWORKS: dict[str, tuple[Callable[..., Options], Callable[..., dict[str, Rule]]]] = {
    "SongUNet": (song_options, song_rules),
    "DhariwalUNet": (adm_options, adm_rules),
    "UNet": (edm2_options, edm2_rules),
    "EDM2UNet": (edm2_options, edm2_rules),
}
