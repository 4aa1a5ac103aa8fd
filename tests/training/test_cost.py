import pytest
import torch

from cmtool.core.methods import Models
from cmtool.core.networks import NETWORKS
from cmtool.core.rng import step_generator
from cmtool.errors import ResourceError
from cmtool.models import load_model
from cmtool.presets.build import (
    build_curriculum,
    build_network,
    build_objective,
    build_source,
    can_recompute,
)
from cmtool.presets.toml import load_preset
from cmtool.system import devices
from cmtool.system.dist import ALONE
from cmtool.training import cost
from cmtool.training.cost import Memory, check_memory, fitting_parts, seconds_a_step, step_memory
from cmtool.training.state import build_state

PARAMETERS = {"digits-edm": 828_771}


@pytest.fixture(scope="module")
def teacher():
    return load_model("digits-edm")


def test_networks_take_weights_gradients_moments_averages_target_and_teacher(teacher):
    size = 4 * PARAMETERS["digits-edm"]
    assert step_memory(load_preset("digits-edm"), None, "cpu").networks == 5 * size  # one average
    assert step_memory(load_preset("digits-ct"), None, "cpu").networks == 6 * size  # and a target
    assert (
        step_memory(load_preset("digits-cd"), teacher, "cpu").networks == 6 * size
    )  # and a teacher
    none = load_preset("digits-edm", {"train.ema": []})
    assert step_memory(none, None, "cpu").networks == 4 * size


def kept_by_a_real_step(preset):
    """Bytes of all tensors that autograd keeps in a step of four images."""
    state = build_state(preset, None, "cpu")
    own = {p.untyped_storage().data_ptr() for p in state.student.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    objective = build_objective(preset, None)
    stage = build_curriculum(preset)(0, preset.train.steps)
    models = Models(state.student.train(), state.target or state.student)
    x0, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(models, x0, labels, stage, step_generator(0, 0, 0))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["digits-edm", "digits-ct"])
def test_an_image_takes_what_the_backward_pass_needs(name):
    preset = load_preset(name)
    assert step_memory(preset, None, "cpu").image * 4 == pytest.approx(
        kept_by_a_real_step(preset), rel=0.1
    )


def test_blocks_that_are_computed_again_keep_their_inputs():
    again = load_preset("digits-edm", {"train.checkpoint_activations": True})
    network, inputs = build_network(again.model), {}
    for block in network.modules():
        if isinstance(block, NETWORKS["adm"].blocks):
            block.register_forward_pre_hook(
                lambda _, given: inputs.update({id(given[0]): given[0]})
            )
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    kept = sum(x.numel() * 4 for x in inputs.values())
    assert step_memory(again, None, "cuda").image > kept > 50_000


def test_recomputed_blocks_and_half_precision_take_less():
    whole = step_memory(load_preset("digits-edm"), None, "cpu").image
    again = load_preset("digits-edm", {"train.checkpoint_activations": True})
    assert step_memory(again, None, "cpu").image < whole / 2
    elsewhere = step_memory(load_preset("digits-edm"), None, "cuda").image
    assert whole == elsewhere * 2 // 3
    half = load_preset("digits-edm", {"train.precision": "bf16"})
    assert step_memory(half, None, "cpu").image == whole // 2


def test_the_batch_is_split_into_the_fewest_parts_that_fit():
    preset, memory = load_preset("digits-edm", {"train.batch": 12}), Memory(100, 10)
    assert fitting_parts(preset, memory, 220) == 1
    assert fitting_parts(preset, memory, 219) == 2
    assert fitting_parts(preset, memory, 130) == 4
    assert fitting_parts(preset, memory, 130, processes=2) == 2
    assert fitting_parts(preset, memory, 109) is None


@pytest.mark.parametrize(
    ("free", "hint"),
    [
        (30 << 20, "--accumulate 4"),
        (16 << 20, "--set train.checkpoint_activations=true --accumulate 64"),
        (10 << 20, "smaller network"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_what_would(monkeypatch, free, hint):
    monkeypatch.setattr(cost, "free_memory", lambda _: free)
    with pytest.raises(ResourceError, match="training needs about") as caught:
        check_memory(load_preset("digits-edm"), None, "cpu", ALONE)
    assert hint in caught.value.hint


def test_a_split_batch_or_unknown_memory_passes(monkeypatch):
    split = load_preset("digits-edm", {"train.accumulate": 4})
    monkeypatch.setattr(cost, "free_memory", lambda _: 30 << 20)
    check_memory(split, None, "cpu", ALONE)
    monkeypatch.setattr(cost, "free_memory", lambda _: None)
    check_memory(load_preset("digits-edm", {"train.batch": 1 << 20}), None, "cpu", ALONE)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"loss.source.mixed": 1000}, "--set loss.source.mixed=1"),
        ({"loss.source.mixed": 1, "train.batch": 1 << 17}, "--set train.batch=65536"),
    ],
)
def test_a_bank_of_paths_larger_than_memory_is_refused_with_a_smaller_one(
    monkeypatch, overrides, hint
):
    monkeypatch.setattr(cost, "free_memory", lambda _: 1 << 30)
    teacher = load_model("digits-edm")
    with pytest.raises(ResourceError, match=r"paths of the teacher need .* 1\.0 GiB") as caught:
        check_memory(load_preset("digits-cmt", overrides), teacher, "cpu", ALONE)
    assert hint in caught.value.hint
    check_memory(load_preset("digits-cmt"), teacher, "cpu", ALONE)


def test_a_bank_of_paths_is_counted_as_it_is():
    preset = load_preset("emoji-cmt")
    source = build_source(
        preset, lambda *_: (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64)),
        lambda x, *_: x,
    )  # fmt: skip
    source(0, 0)
    bank = source.banks[0]
    held = sum(t.numel() for t in (bank.points, bank.ends)) * 4
    assert cost.check_bank(preset, 1 << 40, "cpu", 1) == held
    assert cost.check_bank(preset, 1 << 40, "cpu", 2) == held // 2
    assert cost.check_bank(load_preset("digits-cd"), 0, "cpu", 1) == 0


def test_free_memory_is_what_the_container_leaves(tmp_path):
    assert devices._left_of_cgroup(tmp_path) == float("inf")
    for name, text in {
        "max": "1000",
        "current": "700",
        "stat": "inactive_file 50\nactive_file 5",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert devices._left_of_cgroup(tmp_path) == 355
    (tmp_path / "memory.max").write_text("max")
    assert devices._left_of_cgroup(tmp_path) == float("inf")


def test_a_step_of_more_images_takes_longer(monkeypatch):
    monkeypatch.setattr(cost, "PROBE", 2)
    tiny = {"model.network.model_channels": 16, "model.network.norm_groups": 4}
    few = seconds_a_step(load_preset("digits-edm", {**tiny, "train.batch": 2}), None, "cpu")
    many = seconds_a_step(load_preset("digits-edm", {**tiny, "train.batch": 2000}), None, "cpu")
    assert many / few > 50


def test_blocks_are_not_computed_again_where_the_method_or_network_forbids_it(monkeypatch):
    assert can_recompute(load_preset("digits-edm"))
    assert not can_recompute(load_preset("digits-sct"))
    assert not can_recompute(load_preset("digits-edm", {"model.network": {"name": "mlp"}}))
    monkeypatch.setattr(cost, "free_memory", lambda _: 16 << 20)
    with pytest.raises(ResourceError) as caught:
        check_memory(load_preset("digits-edm"), None, "cpu", ALONE._replace(world_size=2))
    assert caught.value.hint.endswith("--accumulate 32")
