"""What each reader of foreign weights returns, and how they rename tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.edm2 import Edm2, Edm2Options
from cmtool.core.networks.song import Song, SongOptions
from cmtool.errors import InputError
from cmtool.system.devices import shapes_only

Options = AdmOptions | SongOptions | Edm2Options
ForeignKind = Literal["teacher", "consistency"]
RELEASED: dict[str, ForeignKind] = {"edm": "teacher", "cd": "consistency", "ct": "consistency"}
"""The kinds of models by a word in the names of their released files."""


class Malformed(ValueError):
    """The file is of the format, but not a model that cmtool knows."""


@dataclass(frozen=True)
class Foreign:
    """A model read from the file of another tool; tensors are float32 and have our names.

    `image_size` and `kind` are None if neither the file nor the user says them, `scalings` if the
    kind tells them. `notes` tell the user what was assumed. `held` names all weights in the file;
    one name stands for any asked for.
    """

    options: Options
    tensors: dict[str, Tensor]
    channels: int
    num_classes: int
    noise_label: str | dict[str, Any]
    image_size: tuple[int, int] | None = None
    kind: ForeignKind | None = None
    scalings: str | None = None
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    grid: int | None = None
    held: tuple[str, ...] = ("ema",)
    notes: tuple[str, ...] = ()


def tensor_names(options: Options, channels: int, num_classes: int = 0) -> list[str]:
    """Return the names of the tensors of our network with these options."""
    make: dict[type, Any] = {AdmOptions: Adm, SongOptions: Song, Edm2Options: Edm2}
    with shapes_only():
        return list(make[type(options)](options, channels, num_classes).state_dict())


def known_or_assumed(
    known: Mapping[str, Any], assumed: Mapping[str, tuple[Any, str]], notes: list[str]
) -> list[Any]:
    """Return the user's value of each key of `assumed`, else the assumed one, and add its note."""
    said = [note for key, (_, note) in assumed.items() if key not in known]
    notes += [f"the file does not give {note} (--preset overrides it)" for note in said]
    return [known.get(key, value) for key, (value, _) in assumed.items()]


def known_kind(known: Mapping[str, Any], path: Path, notes: list[str]) -> ForeignKind | None:
    """Return the kind that the user says, else the kind that the name suggests, with a note."""
    if "kind" in known:
        return cast(ForeignKind, known["kind"])
    for part in (path.stem, path.parent.name, path.parent.parent.name):
        words = re.split(r"[_\-.]", part.lower())
        for word, kind in RELEASED.items():
            if word in words:
                notes.append(f"by its name it is a {kind} model (--kind overrides it)")
                return kind
    return None


class Rule(NamedTuple):
    """How one of our tensors is made from foreign ones, and the other way round."""

    names: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor]
    write: Callable[[Tensor], Sequence[Tensor]]


def same(name: str) -> Rule:
    """Return the rule of a tensor that only changes its name."""
    return Rule((name,), lambda t: t[0], lambda t: [t])


def transposed(name: str) -> Rule:
    """Return the rule of a matrix that is stored transposed."""
    return Rule((name,), lambda t: matrix(t[0]).T, lambda t: [t.T])


def matrix(t: Tensor) -> Tensor:
    """Return the tensor. Raises Malformed unless it has two dimensions."""
    if t.ndim != 2:
        raise Malformed(f"a matrix has {t.ndim} dimensions")
    return t


def squeezed(name: str) -> Rule:
    """Return the rule of a 1x1 convolution (O, I, 1, 1) stored as a matrix (O, I)."""
    return Rule((name,), lambda t: t[0][..., None, None], lambda t: [t.squeeze(-1).squeeze(-1)])


def thirds(names: tuple[str, str, str]) -> Rule:
    """Return the rule of qkv stored as three matrices (or biases), one below the other in ours."""

    def read(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts))
        return whole[..., None, None] if whole.ndim == 2 else whole

    return Rule(names, read, lambda t: (t[..., 0, 0] if t.ndim == 4 else t).chunk(3))


def interleaved(name: str, heads: int, *, order: Literal["hcq", "hqc"]) -> Rule:
    """Return the rule of qkv rows in another order than ours, (3, heads, head channels).

    "hcq" is (heads, head channels, 3) as in EDM, "hqc" (heads, 3, head channels) as in
    guided-diffusion. Trailing dimensions may be missing in the file.
    """
    sizes, axis = ((heads, -1, 3), 2) if order == "hcq" else ((heads, 3, -1), 1)

    def read(parts: Sequence[Tensor]) -> Tensor:
        t = parts[0]
        out = t.reshape(*sizes, *t.shape[1:]).movedim(axis, 0).reshape(t.shape)
        return out if out.ndim in (1, 4) else out.reshape(*out.shape[:2], 1, 1)

    def write(t: Tensor) -> Sequence[Tensor]:
        return [t.reshape(3, heads, -1, *t.shape[1:]).movedim(0, axis).reshape(t.shape)]

    return Rule((name,), read, write)


def translate(rules: Mapping[str, Rule], foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors, float32, contiguous. Raises Malformed unless all are there and used."""
    wanted = {name for rule in rules.values() for name in rule.names}
    missing, left = sorted(wanted - foreign.keys()), sorted(foreign.keys() - wanted)
    if missing:
        raise Malformed(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if left:
        raise Malformed(f"{len(left)} tensors are unknown, the first is {left[0]}")
    out = {}
    for name, rule in rules.items():
        for n in rule.names:
            if not foreign[n].is_floating_point():
                raise Malformed(f"tensor {n} is of {foreign[n].dtype}")
        out[name] = rule.read([foreign[n] for n in rule.names]).float().contiguous()
        if not torch.isfinite(out[name]).all():
            raise Malformed(f"tensor {rule.names[0]} holds values that are not finite")
    return out


def translate_back(rules: Mapping[str, Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the foreign tensors of ours; `rules` must name each of ours."""
    assert rules.keys() == ours.keys(), sorted(rules.keys() ^ ours.keys())
    return {
        name: tensor.contiguous()
        for key, rule in rules.items()
        for name, tensor in zip(rule.names, rule.write(ours[key]), strict=True)
    }


class AdmBlock(NamedTuple):
    """One block of an Adm network and its position; `number` counts within its level."""

    prefix: str
    side: Literal["encoder", "middle", "decoder"]
    role: Literal["stem", "block", "attention", "resample", "out_norm", "out_conv"]
    level: int
    number: int


def adm_blocks(o: AdmOptions) -> Iterator[AdmBlock]:
    """Yield the blocks of an Adm network in the order of its forward pass."""
    top = len(o.channel_mult) - 1
    yield AdmBlock("input_blocks.0.0", "encoder", "stem", 0, 0)
    entry = 1
    for level in range(top + 1):
        for index in range(o.num_res_blocks):
            yield AdmBlock(f"input_blocks.{entry}.0", "encoder", "block", level, index)
            if level in o.attention_levels:
                yield AdmBlock(f"input_blocks.{entry}.1", "encoder", "attention", level, index)
            entry += 1
        if level < top:
            yield AdmBlock(f"input_blocks.{entry}.0", "encoder", "resample", level, 0)
            entry += 1
    yield AdmBlock("middle_block.0", "middle", "block", top, 0)
    yield AdmBlock("middle_block.1", "middle", "attention", top, 0)
    yield AdmBlock("middle_block.2", "middle", "block", top, 1)
    entry = 0
    for level in range(top, -1, -1):
        for index in range(o.num_res_blocks + 1):
            child = 1
            yield AdmBlock(f"output_blocks.{entry}.0", "decoder", "block", level, index)
            if level in o.attention_levels:
                yield AdmBlock(f"output_blocks.{entry}.1", "decoder", "attention", level, index)
                child = 2
            if level > 0 and index == o.num_res_blocks:
                yield AdmBlock(f"output_blocks.{entry}.{child}", "decoder", "resample", level, 0)
            entry += 1
    yield AdmBlock("out.0", "decoder", "out_norm", 0, 0)
    yield AdmBlock("out.2", "decoder", "out_conv", 0, 0)


def renamed(names: list[str], prefixes: dict[str, str], leaves: dict[str, str]) -> dict[str, str]:
    """Return {our name: foreign name}: the longest known prefix, then the leaf, are replaced."""
    out = {}
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if (prefix := ".".join(parts[:end])) in prefixes:
                leaf, kind = ".".join(parts[end:-1]), parts[end:][-1:]
                inner = [prefixes[prefix], leaves.get(leaf, leaf), *kind]
                out[name] = ".".join(filter(None, inner))
                break
        else:
            out[name] = name
    return out


def heads_of(options: AdmOptions, rows: int) -> int:
    """Return the number of heads of a qkv with so many rows. Raises Malformed if uneven."""
    channels = rows // 3
    if rows % 3 or channels % options.head_channels:
        raise Malformed(f"{channels} channels do not divide into heads of {options.head_channels}")
    return channels // options.head_channels


def wrong_weights(asked: str, held: Sequence[str]) -> InputError:
    """Return the error for weights that a file does not hold."""
    return InputError(f"the file holds no weights {asked!r}", f"it holds {', '.join(held)}")
