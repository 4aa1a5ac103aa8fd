"""EDM2's network in a snapshot: its options, and the names of its tensors.

ECT and TCM save the same network, which they start from. Source of the layout: Karras et al.
(2024), Fig. 21. The file itself is read by edm_pkl.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cmtool.core.networks.edm2 import Edm2Options
from cmtool.formats import foreign
from cmtool.formats.arguments import attention_levels, fraction, number, numbers, whole
from cmtool.formats.foreign import Malformed, Rule


def edm2_options(given: dict[str, Any], resolution: int, learn_sigma: bool) -> Edm2Options:
    """Return our options for the arguments of EDM2's UNet. Raises Malformed for unknown ones."""
    if learn_sigma:
        raise Malformed("its network returns a variance, which EDM2's never does")
    mult = numbers(given, "channel_mult", [1, 2, 3, 4])
    said = {key: value for key, value in given.items() if value is not None}
    dropout_res = whole(said, "dropout_res", 0)  # ECT's
    if "dout_resolutions" in said:  # TCM's
        dropout_res = max(numbers(said, "dout_resolutions", []))
    return Edm2Options(
        model_channels=whole(given, "model_channels", 192),
        channel_mult=mult,
        num_blocks=whole(given, "num_blocks", 3),
        attention_levels=attention_levels(given, [16, 8], resolution, len(mult)),
        head_channels=whole(given, "channels_per_head", 64),
        channel_mult_noise=whole(said, "channel_mult_noise", 0),
        channel_mult_emb=whole(said, "channel_mult_emb", 0),
        label_balance=fraction(given, "label_balance", 0.5),
        concat_balance=fraction(given, "concat_balance", 0.5),
        res_balance=fraction(given, "res_balance", 0.3),
        attention_balance=fraction(given, "attn_balance", 0.3),
        clip=number(given, "clip_act", 256),
        resample_filter=numbers(given, "resample_filter", [1, 1]),
        dropout=fraction(given, "dropout", 0),
        dropout_res=dropout_res,
    )


def edm2_rules(o: Edm2Options, names: list[str], resolution: int) -> dict[str, Rule]:
    """Return the rule of each name of our Edm2, from EDM2's UNet built at `resolution`."""
    stages = {stage.ours: stage for stage in stages_of(o, resolution)}
    prefixes = {ours: stage.theirs for ours, stage in stages.items()}
    leaves = {"attention.qkv": "attn_qkv", "attention.proj": "attn_proj"}
    theirs = foreign.renamed(names, prefixes, leaves)
    rules = {}
    for name, other in theirs.items():
        if name.endswith("_gain"):
            rules[name] = Rule((other,), lambda t: t[0].reshape(1), lambda t: [t.reshape(())])
        elif name.endswith("attention.qkv.weight"):
            heads = stages[".".join(name.split(".")[:2])].channels // o.head_channels
            rules[name] = foreign.interleaved(other, heads, order="hcq")
        else:
            rules[name] = foreign.same(other)
    return rules


class Stage(NamedTuple):
    """One block: our name, EDM2's, and the channels it gives."""

    ours: str
    theirs: str
    channels: int


def stages_of(o: Edm2Options, resolution: int) -> Iterator[Stage]:
    """Yield the blocks in the order of the forward pass."""
    top = len(o.channel_mult) - 1
    widths = [o.model_channels * mult for mult in o.channel_mult]
    down = [
        (level, role, widths[max(level - (role == "down"), 0)])
        for level in range(top + 1)
        for role in ("down" if level else "conv", *(f"block{i}" for i in range(o.num_blocks)))
    ]
    up = [
        (level, role, widths[min(level + (role == "up"), top)])
        for level in range(top, -1, -1)
        for role in (
            *(("up",) if level < top else ("in0", "in1")),
            *(f"block{i}" for i in range(o.num_blocks + 1)),
        )
    ]
    for side, blocks in (("enc", down), ("dec", up)):
        for index, (level, role, channels) in enumerate(blocks):
            at = resolution >> level
            yield Stage(f"{side}.{index}", f"{side}.{at}x{at}_{role}", channels)
