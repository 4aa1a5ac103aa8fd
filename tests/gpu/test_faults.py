"""What only a card can show of what went wrong on one: copies, casts and memory are CUDA's own."""

import warnings

import pytest
import torch

from cmtool import edit, editing, sampling
from cmtool.core import edits
from cmtool.core.networks.layers import upsampled
from cmtool.core.samplers import SAMPLERS
from cmtool.core.tensors import to_device
from cmtool.evaluation.gaussian import GaussianSums
from cmtool.models import load_model
from cmtool.presets import build
from cmtool.presets.schema import Choice
from cmtool.presets.toml import load_preset, preset_names
from cmtool.sampling import Plan, generate, plan
from cmtool.system import room
from cmtool.system.determinism import deterministic
from cmtool.system.devices import autocast
from cmtool.system.pinned import buffers
from cmtool.training.fit import fit
from cmtool.training.state import build_state, fit_settings
from cmtool.training.utilisation import peak_flops

pytestmark = pytest.mark.pretend_gpu
DEVICE = "cuda:0"
READS = {"digits-adcm", "digits-tcm"}
"""ADCM reads the steps of its grid, TCM which of its two networks answers."""
DIGITS = sorted(name for name in preset_names() if name.startswith("digits-"))
DIGITS = [name for name in DIGITS if name not in READS]


@pytest.fixture
def waiting_is_an_error():
    """From the call of what this gives to the end of the test."""
    with warnings.catch_warnings(action="ignore"):  # it says once that it is a prototype
        torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.set_sync_debug_mode("default")
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def started(name, **changes):
    """A run's state and the rest of what `fit` takes, of 8 images a step."""
    changes = {"train.batch": 8, "train.precision": "bf16", "train.steps": 3,
               "train.max_bad_steps": 1000, **changes}  # fmt: skip
    preset = load_preset(name, changes)
    row = build.method_row(preset)
    source = "digits-cd" if row.teacher_kind == "consistency" else "digits-edm"
    needed = build.needs_teacher(preset)
    teacher = load_model(source, device=DEVICE) if needed else None
    state = build_state(preset, teacher, DEVICE)
    x0 = torch.zeros(8, 3, 8, 8, device=DEVICE)
    labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    guide = teacher.f if teacher else None
    draw = build.build_source(preset, lambda *_: (x0, labels), guide)
    objective = build.build_objective(preset, guide, DEVICE)
    curriculum = build.build_curriculum(preset)
    before = build.build_method(preset).before
    return state, objective, draw, curriculum, fit_settings(preset), before


def test_pictures_between_two_seeds():
    model = load_model("digits-cd", device=DEVICE)
    made = edit.interpolate(model, 0, 5, frames=3)
    assert (made.shape, made.device.type) == ((3, 3, 8, 8), "cuda")


@pytest.mark.parametrize("name", DIGITS)
def test_a_step_waits_for_its_norm_alone(name, monkeypatch, waiting_is_an_error):
    """Without that one wait, which the loop makes by asking whether the norm is finite."""
    monkeypatch.setattr("cmtool.training.fit.bool", lambda _: True, raising=False)
    steps = fit(*started(name))
    next(steps)
    next(steps)
    waiting_is_an_error()
    next(steps)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_no_level_is_waited_for(sampler, monkeypatch, waiting_is_an_error):
    monkeypatch.setattr(sampling, "_finite", lambda x0: x0)
    model = load_model("digits-cd" if sampler == "multistep" else "digits-edm", device=DEVICE)
    sigmas = plan(model.preset, 4, sampler=Choice(name=sampler)).sigmas
    chosen = Plan(Choice(name=sampler), sigmas, "bf16")

    def drawn():
        return list(generate(model.f, model.preset, chosen, range(4), batch=2, device=DEVICE))

    drawn()
    waiting_is_an_error()
    drawn()


def test_no_projection_is_waited_for(waiting_is_an_error):
    x0 = torch.zeros(2, 3, 8, 8, device=DEVICE)
    known = torch.ones(2, 1, 8, 8, dtype=torch.bool, device=DEVICE)
    made = [edits.colorize(x0[:, :1]), edits.inpaint(x0, known), edits.superres(x0[..., :4, :4], 2),
            edits.stroke(x0)]  # fmt: skip
    [each.project(x0) for each in made]
    waiting_is_an_error()
    [each.project(x0) for each in made]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_pixels_are_repeated_in_their_own_dtype(precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    x = torch.zeros(1, 4, 4, 4, device=DEVICE, dtype=dtype)
    with autocast("cuda", precision):
        assert upsampled(x).dtype == dtype


@pytest.fixture
def little_memory():
    """A card that has no more memory than is held, and so many bytes."""

    def leave(extra):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + extra) / total, 0
        )

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_sampling_goes_on_with_fewer_images_where_memory_is_short(monkeypatch, little_memory):
    monkeypatch.setattr(sampling, "_finite", lambda x0: x0)
    model = load_model("digits-cd", device=DEVICE)
    chosen, seen = plan(model.preset, 1), []
    model.f.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))

    def drawn():
        parts = generate(model.f, model.preset, chosen, range(1024), batch=1024, device=DEVICE)
        return torch.cat(list(parts))

    assert (len(drawn()), seen) == (1024, [1024])
    seen.clear()
    little_memory(16 << 20)
    assert len(drawn()) == 1024
    assert sum(seen) == 1024
    assert max(seen) < 1024


def test_a_batch_of_large_images_is_as_many_pixels_as_one_of_small_ones():
    for side in (8, 32, 64, 256, 512, 2048):
        images = room.most_images((side, side))
        assert images == 1 or images * side * side == room.PIXELS
        assert images >= 1


def test_copies_of_a_state_are_page_locked_as_one_piece():
    like = {name: torch.zeros(n, device=DEVICE) for name, n in {"a": 3, "b": 70, "c": 0}.items()}
    like["scalar"] = torch.zeros((), device=DEVICE)
    like["cpu"] = torch.zeros(5)
    made = buffers(like)
    assert {name: t.shape for name, t in made.items()} == {n: t.shape for n, t in like.items()}
    assert [name for name, t in made.items() if t.is_pinned()] == ["a", "b", "scalar"]
    assert made["a"].untyped_storage().data_ptr() == made["b"].untyped_storage().data_ptr()
    assert made["a"].untyped_storage().nbytes() < 2048


def test_features_are_summed_without_waiting(waiting_is_an_error):
    sums, rows = GaussianSums(16), torch.zeros(8, 16, device=DEVICE)
    sums.add(rows)
    waiting_is_an_error()
    sums.add(rows)
    assert {total.device.type for total in sums.sums} == {"cuda"}


def test_the_peak_of_memory_is_without_that_of_the_measured_products():
    peak_flops.cache_clear()
    peak_flops(DEVICE, "bf16")
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()


def test_numbers_that_are_sent_are_not_waited_for(waiting_is_an_error):
    t = torch.zeros(9)
    to_device(t, DEVICE)
    waiting_is_an_error()
    to_device(t, DEVICE)


@pytest.mark.parametrize("name", DIGITS)
def test_each_method_can_be_deterministic(name):
    with deterministic(DEVICE, wanted=True):
        steps = fit(*started(name))
        next(steps)
        next(steps)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_edit_of_two_pictures():
    model = load_model("digits-cd", device=DEVICE)
    a, b = torch.zeros(2, 3, 8, 8, device=DEVICE)
    made = editing.interpolate(model, a, b, frames=3)
    assert made.device.type == "cuda"
