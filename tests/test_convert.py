"""Conversions are exact, and diffusers itself reads what we write."""

import shutil
from pathlib import Path

import pytest
import torch

import cmtool.convert as conversion
from cmtool.convert import check_equal, convert
from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.rng import SeededNoise
from cmtool.core.samplers import clipped, multistep
from cmtool.errors import InputError, Stopped, UserError
from cmtool.models import load_model
from tests.golden import GOLDEN, golden


def tensors(model):
    return dict(model.f.network.state_dict())


def same(one, other):
    assert tensors(one).keys() == tensors(other).keys()
    return all(torch.equal(t, tensors(other)[name]) for name, t in tensors(one).items())


def test_native_to_diffusers_to_native_is_equal(tmp_path):
    start = load_model("digits-cd")
    assert convert(start, tmp_path / "pipe") == "diffusers"
    middle = load_model(tmp_path / "pipe")
    assert convert(middle, tmp_path / "back.safetensors") == "native"
    back = load_model(tmp_path / "back.safetensors")
    assert same(start, middle)
    assert same(start, back)
    assert back.preset.model.model_copy(update={"network": start.preset.model.network}) == (
        start.preset.model
    )
    assert back.preset.noise == start.preset.noise


@pytest.mark.parametrize("case", ["openai_unet_cond.pt", "edm_ncsnpp.pkl", "jcm_checkpoint_80"])
def test_foreign_to_native_is_equal(case, tmp_path):
    preset = GOLDEN / f"{case.partition('.')[0]}.toml"
    start = load_model(
        golden(case, tmp_path), kind="teacher", preset=str(preset) if preset.exists() else None
    )
    convert(start, tmp_path / "ours.safetensors")
    ours = load_model(tmp_path / "ours.safetensors")
    assert same(start, ours)
    assert ours.preset == start.preset
    assert ours.kind == "teacher"


def test_a_native_training_checkpoint_keeps_its_preset(tmp_path):
    start = load_model("digits-cd")
    convert(start, tmp_path / "copy.safetensors")
    assert load_model(tmp_path / "copy.safetensors").preset == start.preset


def test_what_is_there_stays_unless_asked(tmp_path):
    out = tmp_path / "ours.safetensors"
    out.write_bytes(b"precious")
    model = load_model("digits-cd")
    with pytest.raises(UserError, match="exists"):
        convert(model, out)
    assert out.read_bytes() == b"precious"
    convert(model, out, overwrite=True)
    assert same(model, load_model(out))
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(InputError, match="no diffusers pipeline"):
        convert(model, folder, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "ours.safetensors"]


@pytest.mark.parametrize("name", ["ours.safetensors", "pipe"])
def test_a_conversion_that_is_stopped_leaves_what_was_there(name, tmp_path, monkeypatch):
    model, out = load_model("digits-cd"), tmp_path / name
    convert(model, out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def stop(*_, **__):
        raise Stopped("stopped by signal 15", "", 15)

    for target, where in [("check_equal", conversion), ("rename", Path)]:
        if target == "rename":  # the moment between the old folder's leaving and the new's coming
            real = Path.rename

            def rename(self, to, real=real):
                return stop() if self.suffix == ".tmp" else real(self, to)

            monkeypatch.setattr(where, target, rename)
        else:
            monkeypatch.setattr(where, target, stop)
        with pytest.raises(Stopped):
            convert(model, out, overwrite=True)
        monkeypatch.undo()
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    model = load_model("digits-cd")
    with pytest.raises(InputError, match=r"cannot write .*x\.safetensors"):
        convert(model, tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(UserError, match="not written to stdout"):
        convert(model, Path("-"))


def test_a_conversion_that_changes_a_number_is_caught():
    start, other = load_model("digits-cd"), load_model("digits-cd")
    check_equal(start, other)
    with torch.no_grad():
        other.f.network.out[2].bias.add_(1e-6)
    with pytest.raises(AssertionError, match=r"out\.2\.bias changed"):
        check_equal(start, other)
    other = load_model("digits-cd", kind="teacher")
    with pytest.raises(AssertionError, match="another answer"):
        check_equal(start, other)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("digits-edm", "it is a teacher"), ("edm_ddpmpp.pkl", "network is 'song'")],
)
def test_what_diffusers_cannot_hold_is_refused(source, reason, tmp_path):
    path = source if source == "digits-edm" else golden(source, tmp_path)
    model = load_model(path, kind=None if source == "digits-edm" else "consistency")
    with pytest.raises(InputError, match=reason):
        convert(model, tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def ours(model, noises, sigmas, labels):
    draws = iter(noises)
    with torch.no_grad():
        x0 = multistep(
            clipped(model.f), torch.zeros_like(noises[0]), sigmas, lambda _: next(draws),
            sigma_min=0.002, labels=labels,
        )  # fmt: skip
    return x0 / 2 + 0.5


@pytest.mark.slow
def test_diffusers_reads_our_export_and_draws_our_images(tmp_path, monkeypatch):
    from diffusers import ConsistencyModelPipeline
    from diffusers.schedulers import scheduling_consistency_models as scheduling

    model = load_model("digits-cd")
    convert(model, tmp_path / "pipe")
    pipe = ConsistencyModelPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    noise = SeededNoise(range(4))
    unit = [noise(torch.empty(4, 3, 8, 8)) for _ in range(2)]
    labels = torch.tensor([0, 3, 5, 9])
    out = pipe(
        batch_size=4, class_labels=labels, num_inference_steps=1, latents=unit[0].clone(),
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(out, ours(model, unit, [80.0], labels), atol=2e-6, rtol=0)

    monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, **__: unit[1])
    index = 7
    out = pipe(
        batch_size=4, class_labels=labels, num_inference_steps=None, timesteps=[index, 0],
        latents=unit[0].clone(), output_type="pt",
    ).images  # fmt: skip
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:2]]
    assert sigmas[1] == pytest.approx(1.143, abs=1e-3)  # index 7 of the 13 levels it trained on
    torch.testing.assert_close(out, ours(model, unit, sigmas, labels), atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", ["resnet", "conv"])
def test_we_read_what_diffusers_saves(scale_shift, resample, tmp_path):
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if resample == "conv":
        plain = ("DownBlock2D", "UpBlock2D")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=(32, 64, 64), num_class_embeds=5, attention_head_dim=16,
        down_block_types=(plain[0], "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", plain[1]),
        downsample_type=resample, upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        attn_norm_num_groups=32 if scale_shift else None,
    )  # fmt: skip
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pipe = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    model = load_model(tmp_path / "pipe")
    assert isinstance(model.f.network, Adm)
    pipe.save_pretrained(tmp_path / "bin", safe_serialization=False)  # as of LSUN are published
    assert (tmp_path / "bin/unet/diffusion_pytorch_model.bin").is_file()
    assert same(model, load_model(tmp_path / "bin"))
    x, label = torch.randn(2, 3, 16, 16), torch.tensor([100.0, -700.0])
    labels = torch.tensor([1, 4])
    with torch.no_grad():
        wanted = unet(x, label, class_labels=labels).sample
        out = model.f.network(x, label, labels)
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 1e-5
    # and what we write back is what diffusers wrote, tensor for tensor
    convert(model, tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again", subfolder="unet")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, unet.state_dict()[name]), name


def test_options_diffusers_has_no_word_for_are_refused(tmp_path):
    from cmtool.formats import diffusers_dir
    from cmtool.formats.foreign import Malformed

    options = AdmOptions(
        model_channels=32, channel_mult=(2, 2), num_res_blocks=1, attention_levels=(),
    )  # fmt: skip
    network = Adm(options, 3)
    with pytest.raises(Malformed, match="channel_mult"):
        diffusers_dir.write(
            tmp_path, options, dict(network.state_dict()), channels=3, num_classes=0,
            image_size=8, scheduler={},
        )  # fmt: skip
    shutil.rmtree(tmp_path)
