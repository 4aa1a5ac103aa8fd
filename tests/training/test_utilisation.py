import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmtool.core.distances import lpips
from cmtool.core.networks import NETWORKS
from cmtool.core.noise import Stage
from cmtool.core.rng import step_generator
from cmtool.models import load_model
from cmtool.presets.build import build_denoiser, build_network, build_objective, needs_teacher
from cmtool.presets.toml import load_preset
from cmtool.training import utilisation
from cmtool.training.utilisation import ideal_seconds, peak_flops, step_flops
from tests.core.test_distances import hub, squeeze  # noqa: F401  # fixtures
from tests.objectives import alone

FORWARD_UNITS = {"digits-edm": 3, "digits-ct": 4, "digits-cd": 6, "digits-pd": 5}


@pytest.fixture(scope="module")
def teacher():
    return load_model("digits-edm")


@pytest.mark.parametrize("name", FORWARD_UNITS)
def test_a_step_costs_the_passes_of_its_method(name, teacher):
    """Backward is two forwards, but for the first layer, which needs no gradient of its input."""
    preset = load_preset(name, {"train.batch": 7})
    network = build_network(preset.model).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    counted = step_flops(preset, teacher if needs_teacher(preset) else None)
    forward = counter.get_total_flops()
    assert counted / (7 * forward) == pytest.approx(FORWARD_UNITS[name], rel=0.01)


def test_continuous_time_costs_a_tangent_more(teacher):
    """PyTorch's tangent of a convolution is two more of it, one of them with a weight of zeros.

    Units: teacher 1; student 1, and 2 back; tangent 3. Live: 5 back through the tangent, and none
    through the student.
    """

    def cost(method, distance="l2"):
        near = {"loss.method": method, "loss.levels": "ramp", "loss.distance": distance}
        return step_flops(load_preset("digits-cd", near | {"train.batch": 1}), teacher)

    unit = step_flops(load_preset("digits-cd", {"train.batch": 1}), teacher) / 6
    assert cost("continuous_distillation") / unit == pytest.approx(7, rel=0.01)
    assert cost("continuous_training") / unit == pytest.approx(6, rel=0.01)
    live = cost("live_distillation")
    assert live / unit == pytest.approx(10, rel=0.01)
    assert live == cost("live_distillation", "l1")


def test_shapes_alone_count_as_much_as_a_step_with_numbers():
    preset = load_preset("digits-ct", {"train.batch": 3, "loss.target": "student"})
    student = build_denoiser(preset, build_network(preset.model))
    objective = build_objective(preset, None)
    # PyTorch counts other products for a CPU's fused attention than for its formula
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        labels = torch.zeros(3, dtype=torch.int64)
        x0 = torch.zeros(3, 3, 8, 8)
        loss, _ = objective(alone(student), x0, labels, Stage(n=2), step_generator(0, 0, 0))
        loss.sum().backward()
    assert step_flops(preset, None) == counter.get_total_flops()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_every_network_is_counted(network):
    options = {"name": network} | ({} if network == "mlp" else {"model_channels": 32})
    preset = load_preset("digits-ct", {"model.network": options, "model.num_classes": 0})
    assert step_flops(preset, None) > 0


@pytest.mark.usefixtures("squeeze")
def test_the_network_of_lpips_counts_twice_forward_and_once_back_to_the_image():
    plain, felt = (
        load_preset("digits-ct", {"train.batch": 1, "loss.distance": distance})
        for distance in ("l2", {"name": "lpips", "net": "squeeze"})
    )
    with FlopCounterMode(display=False) as counter:
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), net="squeeze")
    twice_forward = counter.get_total_flops()
    extra = step_flops(felt, None) - step_flops(plain, None)
    assert extra == pytest.approx(1.5 * twice_forward, rel=0.01)


def test_what_cannot_be_counted_is_not_known(monkeypatch):
    preset = load_preset("digits-ct")

    def refuses(card, kind):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(utilisation, "shape_of", refuses)
    assert step_flops(preset, None) is None
    assert ideal_seconds(preset, None, "cpu", 1) is None


def test_the_peak_is_measured_once_and_no_kernel_of_that_shape_is_faster():
    peak_flops.cache_clear()  # what is compared is measured at one time: a machine may be busy
    peak = peak_flops("cpu", "fp32")
    assert peak_flops("cpu", "fp32") is peak
    a = torch.ones(384, 384)
    seconds = utilisation.seconds_of(lambda: a @ a, "cpu")
    assert peak > 0.3 * 2 * 384**3 / seconds


def test_two_devices_are_twice_as_fast(monkeypatch):
    preset = load_preset("digits-ct", {"train.precision": "fp32"})
    monkeypatch.setattr(utilisation, "step_flops", lambda preset, teacher: 10**9)
    one, two = (ideal_seconds(preset, None, "cpu", n) for n in (1, 2))
    assert one == 2 * two


def test_the_peak_is_measured_on_random_numbers(monkeypatch):
    """A GPU is up to 13 % faster on ones. The state of the generators stays as it was."""
    answers, before = [], torch.get_rng_state()
    monkeypatch.setattr(utilisation, "seconds_of", lambda work, _: answers.append(work()) or 1.0)
    utilisation.measured_rates("cpu", torch.float32)
    assert all(len(answer.unique()) > answer.numel() / 2 for answer in answers)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_of_the_measured_products_is_gone_when_the_peak_is_reset(monkeypatch):
    order = []

    def measured(*_):
        made = torch.ones(3)
        weakref.finalize(made, order.append, "gone")
        return 1.0, 2.0

    monkeypatch.setattr(utilisation, "measured_rates", measured)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: order.append("reset"))
    assert peak_flops.__wrapped__("cuda", "bf16") == 2.0
    assert order == ["gone", "reset"]
