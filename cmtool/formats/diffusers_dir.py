"""A diffusers `ConsistencyModelPipeline` folder, read and written without diffusers.

Its UNet2DModel is the raw network, an Adm; scalings and noise label live in its scheduler.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cmtool.core.networks.adm import AdmOptions
from cmtool.formats import foreign
from cmtool.formats.foreign import Foreign, Malformed, Rule
from cmtool.formats.native import read_table
from cmtool.formats.openai_pt import state_dict
from cmtool.system.files import file_sha256

INDEX = "model_index.json"
CONFIG = Path("unet/config.json")
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin",
)  # fmt: skip
LEAVES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
}
NOISE = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
FIXED = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "time_embedding_type": ("positional",),
}
"""What a UNet2DModel's config must say, where it says anything, to be an Adm."""


def is_it(path: Path) -> bool:
    """Tell whether a path is a pipeline folder, or the folder of its network alone."""
    return any((path / name).is_file() for name in (INDEX, CONFIG.name))


def read(path: Path, weights: str, known: Mapping[str, Any]) -> Foreign:
    """Return the network of a folder. Raises ValueError (mostly Malformed), InputError."""
    if weights not in ("ema", "model"):
        raise foreign.wrong_weights(weights, ["model"])
    is_whole = (path / INDEX).is_file()
    index, scheduler = (read_table(path / n) if is_whole else {} for n in (INDEX, SCHEDULER))
    pipeline = str(index.get("_class_name", "not there"))
    unet = _network_folder(path)
    config = read_table(unet / CONFIG.name)
    options, channels, num_classes = _options(config)
    files = _weight_files(unet)
    if not files:
        raise Malformed(f"it holds none of {', '.join(WEIGHTS)}")
    state = {name: tensor for file in files for name, tensor in state_dict(file).items()}
    names = foreign.tensor_names(options, channels, num_classes)
    tensors = foreign.translate(rules(options, names), state)
    grid = _positive(scheduler, "num_train_timesteps", 40)
    if grid < 2 or grid != int(grid):
        raise Malformed("its num_train_timesteps is not a whole number of 2 or more")
    noise: dict[str, Any] = {k: _positive(scheduler, k, value) for k, value in NOISE.items()}
    notes = []
    if not options.middle_norm:
        notes.append(
            "its middle attention has no norm, as in exports by diffusers before 0.21: published"
            " ImageNet-64 weights need one: download them again if you use those"
        )
    is_consistency = pipeline == "ConsistencyModelPipeline"
    if not is_consistency:
        notes.append(f"its pipeline is {pipeline[:60]}: give --kind if it is a consistency model")
    return Foreign(
        options=options,
        tensors=tensors,
        channels=channels,
        num_classes=num_classes,
        noise_label="log_1000",
        image_size=_image_size(config),
        kind="consistency" if is_consistency else None,
        **noise,
        grid=int(grid),
        held=("model",),
        notes=tuple(notes),
    )


def _image_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images of a UNet2DModel, None if its config lacks them."""
    match config.get("sample_size"):
        case None:
            return None
        case int(side) if type(side) is int:
            return side, side
        case [int(height), int(width)] if type(height) is type(width) is int:
            return height, width
    raise Malformed("its sample_size is neither a number nor two")


def write(
    folder: Path,
    options: AdmOptions,
    tensors: dict[str, Tensor],
    *,
    channels: int,
    num_classes: int,
    image_size: int,
    scheduler: dict[str, float],
) -> None:
    """Write a ConsistencyModelPipeline into the empty folder `folder`.

    `scheduler` gives num_train_timesteps, sigma_min, sigma_max, sigma_data and rho. Raises
    Malformed for options that UNet2DModel cannot express.
    """
    config = _config(options, channels, num_classes, image_size)
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    steps = {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": True, "s_noise": 1.0}
    for name, content in {
        INDEX: index,
        os.fspath(CONFIG): config,
        SCHEDULER: steps | scheduler,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    theirs = foreign.translate_back(rules(options, list(tensors)), tensors)
    save_file(theirs, folder / "unet" / WEIGHTS[0], metadata={"format": "pt"})
    (folder / "unet" / WEIGHTS[0]).chmod((folder / INDEX).stat().st_mode)


def sha256(path: Path) -> str:
    """Return the hash of the names and hashes of a pipeline's files, those that are read."""
    unet = _network_folder(path)
    tables = (path / INDEX, unet / CONFIG.name, path / SCHEDULER)
    whole = hashlib.sha256()
    for file in [*filter(Path.is_file, tables), *_weight_files(unet)]:
        whole.update(f"{file.relative_to(path)} {file_sha256(file)}\n".encode())
    return whole.hexdigest()


def _network_folder(path: Path) -> Path:
    return path / CONFIG.parent if (path / INDEX).is_file() else path


def _weight_files(unet: Path) -> list[Path]:
    """Return the file of the weights, or their shards; none where there are no weights."""
    for name in WEIGHTS:
        if (unet / name).is_file():
            return [unet / name]
    for index in sorted(unet.glob("diffusion_pytorch_model.*index*.json")):
        shards = read_table(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise Malformed(f"its {index.name} names no shards")
        if any(not isinstance(name, str) or Path(name).name != name for name in shards.values()):
            raise Malformed(f"its {index.name} names files of another folder")
        return [unet / name for name in sorted(set(shards.values()))]
    return []


def rules(o: AdmOptions, names: list[str]) -> dict[str, Rule]:
    """Return the rule of each of our names."""
    top = len(o.channel_mult) - 1
    prefixes = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
    }
    ends = {"stem": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out"}
    for stage in foreign.adm_blocks(o):
        place, resample = {
            "encoder": (f"down_blocks.{stage.level}", "downsamplers.0"),
            "middle": ("mid_block", ""),
            "decoder": (f"up_blocks.{top - stage.level}", "upsamplers.0"),
        }[stage.side]
        inner = {"block": f"resnets.{stage.number}", "attention": f"attentions.{stage.number}"}
        leaf = inner.get(stage.role, resample)
        prefixes[stage.prefix] = ends.get(stage.role, f"{place}.{leaf}")
    out = {}
    for name, other in foreign.renamed(names, prefixes, LEAVES).items():
        if ".qkv." in name:
            q, k, v = (other.replace(".qkv.", f".to_{letter}.") for letter in "qkv")
            out[name] = foreign.thirds((q, k, v))
        else:
            out[name] = (
                foreign.squeezed(other) if name.endswith("proj_out.weight") else foreign.same(other)
            )
    return out


def _options(config: dict[str, Any]) -> tuple[AdmOptions, int, int]:
    """Return options, channels and number of classes of a UNet2DModel's config."""
    for key, good in FIXED.items():
        if config.get(key, good[0]) not in good:
            raise Malformed(f"its {key} = {str(config[key])[:60]!r}; an ADM U-Net has {good[0]!r}")
    keys = ("down_block_types", "up_block_types", "in_channels", "num_class_embeds")
    found: list[Any] = [config.get(key) for key in keys]
    types, mirror, channels, classes = found
    widths: Any = config.get("block_out_channels") or [0]
    sizes = {"norm_num_groups": 32, "attention_head_dim": 8, "layers_per_block": 2}
    groups, heads, blocks = (config.get(key, default) for key, default in sizes.items())
    if not isinstance(widths, list):
        raise Malformed("its block_out_channels is not a list")
    numbers = [*widths, channels, groups, heads, blocks, 1 if classes is None else classes]
    if any(type(n) is not int or not 0 < n <= 1 << 20 for n in numbers):
        raise Malformed("its config has sizes that are not whole numbers")
    if not isinstance(types, list) or len(types) != len(widths):
        raise Malformed("its down_block_types and block_out_channels differ in number")
    if any(w % widths[0] for w in widths) or config.get("out_channels") != channels:
        raise Malformed("its widths or channels are not an ADM U-Net's")
    if not isinstance(mirror, list) or any(not isinstance(t, str) for t in [*types, *mirror]):
        raise Malformed("its block types are not names")
    attention = [t.startswith("Attn") for t in types]
    convolving = {"DownBlock2D"}
    if config.get("downsample_type") == "conv":
        convolving.add("AttnDownBlock2D")
    convolves = [t in convolving for t in types[:-1]]
    if [t.startswith("Attn") for t in mirror] != attention[::-1] or len(set(convolves)) > 1:
        raise Malformed("its blocks on the way up do not mirror those on the way down")
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    middle_groups = config.get("attn_norm_num_groups")
    if middle_groups not in (None, groups):
        raise Malformed("its attn_norm_num_groups is not its norm_num_groups")
    options = AdmOptions(
        model_channels=widths[0],
        channel_mult=tuple(w // widths[0] for w in widths),
        num_res_blocks=blocks,
        attention_levels=tuple(level for level, has in enumerate(attention) if has),
        head_channels=heads,
        scale_shift=scale_shift,
        resblock_updown=not any(convolves),
        norm_groups=groups,
        middle_norm=not scale_shift or middle_groups is not None,
    )
    return options, channels, classes or 0


def _config(o: AdmOptions, channels: int, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return the config of a UNet2DModel. Raises Malformed for options it cannot express."""
    widths = [o.model_channels * mult for mult in o.channel_mult]
    groups = {min(o.norm_groups, w // o.min_group_channels) for w in widths}
    odd = {
        "learn_sigma": o.learn_sigma,
        "augment_dim": o.augment_dim,
        "channel_mult": o.channel_mult[0] != 1,
        "min_group_channels": groups != {o.norm_groups},
        "middle_norm": not o.middle_norm and not o.scale_shift,
        "middle_attention": not o.middle_attention,
        "double_norm": o.double_norm,
    }
    for name, differs in odd.items():
        if differs:
            raise Malformed(f"diffusers has no network with {name} = {getattr(o, name)}")
    down, up, resample = ("DownBlock2D", "UpBlock2D", "conv")
    if o.resblock_updown:
        down, up, resample = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet")
    attended = [level in o.attention_levels for level in range(len(widths))]
    return {
        "_class_name": "UNet2DModel",
        **{key: good[0] for key, good in FIXED.items()},
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": o.num_res_blocks,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in attended[::-1]],
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": o.dropout,
        "attention_head_dim": o.head_channels,
        "norm_num_groups": o.norm_groups,
        "attn_norm_num_groups": o.norm_groups if o.middle_norm else None,
        "num_class_embeds": num_classes or None,
        "resnet_time_scale_shift": "scale_shift" if o.scale_shift else "default",
    }


def _positive(table: dict[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise Malformed(f"its {key} = {str(value)[:60]!r} is not a positive number")
    return float(value)
