import math

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from cmtool.core.networks.adm import Adm, AdmOptions
from cmtool.core.networks.layers import (
    AttentionBlock,
    GroupNorm32,
    downsampled,
    low_pass,
    sinusoidal_embedding,
    upsampled,
)
from cmtool.core.networks.song import Song, SongBlock, SongOptions
from cmtool.core.precond import (
    NOISE_LABELS,
    SCALINGS,
    Preconditioned,
    edm_scalings,
    log_label,
)
from cmtool.errors import InputError
from cmtool.formats.edm_pkl import adm_rules, song_rules
from cmtool.formats.foreign import translate, translate_back
from tests.core.networks.test_adm import filling

SMALL = {
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_levels": (1,),
    "dropout": 0.0,
}
NCSNPP = {
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}
SKIPS = {"encoder": "skip", "decoder": "skip"}


def filled(network, rules):
    """Fill the network by the law of filling(), applied to EDM's names and layouts."""
    blank = {name: torch.zeros_like(t) for name, t in network.state_dict().items()}
    theirs = {name: filling(name, t) for name, t in translate_back(rules, blank).items()}
    network.load_state_dict(translate(rules, theirs))
    return network.eval()


def song(options, classes=0):
    network = Song(SongOptions(**options), 3, classes)
    return filled(network, song_rules(network.options, list(network.state_dict()), 16))


def check(out, mean, std, first, last, bound=1e-5):
    assert float(out.mean()) == pytest.approx(mean, abs=bound)
    assert float(out.std(unbiased=False)) == pytest.approx(std, abs=bound)
    torch.testing.assert_close(out.flatten()[:4], out.new_tensor(first), atol=bound, rtol=0)
    torch.testing.assert_close(out.flatten()[-2:], out.new_tensor(last), atol=bound, rtol=0)


X = torch.sin(0.05 * torch.arange(2 * 3 * 16 * 16)).reshape(2, 3, 16, 16)
LABEL = torch.tensor([-0.5, 0.8])
CLASSES = torch.tensor([1, 3])
X64, SIGMAS = X.double(), torch.tensor([0.5, 2.0], dtype=torch.float64)


def baseline(family, network):
    """A model of EDM's baselines, in float64: with labels of 999, float32 is 6e-5 off."""
    network = network.double()
    return Preconditioned(
        network, SCALINGS[family], NOISE_LABELS[family], sigma_data=0.5, sigma_min=0.0
    )


@torch.no_grad()
def test_ddpmpp_is_that_of_edm():
    network = song({**SMALL, "augment_dim": 9}, 10)
    check(
        network(X, LABEL, CLASSES), -0.079713, 0.417884,
        [0.00959, 0.09096, 0.12921, 0.14241], [-0.18662, -0.13654],
    )  # fmt: skip
    warp = torch.sin(torch.arange(18.0)).reshape(2, 9)
    check(
        network(X, LABEL, CLASSES, warp), -0.078203, 0.446624,
        [0.07179, 0.18861, 0.23930, 0.24679], [-0.16203, -0.12121],
    )  # fmt: skip
    still = network(X, LABEL, CLASSES, torch.zeros(2, 9))
    assert torch.equal(still, network(X, LABEL, CLASSES))


@torch.no_grad()
def test_ncsnpp_is_that_of_edm():
    check(
        song({**SMALL, **NCSNPP})(X, LABEL), -0.161570, 0.528088,
        [-0.12099, -0.11410, -0.07903, -0.03811], [-0.06708, -0.08519],
    )  # fmt: skip


@torch.no_grad()
def test_skip_encoder_and_decoder_are_those_of_edm():
    check(
        song({**SMALL, **SKIPS})(X, LABEL), -0.035021, 0.470723,
        [-0.04310, -0.04354, -0.07096, -0.08667], [-0.07047, -0.06884],
    )  # fmt: skip


@torch.no_grad()
def test_skip_encoder_and_decoder_filter_as_edm_does():
    network = song({**SMALL, **SKIPS, "resample_filter": (1, 3, 3, 1)})
    check(
        network(X, LABEL), -0.034300, 0.473064,
        [-0.04822, -0.05182, -0.05643, -0.07714], [-0.07133, -0.07871],
    )  # fmt: skip


@torch.no_grad()
def test_dhariwal_unet_is_the_adm_network():
    options = AdmOptions(
        model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,),
        min_group_channels=4, augment_dim=9,
    )  # fmt: skip
    network = Adm(options, 3, 10)
    network = filled(network, adm_rules(options, list(network.state_dict()), 16)).double()
    check(
        network(X.double(), LABEL.double(), CLASSES), -0.347673, 2.435559,
        [-0.52961, -1.22587, -2.00825, -2.48915], [-0.48902, -0.31869],
    )  # fmt: skip
    warp = torch.sin(torch.arange(18.0)).reshape(2, 9)
    check(
        network(X.double(), LABEL.double(), CLASSES, warp.double()), -0.404260, 2.400350,
        [-0.44864, -1.08784, -1.85460, -2.37308], [-0.49012, -0.31189],
    )  # fmt: skip


@torch.no_grad()
def test_edm_preconditioning_of_ddpmpp():
    f = Preconditioned(song(SMALL), edm_scalings, log_label, sigma_data=0.5, sigma_min=0.0)
    check(
        f(X, torch.tensor([0.5, 2.0])), -0.033303, 0.332729,
        [-0.03013, 0.00138, 0.04115, 0.07690], [-0.02371, -0.00328],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mean", "std", "first", "last"),
    [
        (
            "vp",
            0.231298796,
            0.927101310,
            [-0.024978709, -0.036182617, -0.024532983, 0.005715588],
            [1.151707614, 1.180073527],
        ),
        (
            "ve",
            -0.089122652,
            1.111797492,
            [-0.034342148, 0.010798740, 0.063519227, 0.102888166],
            [0.699027304, 0.776616948],
        ),
        (
            "iddpm",
            0.198705331,
            1.097748628,
            [0.082980460, 0.144625093, 0.183532119, 0.215509661],
            [0.942813016, 1.028624469],
        ),
    ],
)
@torch.no_grad()
def test_baselines_of_edm_around_ddpmpp(family, mean, std, first, last):
    f = baseline(family, song({**SMALL, "learn_sigma": family == "iddpm"}))
    check(f(X64, SIGMAS), mean, std, first, last, bound=1e-6)


@torch.no_grad()
def test_iddpm_around_dhariwals_unet():
    options = AdmOptions(
        model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,),
        min_group_channels=4, learn_sigma=True,
    )  # fmt: skip
    network = Adm(options, 3)
    network = filled(network, adm_rules(options, list(network.state_dict()), 16))
    check(
        baseline("iddpm", network)(X64, SIGMAS), 0.428399388, 3.806707390,
        [0.630938837, 1.171304965, 1.496660954, 1.591860836], [-0.761323915, -0.115876918],
        bound=1e-6,
    )  # fmt: skip


VP = SongOptions(augment_dim=9)
VE = SongOptions(augment_dim=9, **NCSNPP)
VP64 = SongOptions(channel_mult=(1, 2, 2, 2), attention_levels=(2,), augment_dim=9)
VE64 = SongOptions(channel_mult=(1, 2, 2, 2), attention_levels=(2,), augment_dim=9, **NCSNPP)


@pytest.mark.parametrize(
    ("options", "classes", "count"),
    [
        (VP, 0, 55_733_891), (VP, 10, 55_735_299), (VE, 0, 56_397_827), (VE, 10, 56_400_643),
        (VP64, 0, 61_805_571), (VE64, 0, 62_761_091),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(options, classes, count):
    with torch.device("meta"):
        network = Song(options, 3, classes)
    assert sum(p.numel() for p in network.parameters()) == count


def test_embedding_reaches_the_end_point_with_sines_first():
    network = Song(SongOptions(**{**SMALL, "model_channels": 8}), 3)
    network.map_layer0 = network.map_layer1 = nn.Identity()
    emb = network.embed(torch.tensor([0.25 * math.log(0.5)]), None, None)
    silu = torch.nn.functional.silu
    expected = [-0.17242, -0.00804, -0.00037, -0.00002, 0.98502, 0.99997, 1.0, 1.0]
    torch.testing.assert_close(emb[0], silu(silu(torch.tensor(expected))), atol=2e-5, rtol=0)
    no_end = [0.98502, 0.99985, 1.0, 1.0, -0.17242, -0.01733, -0.00173, -0.00017]
    label = torch.tensor([0.25 * math.log(0.5)])
    torch.testing.assert_close(
        sinusoidal_embedding(label, 8)[0], torch.tensor(no_end), atol=2e-5, rtol=0
    )


def test_fourier_features_are_sines_then_cosines_of_two_pi_label_times_frequency():
    network = Song(SongOptions(**SMALL, **NCSNPP), 3)
    network.map_layer0 = network.map_layer1 = nn.Identity()
    emb = network.embed(torch.tensor([0.3]), None, None)[0]
    angles = 2 * math.pi * 0.3 * network.frequencies
    silu = torch.nn.functional.silu
    torch.testing.assert_close(emb, silu(silu(torch.cat([angles.sin(), angles.cos()]))))
    assert 10 < float(Song(VE, 3).frequencies.std()) < 22


def test_classes_enter_before_the_first_layer_times_the_root_of_their_number():
    network = Song(SongOptions(**SMALL), 3, 9)
    network.map_layer0 = network.map_layer1 = nn.Identity()
    nn.init.normal_(network.map_label.weight)
    label, silu = torch.tensor([0.3]), torch.nn.functional.silu
    cos, sin = sinusoidal_embedding(label, 16, end_point=True).chunk(2, dim=1)
    raw = torch.cat([sin, cos], dim=1) + 3 * network.map_label.weight[:, 4]
    emb = network.embed(label, torch.nn.functional.one_hot(torch.tensor([4]), 9).float(), None)
    torch.testing.assert_close(emb, silu(silu(raw)))


def test_adm_classes_enter_after_the_time_embedding():
    options = AdmOptions(
        model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(),
        head_channels=32,
    )  # fmt: skip
    network = Adm(options, 3, 4)
    seen = []
    _, linear = network.middle_block[0].emb_layers
    linear.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(torch.zeros(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([2]))
    time = network.time_embed(sinusoidal_embedding(torch.tensor([0.5]), 32))
    torch.testing.assert_close(seen[0], silu(time + network.label_emb.weight[2]))


@pytest.mark.parametrize(
    ("network", "eps", "groups"),
    [
        (Song(SongOptions(model_channels=16, channel_mult=(2, 8), num_blocks=1), 3), 1e-6,
         lambda c: min(32, c // 4)),
        (Adm(AdmOptions(model_channels=64, channel_mult=(1, 2), num_res_blocks=1), 3), 1e-5,
         lambda c: 32),
        (Adm(AdmOptions(model_channels=64, channel_mult=(1, 4), num_res_blocks=1,
                        min_group_channels=4), 3), 1e-5, lambda c: min(32, c // 4)),
    ],
    ids=["song", "openai", "dhariwal"],
)  # fmt: skip
def test_group_norms_are_those_of_the_sources(network, eps, groups):
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) > 10
    for norm in norms:
        assert norm.eps == eps
        assert norm.num_groups == groups(norm.num_channels)


def test_group_norm_computes_in_float32(monkeypatch):
    seen, real = [], torch.nn.functional.group_norm

    def spy(x, *rest):
        seen.append(x.dtype)
        return real(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "group_norm", spy)
    norm = GroupNorm32(2, 8)
    x = 300 * torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    half = x.half()
    assert norm(half).dtype == torch.float16
    torch.testing.assert_close(norm(half), norm(half.float()).half(), atol=0, rtol=0)
    assert torch.isfinite(norm(half)).all()  # the squares overflow half precision
    assert set(seen) == {torch.float32}


def test_decoder_attends_in_the_last_block_of_a_level_and_in_the_first_of_all():
    network = Song(SongOptions(model_channels=16, channel_mult=(1, 1), num_blocks=3), 3)
    assert [b.attention is not None for b in network.dec[0].entry] == [True, False]
    assert [b.attention is not None for b in network.dec[0].blocks] == [False] * 3 + [True]
    assert [b.attention is not None for b in network.dec[1].blocks] == [False] * 4
    assert [b.attention is not None for b in network.enc[1].blocks] == [True] * 3
    without = Song(SongOptions(model_channels=16, channel_mult=(1, 1), attention_levels=()), 3)
    assert without.dec[0].entry[0].attention is not None
    adm = Adm(AdmOptions(model_channels=64, channel_mult=(1,), num_res_blocks=2,
                         attention_levels=(0,)), 3)  # fmt: skip
    assert all(len(entry) == 2 for entry in adm.output_blocks)


def test_sums_are_scaled_after_the_residual_and_again_after_attention():
    block = SongBlock(16, 16, 32, SongOptions(), attention=True)
    for p in block.parameters():
        nn.init.zeros_(p)
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(block(x, torch.zeros(1, 32)), x / 2)
    plain = SongBlock(16, 16, 32, SongOptions())
    for p in plain.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(plain(x, torch.zeros(1, 32)), x * math.sqrt(0.5))


def test_residual_encoder_replaces_features_and_skip_by_the_scaled_sum():
    network = Song(SongOptions(**SMALL, **NCSNPP), 3)
    level = network.enc[1]
    level.blocks = nn.ModuleList()
    x, emb = torch.randn(1, 16, 8, 8), torch.randn(1, 64)
    picture = torch.randn(1, 3, 8, 8)
    skips = []
    h, aux = level(x, picture, emb, skips)
    wide = torch.nn.functional.conv2d(picture, level.aux.weight, level.aux.bias, padding=2)
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    kernel = torch.outer(taps, taps).expand(16, 1, 4, 4)
    aux_down = torch.nn.functional.conv2d(wide, kernel, stride=2, groups=16)
    expected = (level.entry(x, emb) + aux_down) * math.sqrt(0.5)
    torch.testing.assert_close(h, expected)
    assert h is aux
    assert skips == [h]


def test_blocks_filter_before_they_convolve():
    block = SongBlock(16, 16, 32, SongOptions(resample_filter=(1, 3, 3, 1)), resample="down")
    seen = []
    block.conv0.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = torch.randn(1, 16, 8, 8)
    block(x, torch.zeros(1, 32))
    activated = torch.nn.functional.silu(block.norm0(x))
    torch.testing.assert_close(seen[0], downsampled(activated, low_pass((1, 3, 3, 1))))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_filters_keep_a_constant_and_are_adjoint(taps):
    g = torch.Generator().manual_seed(0)
    one, kernel = torch.ones(1, 2, 12, 8), low_pass(taps)
    assert torch.allclose(downsampled(one, kernel)[..., 1:-1, 1:-1], torch.ones(1, 2, 4, 2))
    assert torch.allclose(upsampled(one, kernel)[..., 2:-2, 2:-2], torch.ones(1, 2, 20, 12))
    x, y = torch.randn(1, 2, 12, 8, generator=g), torch.randn(1, 2, 6, 4, generator=g)
    # <down x, y> = <x, up y> / 4
    down, up = downsampled(x, kernel), upsampled(y, kernel)
    torch.testing.assert_close((down * y).sum(), (x * up).sum() / 4, rtol=1e-4, atol=1e-4)


def test_attention_rows_are_thirds_of_heads():
    block = AttentionBlock(8, 4, nn.Identity())
    x = torch.randn(2, 8, 3, 5)
    flat = x.flatten(2)  # (B, C, tokens)
    q, k, v = (
        (w[..., 0, 0] @ flat + b[:, None]).unflatten(1, (2, 4))
        for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True)
    )
    weights = torch.einsum("bhdq,bhdk->bhqk", q, k).div(2).softmax(-1)
    out = torch.einsum("bhqk,bhdk->bhdq", weights, v).reshape(2, 8, 3, 5)
    torch.testing.assert_close(block(x), x + block.proj_out(out), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_starts_small_by_xaviers_law():
    torch.manual_seed(0)
    network = Song(SongOptions(**SMALL), 3)
    out = network(torch.randn(1, 3, 8, 8), torch.zeros(1))
    assert 0 < float(out.abs().max()) < 1e-3
    block = network.enc[1].blocks[0]
    bound = math.sqrt(6 / (9 * 16 + 9 * 32))
    assert float(block.conv0.weight.abs().max()) == pytest.approx(bound, rel=0.02)
    assert float(block.conv1.weight.abs().max()) < 1e-5
    scaled = math.sqrt(0.2) * math.sqrt(6 / (32 + 96))
    assert float(block.attention.qkv.weight.abs().max()) == pytest.approx(scaled, rel=0.02)
    assert not any(
        p.any() for name, p in network.named_parameters() if "conv" in name and "bias" in name
    )


@pytest.mark.parametrize("options", [{}, NCSNPP, SKIPS], ids=["ddpmpp", "ncsnpp", "skip"])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 10), (12, 6)])
def test_height_and_width_and_channels_are_free(h, w, options):
    network = Song(SongOptions(**{**SMALL, **options}), 5)
    assert network(torch.zeros(2, 5, h, w), torch.zeros(2)).shape == (2, 5, h, w)


def test_a_size_that_does_not_fit_names_the_nearest():
    with pytest.raises(InputError, match="images of 9x8 do not fit") as caught:
        Song(SongOptions(**SMALL), 3)(torch.zeros(1, 3, 8, 9), torch.zeros(1))
    assert "8, 10" in caught.value.hint


@pytest.mark.parametrize(
    "options", [{"num_blocks": 10**9}, {"channel_mult": ()}, {"resample_filter": (1, 2, 1)}]
)
def test_absurd_options_are_refused(options):
    with pytest.raises(ValueError):
        Song(SongOptions(**options), 3)
