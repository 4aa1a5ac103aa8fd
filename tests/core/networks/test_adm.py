import math

import pytest
import torch
from torch.nn.functional import silu

from cmtool.core.networks import NETWORKS
from cmtool.core.networks.adm import Adm, AdmOptions, ResBlock
from cmtool.core.networks.layers import sinusoidal_embedding
from cmtool.core.rng import keyed_generator, seeded
from cmtool.core.tangents import derivative
from cmtool.errors import InputError
from cmtool.presets.build import build_network
from cmtool.presets.toml import load_preset

TINY = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
        "attention_levels": (1,), "head_channels": 16}  # fmt: skip


def filling(name, tensor):
    """Return A sin(B j + L) (+ 1 for 1-D weights) in the tensor's shape, L the name's length."""
    a, b = (0.5, 0.7) if tensor.ndim == 2 else (0.1, 0.1)
    j = torch.arange(tensor.numel(), dtype=torch.float64)
    value = a * torch.sin(b * j + len(name))
    if tensor.ndim == 1 and name.endswith("weight"):
        value = value + 1
    return value.reshape(tensor.shape).float()


def filled(network):
    network.load_state_dict({name: filling(name, t) for name, t in network.state_dict().items()})
    return network.eval()


@pytest.mark.parametrize(
    ("scale_shift", "classes", "mean", "std", "first", "last"),
    [
        (True, 10, 0.018509, 0.729343, [-0.05233, -0.03201, 0.00218, -0.00572], [0.12054, 0.04192]),
        (False, 0, 0.024223, 0.628693, [0.26778, 0.56173, 0.81638, 0.92104], [-0.32705, -0.19948]),
    ],
)
def test_output_is_that_of_the_released_network(scale_shift, classes, mean, std, first, last):
    network = filled(Adm(AdmOptions(**TINY, scale_shift=scale_shift), 3, classes))
    x = torch.sin(0.05 * torch.arange(2 * 3 * 32 * 32)).reshape(2, 3, 32, 32)
    labels = torch.tensor([1, 3]) if classes else None
    with torch.no_grad():
        out = network(x, torch.tensor([-200.0, 900.0]), labels)
    flat = out.flatten()
    assert float(out.mean()) == pytest.approx(mean, abs=1e-4)
    assert float(out.std(unbiased=False)) == pytest.approx(std, abs=1e-4)
    torch.testing.assert_close(flat[:4], torch.tensor(first), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat[-2:], torch.tensor(last), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "channels", "classes", "count"),
    [
        (AdmOptions(**TINY), 3, 10, 828_771),
        (AdmOptions(), 3, 1000, 295_899_267),
        (
            AdmOptions(
                model_channels=256,
                channel_mult=(1, 1, 2, 2, 4, 4),
                num_res_blocks=2,
                attention_levels=(3, 4, 5),
                scale_shift=False,
            ),
            3,
            0,
            526_304_771,
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(options, channels, classes, count):
    with torch.device("meta"):
        network = Adm(options, channels, classes)
    assert sum(p.numel() for p in network.parameters()) == count


def test_embedding_is_cosines_first_without_end_point():
    expected = [-0.87797, 0.04990, -0.16136, 0.98502, 0.47872, 0.99875, -0.98690, -0.17242]
    label = torch.tensor([1000 * 0.25 * math.log(0.5)])
    torch.testing.assert_close(
        sinusoidal_embedding(label, 8)[0], torch.tensor(expected), atol=2e-5, rtol=0
    )
    assert sinusoidal_embedding(label, 7)[0, -1] == 0


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 10), (12, 6)])
def test_height_and_width_are_free(h, w, updown):
    network = Adm(AdmOptions(**TINY, resblock_updown=updown), 1)
    out = network(torch.zeros(2, 1, h, w), torch.zeros(2))
    assert out.shape == (2, 1, h, w)


def test_it_starts_as_zero():
    out = Adm(AdmOptions(**TINY), 3)(torch.ones(1, 3, 8, 8), torch.zeros(1))
    assert torch.equal(out, torch.zeros_like(out))


def test_residual_paths_start_as_identity_and_classes_as_standard_normal():
    torch.manual_seed(0)
    network = Adm(AdmOptions(**TINY, augment_dim=9), 3, 1000)
    zero = {name for name, p in network.named_parameters() if not p.any()}
    last = (".out_layers.3.weight", ".proj_out.weight", "out.2.weight", "augment_emb.weight")
    named = {name for name, _ in network.named_parameters() if name.endswith(last)}
    assert len(named) > 10
    assert named <= zero
    weights = {name for name in zero if name.endswith("weight")}
    assert weights == named
    emb = network.label_emb.weight.detach()
    assert float(emb.mean()) == pytest.approx(0, abs=0.02)
    assert float(emb.std()) == pytest.approx(1, abs=0.02)


def test_a_size_that_does_not_fit_names_the_nearest():
    network = Adm(AdmOptions(**TINY), 3)
    with pytest.raises(InputError, match="images of 9x8 do not fit") as caught:
        network(torch.zeros(1, 3, 8, 9), torch.zeros(1))
    assert "8, 10" in caught.value.hint


def test_labels_are_needed_exactly_when_there_are_classes():
    x, label = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    with pytest.raises(InputError, match="10 classes and was given none"):
        Adm(AdmOptions(**TINY), 3, 10)(x, label)
    with pytest.raises(InputError, match="unconditional"):
        Adm(AdmOptions(**TINY), 3)(x, label, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_shape_and_sees_noise_level_and_class(name):
    kind = NETWORKS[name]
    options = kind.options(**TINY) if name == "adm" else kind.options()
    torch.manual_seed(0)
    network = kind.build(options, 3, 4)
    for p in network.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 3, 8, 8)
    out = network(x, torch.tensor([0.1, 0.1]), torch.tensor([0, 0]))
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, torch.tensor([0.5, 0.5]), torch.tensor([0, 0])))
    assert not torch.allclose(out, network(x, torch.tensor([0.1, 0.1]), torch.tensor([3, 3])))


def test_double_norm_is_the_formula_of_scm_and_can_be_differentiated_forwards():
    options = AdmOptions(**TINY, double_norm=True)
    torch.manual_seed(0)
    block = ResBlock(32, 32, 16, options).double().eval()
    torch.nn.init.normal_(block.out_layers[3].weight)
    x, emb = torch.randn(2, 32, 8, 8).double(), torch.randn(2, 16).double()
    scale, shift = block.emb_layers[1](emb).chunk(2, dim=1)
    scale, shift = (v / v.square().mean(1, keepdim=True).sqrt() for v in (scale, shift))
    (norm0, _, conv0), (norm1, _, _, conv1) = block.in_layers, block.out_layers
    y = norm1(conv0(silu(norm0(x)))) * scale[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(block(x, emb), x + conv1(silu(y)), atol=1e-6, rtol=1e-6)
    _, tangent = derivative(lambda e: block(x, e), (emb,), (emb,))
    shifted = (block(x, emb * (1 + 1e-6)) - block(x, emb * (1 - 1e-6))) / 2e-6
    torch.testing.assert_close(tangent, shifted, atol=1e-6, rtol=1e-6)


def test_double_norm_without_a_scale_is_refused():
    with pytest.raises(ValueError, match="needs scale_shift"):
        Adm(AdmOptions(**TINY, double_norm=True, scale_shift=False), 3)


def test_a_seed_draws_the_weights_that_it_drew_in_0_1():
    """Parts draw in the order in which they are made: a run is to stay the same run."""
    model = load_preset("digits-edm").model
    with seeded(keyed_generator("init", 0)):
        weights = build_network(model).state_dict()
    sums = {name: float(weights[name].double().sum()) for name in FIRST_WEIGHTS}
    assert sums == pytest.approx(FIRST_WEIGHTS, abs=1e-4)


FIRST_WEIGHTS = {
    "time_embed.0.weight": 1.894816, "middle_block.0.in_layers.2.weight": -4.333105,
    "middle_block.1.qkv.weight": 18.758020, "middle_block.2.in_layers.2.weight": 0.471600,
    "output_blocks.0.0.in_layers.2.weight": 10.787781,
}  # fmt: skip
