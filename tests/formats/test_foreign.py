"""Every foreign format gives the numbers of the code that wrote it; see golden/README.md."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.layers import AttentionBlock
from cmtool.core.networks.song import Song, SongOptions
from cmtool.core.precond import SCALINGS, consistency_scalings, iddpm_sigmas
from cmtool.errors import InputError, UserError
from cmtool.formats import FORMATS, identify, openai_pt, read_foreign
from cmtool.formats.diffusers_dir import rules as diffusers_rules
from cmtool.formats.edm_pkl import adm_options, adm_rules, song_options, song_rules
from cmtool.formats.foreign import Malformed, interleaved, translate, translate_back
from cmtool.formats.jcm_msgpack import rules as jcm_rules
from cmtool.models import load_model
from tests.formats import test_hostile as hostile
from tests.golden import GOLDEN, golden

WEIGHTS = {
    "openai_unet_cond": "openai_unet_cond.pt",
    "openai_unet_uncond": "openai_unet_uncond.pt",
    "edm_ddpmpp": "edm_ddpmpp.pkl",
    "edm_ncsnpp": "edm_ncsnpp.pkl",
    "edm_adm": "edm_adm.pkl",
    "jcm_checkpoint_80": "jcm_checkpoint_80",
    "diffusers_cm": "diffusers_cm",
}
KEYS = {"teacher": ["denoised", "edm_denoised"], "consistency": ["consistency_output"]}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return lambda case: golden(WEIGHTS[case], folder)


def load(case, weights, kind=None):
    preset = GOLDEN / f"{case}.toml"
    return load_model(weights(case), kind=kind, preset=str(preset) if preset.exists() else None)


def close(ours, wanted, bound=1e-5):
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < bound


@pytest.mark.parametrize("kind", ["teacher", "consistency"])
@pytest.mark.parametrize("case", [case for case in WEIGHTS if case != "diffusers_cm"])
@torch.no_grad()
def test_outputs_are_the_golden_ones(case, kind, weights):
    numbers = load_file(GOLDEN / f"{case}.safetensors")
    wanted = [numbers[key] for key in KEYS[kind] if key in numbers]
    if not wanted:  # EDM's own files hold a teacher's answers only
        assert case.startswith("edm")
        return
    model = load(case, weights, kind)
    assert not model.f.training
    close(model.f(numbers["x"], numbers["sigma"], numbers.get("labels")), wanted[0])


@torch.no_grad()
def test_diffusers_network_and_images_are_the_golden_ones(weights):
    from cmtool.core.samplers import clipped, multistep

    numbers = load_file(GOLDEN / "diffusers_cm.safetensors")
    model = load("diffusers_cm", weights)
    close(
        model.f.network(numbers["unet_x"], numbers["unet_t"], numbers["labels"]),
        numbers["unet_out"],
    )
    for key, sigmas in [
        ("images_1step", [80.0]),
        ("images_timesteps_22_0", numbers["sigmas_22_0"]),
    ]:
        levels = [float(sigma) for sigma in sigmas][:2]
        draws = iter([numbers["unit_noise"], *numbers["noises"]])
        x0 = multistep(
            clipped(model.f), torch.zeros_like(numbers["unit_noise"]), levels,
            lambda _, draws=draws: next(draws), sigma_min=0.002, labels=numbers["labels"],
        )  # fmt: skip
        close(x0 / 2 + 0.5, numbers[key])


@pytest.mark.parametrize(
    ("case", "name"),
    [("openai_unet_cond", "openai"), ("edm_ddpmpp", "edm"), ("jcm_checkpoint_80", "jcm"),
     ("diffusers_cm", "diffusers")],
)  # fmt: skip
def test_formats_are_told_by_content(case, name, weights, tmp_path):
    path = tmp_path / "model.bin"
    path.symlink_to(weights(case))
    assert identify(path) == name
    assert name in FORMATS


OTHERS = {
    "PNG": b"\x89PNG\r\n\x1a\n", "HDF5": b"\x89HDF\r\n\x1a\n", "ONNX": b"\x08\x07", "GGUF": b"GGUF",
    "gzip": b"\x1f\x8b\x08", "JSON": b'{"weight_map": {}}', "a table of numbers": b"\x82\x01\x02",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_taken_for_none(kind, tmp_path):
    (tmp_path / "x.pt").write_bytes(OTHERS[kind] + bytes(100))
    with pytest.raises(InputError, match=r"x\.pt is not a model that cmtool knows"):
        load_model(str(tmp_path / "x.pt"))


def test_what_the_file_says_is_taken_over(weights):
    model = load("edm_ncsnpp", weights)
    assert model.kind == "teacher"
    assert model.preset.model.image_size == (16, 16)
    assert model.preset.model.num_classes == 10
    assert model.preset.model.noise_label.name == "log"
    assert model.notes == ()
    network = model.f.network
    assert isinstance(network, Song)
    assert network.options == SongOptions(
        model_channels=16, channel_mult=(2, 2), num_blocks=1, attention_levels=(1,),
        embedding="fourier", channel_mult_noise=2, encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )  # fmt: skip
    model = load("diffusers_cm", weights)
    assert model.kind == "consistency"
    assert model.preset.sample.grid == 40
    assert any("no norm" in note for note in model.notes)


def test_what_the_file_does_not_say_is_told_or_asked(weights, tmp_path):
    path = weights("openai_unet_uncond")
    with pytest.raises(UserError, match="teacher or a consistency model"):
        load_model(path)
    model = load_model(path, kind="teacher")
    for word in ("image size: 64x64", "heads: 64", "sigma_data: 0.5"):
        assert any(word in note and "--preset" in note for note in model.notes)
    model = load_model(path, preset=str(GOLDEN / "openai_unet_uncond.toml"))
    assert model.preset.model.image_size == (16, 16)
    assert model.notes == ()
    assert model.f.network.options.head_channels == 16
    other = tmp_path / "other.toml"
    text = (GOLDEN / "openai_unet_uncond.toml").read_text()
    other.write_text(text.replace("num_res_blocks = 1", "num_res_blocks = 2"))
    with pytest.raises(InputError, match="num_res_blocks 1, the preset 2"):
        load_model(path, preset=str(other))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("edm_imagenet64_ema", "teacher"), ("cd_imagenet64_lpips", "consistency"),
     ("ct_bedroom256", "consistency"), ("model600000", None)],
)  # fmt: skip
def test_released_names_tell_the_kind(name, kind, weights, tmp_path):
    path = tmp_path / f"{name}.pt"
    path.symlink_to(weights("openai_unet_cond"))
    found = read_foreign(identify(path), path, "ema", {})
    assert found.kind == kind
    assert any("by its name" in note for note in found.notes) == (kind is not None)
    other = read_foreign(identify(path), path, "ema", {"kind": "teacher"})
    assert other.kind == "teacher"
    assert not any("by its name" in note for note in other.notes)


VP = {"M": 11, "beta_d": 5.0, "beta_min": 0.3, "sigma_min": 0.01, "sigma_max": 40.0}
VE = {"sigma_min": 0.02, "sigma_max": 100.0}
LEVELS = iddpm_sigmas(0.01, 0.02, 9)
IDDPM = {"M": 9, "C_1": 0.01, "C_2": 0.02, "sigma_min": LEVELS[8], "sigma_max": LEVELS[0]}


@pytest.mark.parametrize(
    ("name", "state", "family", "noise", "label"),
    [
        ("VPPrecond", VP, "vp", (0.01, 40.0),  # the constants of its schedule are its own
         lambda t: ((torch.exp(5.0 * t**2 / 2 + 0.3 * t) - 1).sqrt(), 10 * t)),
        ("VEPrecond", VE, "ve", (0.02, 80.0), lambda t: (t, (t / 2).log())),
        ("iDDPMPrecond", IDDPM, "iddpm", (LEVELS[8], min(LEVELS[0], 80.0)),
         lambda t: (torch.tensor([LEVELS[8], LEVELS[4], LEVELS[0]]), torch.tensor([0.0, 4, 8]))),
        ("ECMPrecond", {"sigma_min": 0.003}, "consistency", (0.003, 80.0),
         lambda t: (t, t.log() / 4)),
    ],
)  # fmt: skip
def test_preconditioners_of_edm_are_read_with_their_constants(
    name, state, family, noise, label, tmp_path
):
    levels = {"u": hostile.tensor(torch.tensor(LEVELS))} if name == "iDDPMPrecond" else {}
    learns = name == "iDDPMPrecond"  # and gives twice the channels
    path = tmp_path / "baseline.pkl"
    path.write_bytes(hostile.snapshot(
        name=name, state={**state, "_buffers": levels}, given={"out_channels": 6 if learns else 3},
        tensors=hostile.song_code(replace(hostile.SONG, learn_sigma=learns)),
    ))  # fmt: skip
    model = load_model(path)
    assert model.f.network.options.learn_sigma == learns
    assert model.kind == ("consistency" if family == "consistency" else "teacher")
    wanted = consistency_scalings if family == "consistency" else SCALINGS[family]
    assert model.f.scalings is wanted
    assert model.noise_range[:2] == pytest.approx(noise)
    sigma, c_noise = label(torch.tensor([0.2, 0.5, 0.9]))
    torch.testing.assert_close(model.f.noise_label(sigma), c_noise, rtol=1e-4, atol=1e-4)


SONG_KWARGS = {"model_channels": 128, "channel_mult": [2, 2, 2], "augment_dim": 9, "dropout": 0.13}
NCSNPP_KWARGS = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
                 "resample_filter": [1, 3, 3, 1]}  # fmt: skip
MULT64 = {"channel_mult": [1, 2, 2, 2]}


@pytest.mark.parametrize(
    ("read_options", "given", "resolution", "classes", "count"),
    [
        (song_options, SONG_KWARGS, 32, 0, 55_733_891),
        (song_options, SONG_KWARGS | NCSNPP_KWARGS, 32, 10, 56_400_643),
        (song_options, SONG_KWARGS | MULT64, 64, 0, 61_805_571),
        (song_options, SONG_KWARGS | NCSNPP_KWARGS | MULT64, 64, 0, 62_761_091),
        (adm_options, {"model_channels": 192, "channel_mult": [1, 2, 3, 4]}, 64, 1000, 295_899_267),
    ],
)
def test_arguments_that_edm_leaves_to_their_defaults(
    read_options, given, resolution, classes, count
):
    """Its files hold the arguments its training script gives, and no others."""
    options = read_options(given, resolution, False)
    with torch.device("meta"):
        network = (Song if read_options is song_options else Adm)(options, 3, classes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert options.attention_levels == tuple(
        level for level in range(len(options.channel_mult))
        if resolution >> level in (16, *((32, 8) if classes == 1000 else ()))
    )  # fmt: skip
    assert read_options({}, resolution, False).dropout == 0.1
    assert read_options({}, 64, False).channel_mult == {
        song_options: (1, 2, 2, 2), adm_options: (1, 2, 3, 4),
    }[read_options]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "levels", "middle"),
    [
        ({"model_channels": 32, "channel_mult": [1, 1]}, (), False),
        ({"model_channels": 32, "channel_mult": [1, 2]}, (1,), True),
        ({"model_channels": 64, "channel_mult": [1, 1]}, (0, 1), True),
    ],
)
def test_adm_of_edm_has_no_attention_where_it_is_narrower_than_a_head(given, levels, middle):
    """EDM counts channels // 64 heads, which may be none."""
    options = adm_options({**given, "num_blocks": 1}, 32, False)
    assert (options.attention_levels, options.middle_attention) == (levels, middle)
    network = Adm(options, 3).eval()
    attended = sum(isinstance(part, AttentionBlock) for part in network.modules())
    assert attended == 3 * len(levels) + middle
    assert network(torch.zeros(1, 3, 32, 32), torch.zeros(1)).shape == (1, 3, 32, 32)
    rules = adm_rules(options, list(network.state_dict()), 32)
    theirs = {name for rule in rules.values() for name in rule.names}
    assert ("dec.16x16_in0.qkv.weight" in theirs) == middle
    assert "dec.16x16_in1.conv0.weight" in theirs


def edm2(encoder):
    """Return a snapshot as EDM2 writes it: half precision, buffers, an encoder beside the network.

    The layout is that of its training loop; the names are those of its modules.
    """
    half = torch.arange(6.0).reshape(2, 3).half()
    content = hostile.stored(half.numpy().tobytes(), kind="HalfStorage", count=6, second=6)
    weight = hostile.view(hostile.Call(hostile.LOAD, (content,)), (2, 3), (3, 1))
    fourier = hostile.record("MPFourier", hostile.module() | {"_buffers": {"freqs": weight}})
    conv = hostile.record("MPConv", hostile.module({"weight": weight}))
    unet = hostile.record("UNet", hostile.module({}, {"emb_fourier": fourier, "emb_noise": conv}))
    arguments = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 192}
    network = hostile.record(
        "Precond",
        hostile.module({}, {"unet": unet, "logvar_fourier": hostile.record(
            "MPFourier", hostile.module() | {"_buffers": {"freqs": weight}}
        )}) | {"_init_args": (), "_init_kwargs": arguments, "sigma_data": 0.5, "use_fp16": True},
    )  # fmt: skip
    return hostile.pickled(hostile.Raw(
        hostile.code(hostile.Name("dnnlib.util", "EasyDict")) + b")\x81"
        + b"(" + hostile.code("encoder") + hostile.code(encoder)
        + hostile.code("ema") + hostile.code(network) + b"u"
    ))  # fmt: skip


def test_snapshots_of_edm2_on_latents_are_refused_by_name(tmp_path):
    path = tmp_path / "edm2-img512-s.pkl"
    path.write_bytes(edm2(hostile.record("StabilityVAEEncoder", {})))
    with pytest.raises(InputError, match="latents of a StabilityVAEEncoder, not pixels"):
        load_model(path)


def test_snapshots_of_edm2_with_an_autoencoder_are_refused_with_the_remedy(tmp_path):
    """Its normalisation is numpy arrays, which the reader does not build."""
    array = hostile.Call(
        hostile.Name("numpy._core.multiarray", "_reconstruct"),
        (hostile.Name("numpy", "ndarray"), (0,), b"b"),
    )
    path = tmp_path / "edm2-img512-s.pkl"
    path.write_bytes(edm2(hostile.record("StabilityVAEEncoder", {"scale": array})))
    with pytest.raises(InputError, match=r"numpy\._core\.multiarray\._reconstruct") as caught:
        load_model(path)
    assert "snapshots of EDM, EDM2, ECT and TCM in pixels; no latents" in caught.value.hint


def test_levels_of_a_file_are_those_of_its_release(weights, tmp_path):
    cd = tmp_path / "cd_cifar10_l2.pt"
    cd.symlink_to(weights("openai_unet_cond"))
    jax = tmp_path / "cd-l2_checkpoint_80"
    jax.symlink_to(weights("jcm_checkpoint_80"))
    folder = tmp_path / "pipe"
    shutil.copytree(weights("diffusers_cm"), folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(
        json.dumps({**json.loads(schedule.read_text()), "num_train_timesteps": 201})
    )
    for path, grid in [(cd, 40), (jax, 18), (folder, 201)]:
        assert load_model(path).preset.sample.grid == grid


def test_noise_labels_are_those_of_each_family(weights):
    sigma = torch.tensor([80.0])
    labels = {case: float(load(case, weights, "teacher").f.noise_label(sigma)) for case in WEIGHTS}
    logarithm = 4.382026634673881
    for case, label in labels.items():
        factor = 250 if case.startswith(("openai", "diffusers")) else 0.25
        assert label == pytest.approx(factor * logarithm, rel=1e-6)


def test_jax_checkpoint_holds_ema_and_raw_weights(weights):
    path = weights("jcm_checkpoint_80")
    ema, raw = (read_foreign("jcm", path, name, {}) for name in ("ema", "model"))
    assert ema.held == ("ema", "model")
    assert not torch.equal(ema.tensors["map_layer0.weight"], raw.tensors["map_layer0.weight"])
    with pytest.raises(InputError, match="no weights 'target'"):
        read_foreign("jcm", path, "target", {})


def test_jax_checkpoint_with_a_target_tree_is_a_consistency_model(weights, tmp_path):
    import msgpack

    state = msgpack.unpackb(weights("jcm_checkpoint_80").read_bytes(), strict_map_key=False)
    state["target_params"] = state["params"]
    path = tmp_path / "checkpoint_74"
    path.write_bytes(msgpack.packb(state))
    model = load_model(path)
    assert model.kind == "consistency"
    assert model.held == ("ema", "model", "target")
    raw = load_model(path, weights="model")
    target = load_model(path, weights="target")
    for name, tensor in target.f.network.state_dict().items():
        assert torch.equal(tensor, raw.f.network.state_dict()[name])
    path.write_bytes(msgpack.packb(state["params_ema"]))  # the tree alone
    assert load_model(path, kind="teacher").held == ("ema",)


def test_guided_diffusion_order_of_attention_rows(weights, tmp_path):
    ours = load("openai_unet_uncond", weights, "teacher").f.network
    theirs = {}
    for name, tensor in ours.state_dict().items():
        if ".qkv." in name:
            heads = tensor.shape[0] // 3 // 16
            rows = tensor.reshape(3, heads, 16, *tensor.shape[1:2]).movedim(0, 1)
            tensor = rows.reshape(tensor.shape[:2])
            tensor = tensor[..., None] if name.endswith("weight") else tensor
        elif name.endswith("proj_out.weight"):
            tensor = tensor[..., 0]
        theirs[name] = tensor.contiguous()
    path = tmp_path / "guided.pt"
    torch.save(theirs, path)
    model = load_model(path, kind="teacher", preset=str(GOLDEN / "openai_unet_uncond.toml"))
    for name, tensor in model.f.network.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def of_module(network):
    """What torch.save is given by most code: a dict with an attribute of its own."""
    return network.state_dict()


def of_master_weights(network):
    """What training in half precision saves: views of two flat parameters, one of matrices."""
    state = network.state_dict()
    for names in ([n for n, t in state.items() if t.ndim < 2],
                  [n for n, t in state.items() if t.ndim > 1]):  # fmt: skip
        flat = nn.Parameter(torch.cat([state[name].flatten() for name in names]))
        at = 0
        for name in names:
            end = at + state[name].numel()
            state[name] = flat[at:end].view(state[name].shape)
            at = end
    return state


def of_parameters(network):
    """What training in single precision saves."""
    state = network.state_dict()
    state.update(network.named_parameters())
    return state


@pytest.mark.parametrize("make", [of_module, of_master_weights, of_parameters])
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
def test_state_dicts_load_as_the_release_saves_them(make, legacy, tmp_path):
    network = Adm(AdmOptions(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                             attention_levels=(1,), head_channels=64), 3, 5)  # fmt: skip
    for p in network.parameters():
        nn.init.normal_(p)
    path = tmp_path / "cd.pt"
    torch.save(make(network), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(path).f.network.state_dict()
    assert list(loaded) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPINGS = {
    "of data parallel": lambda state, other: prefixed("module.", state),
    "compiled": lambda state, other: prefixed("module._orig_mod.", state),
    "under model": lambda state, other: {"model": state, "optimizer": {"state": {}}, "step": 7},
    "EMA beside the model": lambda state, other: {"model": other, "ema": state},
    "of a trainer": lambda state, other: {"epoch": 3, "model_state_dict": prefixed("net.", state)},
    "nested twice": lambda state, other: {"state_dict": {"module": state}},
    "of Lightning": lambda state, other: {
        "epoch": 1, "state_dict": {**prefixed("model.", other), **prefixed("ema.model.", state)},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPINGS)
def test_state_dicts_load_as_trainers_wrap_them(name, weights, tmp_path):
    state = torch.load(weights("openai_unet_cond"), weights_only=True)
    other = {key: tensor + 1 for key, tensor in state.items()}
    wrapped = WRAPPINGS[name](state, other)
    torch.save(wrapped, tmp_path / "cd.pt")
    foreign = openai_pt.read(tmp_path / "cd.pt", "ema", {})
    for key, tensor in openai_pt.read(weights("openai_unet_cond"), "ema", {}).tensors.items():
        assert torch.equal(foreign.tensors[key], tensor), key
    holds_both = "EMA" in name or "Lightning" in name
    assert any("holds 2 networks" in note for note in foreign.notes) == holds_both
    if holds_both:
        raw = openai_pt.read(tmp_path / "cd.pt", "model", {}).tensors
        assert not any(torch.equal(raw[key], foreign.tensors[key]) for key in raw)


def test_a_file_system_that_cannot_map_files_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, path)

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")  # without the name of the file

    monkeypatch.setattr(openai_pt.mmap, "mmap", refuse)
    with pytest.raises(InputError, match=r"a\.pt is on a file system that cannot map files"):
        read_foreign("openai", path, "ema", {})


def test_a_table_that_holds_itself_is_refused(tmp_path):
    table = {}
    table["model"] = table
    torch.save(table, tmp_path / "cd.pt")
    with pytest.raises(InputError, match="is not a usable ADM state dict"):
        load_model(tmp_path / "cd.pt")


@pytest.mark.parametrize("layout", ["half", "shards", "alone", "shards alone"])
def test_a_pipeline_comes_in_other_layouts_too(layout, weights, tmp_path):
    whole, folder = load_model(weights("diffusers_cm")), tmp_path / "pipe"
    shutil.copytree(weights("diffusers_cm"), folder)
    unet = folder / "unet"
    file = unet / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    names = sorted(state)
    if "shards" in layout:
        shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2]
                  for i in range(2)}  # fmt: skip
        for shard, held in shards.items():
            save_file({name: state[name] for name in held}, unet / shard)
        index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
        (unet / f"{file.name}.index.json").write_text(json.dumps(index))
    elif layout == "half":
        halves = {name: tensor.half() for name, tensor in state.items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"))
    else:
        save_file(state, file)
    path = unet if "alone" in layout else folder
    model = load_model(path, kind="consistency")
    for name, tensor in whole.f.network.state_dict().items():
        loaded = model.f.network.state_dict()[name]
        assert torch.equal(loaded, tensor.half().float() if layout == "half" else tensor), name
    assert model.sha256 != whole.sha256


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", 3])
def test_shards_of_another_folder_are_refused(name, weights, tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(weights("diffusers_cm"), folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="names files of another folder"):
        load_model(folder)


@torch.no_grad()
def test_a_network_that_learns_its_variance_gives_the_mean(tmp_path):
    options = AdmOptions(model_channels=32, channel_mult=(1,), num_res_blocks=1,
                         attention_levels=(0,), head_channels=32, learn_sigma=True)  # fmt: skip
    network = Adm(options, 3)
    network.out[2].bias.copy_(torch.arange(6.0))
    torch.save(network.state_dict(), tmp_path / "improved.pt")
    model = load_model(tmp_path / "improved.pt")
    assert (model.kind, model.preset.model.scalings.name) == ("teacher", "iddpm")
    out = model.f.network(torch.randn(1, 3, 8, 8), torch.zeros(1))
    assert torch.equal(out, torch.arange(3.0)[:, None, None].expand(1, 3, 8, 8))
    song = Song(SongOptions(model_channels=8, channel_mult=(1,), num_blocks=1, learn_sigma=True), 3)
    song.dec[-1].head[2].weight.zero_()
    song.dec[-1].head[2].bias.copy_(torch.arange(6.0))
    assert torch.equal(song(torch.randn(1, 3, 8, 8), torch.zeros(1)), out)


def test_half_precision_files_compute_in_float32(weights, tmp_path):
    """Training runs of the release save convolutions in half precision, the rest in single."""
    whole = load("openai_unet_cond", weights, "consistency")
    mixed = {
        name: tensor.half() if tensor.ndim == 4 else tensor
        for name, tensor in whole.f.network.state_dict().items()
    }
    path = tmp_path / "target_model000001.pt"
    torch.save(mixed, path)
    preset = str(GOLDEN / "openai_unet_cond.toml")
    half = load_model(path, kind="consistency", preset=preset)
    assert {p.dtype for p in half.f.parameters()} == {torch.float32}
    for name, tensor in half.f.network.state_dict().items():  # stored weights came from halves
        assert torch.equal(tensor, whole.f.network.state_dict()[name])


ADM = AdmOptions(model_channels=64, channel_mult=(1, 2), num_res_blocks=2, attention_levels=(1,),
                 head_channels=64, augment_dim=9)  # fmt: skip
SONG = SongOptions(
    model_channels=16, channel_mult=(1, 2, 2), num_blocks=2, embedding="fourier",
    channel_mult_noise=2, encoder="residual", resample_filter=(1, 3, 3, 1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("network", "rules"),
    [
        (Adm(ADM, 3, 5), lambda o, names: adm_rules(o, names, 32)),
        (Song(SONG, 3, 5), lambda o, names: song_rules(o, names, 32)),
        (Song(SONG, 3), jcm_rules),
        (Adm(AdmOptions(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                        attention_levels=(0, 1), head_channels=16), 3, 5), diffusers_rules),
    ],
    ids=["dhariwal", "song", "jcm", "diffusers"],
)  # fmt: skip
def test_renaming_there_and_back_keeps_every_tensor(network, rules):
    ours = {name: torch.randn_like(t) for name, t in network.state_dict().items()}
    theirs = translate_back(rules(network.options, list(ours)), ours)
    back = translate(rules(network.options, list(ours)), theirs)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())


def test_attention_layouts_are_permutations_of_ours():
    numbers = torch.arange(24.0)  # 2 heads of 4 channels: value = 8 j + 4 head + channel
    edm = torch.tensor([8.0 * j + 4 * h + c for h in range(2) for c in range(4) for j in range(3)])
    guided = torch.tensor(
        [8.0 * j + 4 * h + c for h in range(2) for j in range(3) for c in range(4)]
    )
    assert torch.equal(interleaved("x", 2, order="hcq").read([edm]), numbers)
    assert torch.equal(interleaved("x", 2, order="hqc").read([guided]), numbers)
    assert torch.equal(interleaved("x", 2, order="hcq").write(numbers)[0], edm)


def test_no_tensor_is_lost_in_silence(weights, tmp_path):
    state = torch.load(weights("openai_unet_cond"), weights_only=True)
    path = tmp_path / "more.pt"
    torch.save({**state, "extra.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="1 tensors are unknown, the first is extra"):
        load_model(path, kind="teacher")
    state.pop("input_blocks.1.0.in_layers.0.weight")
    torch.save(state, path)
    with pytest.raises(InputError, match=r"missing, the first is input_blocks.1.0.in_layers.0"):
        load_model(path, kind="teacher")


def test_values_that_are_not_finite_are_refused(weights, tmp_path):
    state = torch.load(weights("openai_unet_cond"), weights_only=True)
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"out\.2\.bias holds values that are not finite"):
        load_model(tmp_path / "nan.pt", kind="teacher")


def test_other_resampling_filters_are_refused():
    from cmtool.formats.edm_pkl import _without_filters

    good = {"x.resample_filter": torch.full((1, 1, 2, 2), 0.25), "x.weight": torch.ones(1)}
    assert list(_without_filters(good, (1, 1))) == ["x.weight"]
    with pytest.raises(Malformed, match="resample_filter"):
        _without_filters(good, (1, 3, 3, 1))


def test_safetensors_with_a_state_dict_load_like_a_pt_file(weights, tmp_path):
    state = torch.load(weights("openai_unet_cond"), weights_only=True)
    save_file(state, tmp_path / "cd.safetensors")
    model = load_model(tmp_path / "cd.safetensors")
    assert (model.format, model.kind) == ("openai", "consistency")


def test_a_config_that_is_no_adm_is_refused(weights, tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(weights("diffusers_cm"), folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    for key, value in [("norm_eps", 1e-6), ("act_fn", "relu"), ("down_block_types", ["A", "B"])]:
        (folder / "unet" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match="is not a usable diffusers pipeline"):
            load_model(folder)
