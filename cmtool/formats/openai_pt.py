"""State dicts of the ADM U-Net: the consistency-model release (.pt), and guided-diffusion's.

The release's names are ours. A state dict does not describe its network. The architecture follows
from names and shapes; what they do not say is assumed, with a note to the user.
"""

from __future__ import annotations

import errno
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.core.networks.adm import AdmOptions
from cmtool.errors import InputError
from cmtool.formats import foreign
from cmtool.formats.foreign import Foreign, Malformed, Rule
from cmtool.formats.native import check_header, first_bytes, read_weights
from cmtool.formats.torch_pickle import StoredTensor, as_tensors, load_archive, load_legacy

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file starts that torch before 1.6 saved."""
TABLES = ("ema", "ema_model", "model_ema", "state_dict", "model_state_dict", "model", "module")
"""Names under which trainers save a state dict."""
MAX_PICKLE = 64 << 20
MAX_MEMBERS = 20_000
LOCAL_HEADER = struct.Struct("<4s22xHH")
NEEDED = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight", "out.0.weight")


def read(path: Path, weights: str, known: Mapping[str, Any]) -> Foreign:
    """Return the network of a state dict. Raises Malformed, InputError."""
    if weights not in ("ema", "model"):
        raise foreign.wrong_weights(weights, ["model"])
    notes: list[str] = []
    state = _without_prefix(state_dict(path, weights, notes), weights, notes)
    options, channels, num_classes = architecture(state)
    side = 32 << min(options.attention_levels, default=0)
    size, heads = (side, side) if options.attention_levels else None, options.head_channels
    assumed = {
        "image_size": (size, f"the image size: {side}x{side}, as ADM places attention"),
        "head_channels": (heads, f"the width of heads: {heads} channels"),
        "sigma_data": (0.5, "sigma_data: 0.5, as in the paper"),
    }
    size, heads, sigma_data = foreign.known_or_assumed(known, assumed, notes)
    options = replace(options, head_channels=heads)
    kind = foreign.known_kind(known, path, notes)
    rules = _rules(options, foreign.tensor_names(options, channels, num_classes), state)
    return Foreign(
        options=options,
        tensors=foreign.translate(rules, state),
        channels=channels,
        num_classes=num_classes,
        noise_label="iddpm" if options.learn_sigma else "log_1000",
        scalings="iddpm" if options.learn_sigma else None,
        image_size=size,
        sigma_data=sigma_data,
        kind="teacher" if options.learn_sigma else kind,
        grid=40 if kind == "consistency" else None,
        held=("model",),
        notes=tuple(notes),
    )


def _rules(options: AdmOptions, names: list[str], state: Mapping[str, Tensor]) -> dict[str, Rule]:
    """Return the rule of each of our names."""
    rules = {name: foreign.same(name) for name in names}
    # guided-diffusion's attention convolves sequences: (3C, C, 1), with rows ordered by head
    for name in (name for name in names if name in state and state[name].ndim == 3):
        if name.endswith("qkv.weight"):
            heads = foreign.heads_of(options, state[name].shape[0])
            for part in (name, name.replace("weight", "bias")):
                rules[part] = foreign.interleaved(part, heads, order="hqc")
        elif name.endswith("proj_out.weight"):
            rules[name] = foreign.same(name)._replace(read=lambda t: t[0][..., None])
    return rules


def state_dict(
    path: Path, weights: str = "model", notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Return the state dict of a torch.save archive or a safetensors file; no code can run.

    Trainers save it under a name, beside other things: the EMA is taken if `weights` is "ema", and
    a note says so. Tensors are views of the mapped file. Raises Malformed for archives that lie,
    and for anything but a table of tensors.
    """
    start = first_bytes(path)
    if start[8:9] == b"{":
        check_header(path)
        return read_weights(path)
    if start.startswith(LEGACY):
        with path.open("rb") as opened:
            content = load_legacy(opened, path.stat().st_size)
    else:
        content = _archive(path)
    for _ in range(3):  # a table may hold itself
        held = [name for name in TABLES if isinstance(content, dict) and content.get(name)]
        held = [name for name in held if isinstance(content[name], dict)]
        if held:
            content = content[_chosen(held, weights, [] if notes is None else notes)]
    if not isinstance(content, dict) or not content:
        raise Malformed("it holds no table of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise Malformed(f"its {str(name)[:60]!r} is not a tensor")
    return as_tensors(content, path.stat().st_size)


def _without_prefix(state: dict[str, Tensor], weights: str, notes: list[str]) -> dict[str, Tensor]:
    """Return a state dict without what wrappers put before its names, such as "module."."""
    prefixes = [name.removesuffix(NEEDED[0]) for name in state if name.endswith(NEEDED[0])]
    if not prefixes or "" in prefixes:
        return state
    prefix = _chosen(prefixes, weights, notes)
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _chosen(names: list[str], weights: str, notes: list[str]) -> str:
    """Return which of several networks to take: the EMA if `weights` is "ema"; a note says so."""
    chosen = min(names, key=lambda name: ("ema" in name) != (weights == "ema"))
    if len(names) > 1:
        notes.append(f"the file holds {len(names)} networks: that of {chosen[:40]!r} is used")
    return chosen


def _mapped(path: Path) -> memoryview:
    """Return the content of a file, mapped. Raises InputError where files cannot be mapped."""
    with path.open("rb") as opened:
        try:
            return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            what = f"{path} is on a file system that cannot map files into memory"
            raise InputError(what, "copy it to another disk") from None


def _archive(path: Path) -> Any:
    """Return what a torch.save archive describes, its storages mapped, not read."""
    whole = _mapped(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    members = {entry.filename: entry for entry in entries}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(members) < len(entries) or len(pickles) != 1 or len(entries) > MAX_MEMBERS:
        raise Malformed("its archive is not one that torch.save writes")
    if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
        raise Malformed("its archive is compressed, which torch.save never does")
    root = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> memoryview:
        entry = members.get(name)
        if entry is None:
            raise Malformed(f"its archive lacks {name[:80]!r}")
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(whole, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
        content = whole[start : start + entry.file_size]
        if signature != b"PK\x03\x04" or len(content) != entry.file_size:
            raise Malformed(f"its archive claims more for {name[:80]!r} than the file has")
        return content

    if f"{root}byteorder" in members and bytes(member(f"{root}byteorder")) != b"little":
        raise Malformed("it is big-endian")
    pickle = member(pickles[0])
    if len(pickle) > MAX_PICKLE:
        raise Malformed("its pickle is too large for a table of tensors")
    return load_archive(bytes(pickle), lambda key: member(f"{root}data/{key}"))


def architecture(state: dict[str, Tensor]) -> tuple[AdmOptions, int, int]:
    """Return options, channels and number of classes, from names and shapes. Raises Malformed."""
    for name in (name for name in NEEDED if name not in state):
        raise Malformed(f"it is not an ADM U-Net: {name} is missing")

    def shape(name: str, axis: int) -> int:
        if name not in state or axis >= state[name].ndim:
            raise Malformed(f"it is not an ADM U-Net: {name} is missing, or has another shape")
        return state[name].shape[axis]

    def entries(side: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(f"{side}.")})

    def has(name: str) -> bool:
        return f"{name}.weight" in state

    width = shape("time_embed.0.weight", 1)
    levels = 1
    for entry in range(entries("output_blocks")):
        children = [f"output_blocks.{entry}.{child}" for child in (1, 2)]
        levels += any(has(f"{child}.in_layers.0") or has(f"{child}.conv") for child in children)
    per_level, rest = divmod(entries("output_blocks"), levels)
    if rest or per_level < 2 or entries("input_blocks") != levels * per_level or width < 1:
        raise Malformed("it is not an ADM U-Net: its levels are uneven")
    first = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    widths = [shape(f"{entry}.0.out_layers.3.weight", 0) for entry in first]
    if any(w % width for w in widths):
        raise Malformed(f"it is not an ADM U-Net: widths {widths} are no multiples of {width}")
    channels = shape("input_blocks.0.0.weight", 1)
    out_channels = shape("out.2.weight", 0)
    if out_channels not in (channels, 2 * channels):
        raise Malformed(f"it turns {channels} channels into {out_channels}")
    attention = tuple(level for level in range(levels) if has(f"{first[level]}.1.qkv"))
    attended = [widths[level] for level in (*attention, levels - 1)]
    heads = next(h for h in (64, 32, 16, 8, 4, 2, 1) if all(w % h == 0 for w in attended))
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths))
    options = AdmOptions(
        model_channels=width,
        channel_mult=tuple(w // width for w in widths),
        num_res_blocks=per_level - 1,
        attention_levels=attention,
        head_channels=heads,
        scale_shift=shape(f"{first[0]}.0.emb_layers.1.weight", 0) == 2 * widths[0],
        resblock_updown=levels == 1 or not has(f"input_blocks.{per_level}.0.op"),
        norm_groups=groups,
        middle_norm=has("middle_block.1.norm"),
        learn_sigma=out_channels == 2 * channels,
    )
    return options, channels, shape("label_emb.weight", 0) if "label_emb.weight" in state else 0
