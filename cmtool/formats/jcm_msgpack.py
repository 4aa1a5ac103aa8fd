"""The CIFAR-10 checkpoints of the JAX release: a flax train state in msgpack, read without JAX.

Their NCSN++ is our `song` network with Fourier features, a residual encoder and FIR filters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from cmtool.core.networks.song import SongOptions
from cmtool.formats import foreign
from cmtool.formats.foreign import Foreign, Malformed, Rule
from cmtool.system.files import read_regular

TREES = {"ema": "params_ema", "model": "params", "target": "target_params"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK = "ResnetBlockBigGANpp"
MAX_DEPTH = 8
MAX_ITEMS = 100_000
MAX_BYTES = 4 << 30
DAMAGE = {"StackError": "it nests too deep", "FormatError": "an unknown code"}
CHUNKED = "__msgpack_chunked_array__"


def read(path: Path, weights: str, known: Mapping[str, Any]) -> Foreign:
    """Return the network of a checkpoint: `ema`, `model` or `target`. Raises Malformed."""
    state = _unpack(read_regular(path, MAX_BYTES))
    if "Conv_0" in state:  # the tree itself, without a train state around it
        state = {TREES["ema"]: state}
    held = [name for name, tree in TREES.items() if isinstance(state.get(tree), dict)]
    if not held:
        raise Malformed("it holds none of params_ema, params, target_params")
    if weights not in held:
        raise foreign.wrong_weights(weights, held)
    stored = _flatten(state[TREES[weights]])
    options, channels = architecture(stored)
    side = 16 << min(options.attention_levels, default=1)
    notes: list[str] = []
    assumed: dict[str, tuple[Any, str]] = {
        "image_size": ((side, side), f"the image size: {side}x{side}, as NCSN++ places attention"),
        "sigma_data": (0.5, "sigma_data: 0.5, as in the paper"),
    }
    size, sigma_data = foreign.known_or_assumed(known, assumed, notes)
    kind = "consistency" if "target" in held else foreign.known_kind(known, path, notes)
    return Foreign(
        options=options,
        tensors=foreign.translate(rules(options, foreign.tensor_names(options, channels)), stored),
        channels=channels,
        num_classes=0,
        noise_label="log",
        image_size=size,
        sigma_data=sigma_data,
        kind=kind,
        grid=18 if kind == "consistency" else None,
        held=tuple(held),
        notes=tuple(notes),
    )


def architecture(stored: Mapping[str, Tensor]) -> tuple[SongOptions, int]:
    """Return options and channels, from names and shapes. Raises Malformed."""

    def count(pattern: str) -> int:
        return len({match[0] for name in stored if (match := re.match(pattern, name))})

    def shape(name: str) -> torch.Size:
        if name not in stored:
            raise Malformed(f"it is not an NCSN++: {name} is missing")
        return stored[name].shape

    levels = count(r"Downsample_\d+/") + 1
    # n blocks and a down per level but the last, 2 in the middle, n + 1 and an up on the way back
    blocks, rest = divmod(count(rf"{BLOCK}_\d+/") - 3 * levels, 2 * levels)
    if rest or blocks < 1:
        raise Malformed("it is not an NCSN++: its levels are uneven")
    _, _, channels, width = shape("Conv_0/kernel")
    firsts = [level * (blocks + 1) for level in range(levels)]
    widths = [shape(f"{BLOCK}_{first}/Conv_1/kernel")[3] for first in firsts]
    if width < 1 or any(w % width for w in widths):
        raise Malformed(f"it is not an NCSN++: widths {widths} are not multiples of {width}")
    # one attention a block at some levels on the way down, one in the middle, one a level back
    attended, rest = divmod(count(r"AttnBlockpp_\d+/") - 1, blocks + 1)
    if rest or attended not in (0, 1):
        raise Malformed("it is not an NCSN++ with attention at one resolution")
    options = SongOptions(
        model_channels=width,
        channel_mult=tuple(w // width for w in widths),
        num_blocks=blocks,
        attention_levels=(1,) if attended else (),
        embedding="fourier",
        channel_mult_noise=2,
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )
    return options, channels


def rules(o: SongOptions, names: list[str]) -> dict[str, Rule]:
    """Return the rule of each of our names. The JAX modules are numbered in call order."""
    top = len(o.channel_mult) - 1
    order = []
    for level in range(top + 1):
        order += [f"enc.{level}.entry"] if level else []
        order += [f"enc.{level}.blocks.{i}" for i in range(o.num_blocks)]
    for j in range(top + 1):
        order += [f"dec.{j}.entry.{i}" for i in range(1 if j else 2)]
        order += [f"dec.{j}.blocks.{i}" for i in range(o.num_blocks + 1)]
    attentions = [ours for ours in order if f"{ours}.attention.qkv.weight" in names]
    modules = {"frequencies": "GaussianFourierProjection_0.W", "enc.0.entry": "Conv_0",
               "map_layer0": "Dense_0", "map_layer1": "Dense_1",
               f"dec.{top}.head.0": "GroupNorm_0", f"dec.{top}.head.2": "Conv_1"}  # fmt: skip
    modules |= {ours: f"{BLOCK}_{number}" for number, ours in enumerate(order)}
    modules |= {f"{ours}.attention": f"AttnBlockpp_{i}" for i, ours in enumerate(attentions)}
    modules |= {f"enc.{level + 1}.aux": f"Downsample_{level}.Conv2d_0" for level in range(top)}
    leaves = {"norm0": "GroupNorm_0", "conv0": "Conv_0", "affine": "Dense_0", "norm": "GroupNorm_0",
              "norm1": "GroupNorm_1", "conv1": "Conv_1", "skip": "Conv_2"}  # fmt: skip
    theirs = foreign.renamed(names, modules, leaves)
    return {name: _rule(path.replace(".", "/")) for name, path in theirs.items()}


def _rule(path: str) -> Rule:
    """Return the rule of a tensor: kernels are HWIO or (in, out), norms have a scale."""
    module, kind = path.rsplit("/", 1)
    at, _, leaf = module.rpartition("/")
    if leaf in ("qkv", "proj_out"):
        return _attention(at, leaf, kind)
    if kind != "weight":
        return foreign.same(path)
    if "GroupNorm" in module:
        return foreign.same(f"{module}/scale")
    if "Dense" in module:
        return foreign.transposed(f"{module}/kernel")
    names = (path if "Conv2d" in module else f"{module}/kernel",)
    return Rule(names, lambda t: t[0].permute(3, 2, 0, 1), lambda t: [t.permute(2, 3, 1, 0)])


def _attention(module: str, leaf: str, kind: str) -> Rule:
    """Return the rule of an attention: NIN_0 to NIN_2 are q, k and v, NIN_3 the projection."""
    letter = "W" if kind == "weight" else "b"
    names = tuple(f"{module}/NIN_{i}/{letter}" for i in (range(3) if leaf == "qkv" else [3]))
    if kind == "bias":
        return Rule(names, lambda t: torch.cat(list(t)), lambda t: t.chunk(len(names)))
    return Rule(
        names,
        lambda t: torch.cat([foreign.matrix(w).T for w in t])[..., None, None],
        lambda t: [w[..., 0, 0].T for w in t.chunk(len(names))],
    )


def _unpack(content: bytes) -> dict[str, Any]:
    """Return the root map, arrays as tensors. Raises Malformed."""
    met = 0

    def counted(items: Any) -> Any:
        nonlocal met
        met += 1
        if met > MAX_ITEMS:
            raise Malformed(f"it holds more than {MAX_ITEMS:,} lists and maps")
        return items

    try:
        state = msgpack.unpackb(
            content, ext_hook=_array, raw=False, list_hook=counted,
            object_pairs_hook=lambda pairs: _map(counted(pairs)),
            max_map_len=MAX_ITEMS, max_array_len=MAX_ITEMS,
        )  # fmt: skip
    except Malformed:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        reason = DAMAGE.get(type(error).__name__) or str(error) or "it cannot be read"
        raise Malformed(f"its msgpack is damaged: {reason}") from None
    if not isinstance(state, dict):
        raise Malformed("it is not a table")
    return state


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any] | Tensor:
    if not all(isinstance(key, str) for key, _ in pairs) or len(dict(pairs)) < len(pairs):
        raise Malformed("a key is not text, or comes twice")
    table = dict(pairs)
    return _joined(table) if CHUNKED in table else table


def _array(code: int, payload: bytes) -> Any:
    """Return the array of flax's extension 1; any other is kept out."""
    if code != 1:
        return None  # a scalar or a complex number, which no network has
    match msgpack.unpackb(payload, raw=False, max_array_len=64, max_map_len=0):
        case [list(shape), str(dtype), bytes(raw)]:
            pass
        case _:
            raise Malformed("an array is not shape, type and bytes")
    if dtype not in DTYPES:
        return None  # step counters and random states
    if len(shape) > MAX_DEPTH or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed("an array's shape is not made of whole numbers")
    if math.prod(shape) * DTYPES[dtype].itemsize != len(raw):
        raise Malformed(f"an array of shape {shape} has {len(raw)} bytes")
    if not raw:
        return torch.zeros(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def _joined(table: dict[str, Any]) -> Tensor:
    """Return an array of more than 1 GiB, which flax cuts into flat pieces."""
    shape, chunks = table.get("shape"), table.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise Malformed("an array in pieces has no shape or no pieces")
    sides: list[Any] = [shape.get(str(i)) for i in range(len(shape))]
    pieces: list[Any] = [chunks.get(str(i)) for i in range(len(chunks))]
    if not all(isinstance(piece, Tensor) for piece in pieces) or not pieces:
        raise Malformed("an array's pieces are not arrays")
    whole = torch.cat([piece.flatten() for piece in pieces])
    if any(type(n) is not int or n < 0 for n in sides) or math.prod(sides) != whole.numel():
        raise Malformed(f"an array of shape {sides} has {whole.numel()} values")
    return whole.reshape(sides)


def _flatten(tree: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return {"a/b/c": tensor} of a nested tree. Raises Malformed for anything else in it."""
    out = {}
    for name, value in tree.items():
        if "/" in name:
            raise Malformed(f"its {prefix}{name} may be two paths")
        if isinstance(value, Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, dict) and depth < MAX_DEPTH:
            out |= _flatten(value, f"{prefix}{name}/", depth + 1)
        else:
            raise Malformed(f"its {prefix}{name} is not an array")
    return out
