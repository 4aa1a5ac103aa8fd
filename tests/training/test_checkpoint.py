import shutil

import pytest
import torch
from torch.amp import GradScaler

from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import Stage
from cmtool.core.precond import Preconditioned, consistency_scalings, log_label
from cmtool.errors import DivergedError, InputError, ResourceError
from cmtool.formats.checkpoints import checkpoints, newest_checkpoint
from cmtool.formats.native import read_about
from cmtool.training import checkpoint as module
from cmtool.training.checkpoint import (
    Saver,
    load_checkpoint,
    save_checkpoint,
    state_tensors,
    take_snapshot,
)
from cmtool.training.fit import fit
from tests.training.test_fit import data, model, objective, settings, train_state


def trained(steps=3):
    state = train_state(model())
    list(fit(state, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings(steps=steps)))
    return state


def same(a, b):
    files_a, files_b = state_tensors(a), state_tensors(b)
    assert files_a.keys() == files_b.keys()
    for name, tensors in files_a.items():
        assert tensors.keys() == files_b[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, files_b[name][key]), (name, key)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = trained()
    path = save_checkpoint(tmp_path, state, {"kind": "consistency"})
    fresh = train_state(model())
    load_checkpoint(path, fresh)
    assert fresh.step == 3
    same(state, fresh)
    assert read_about(path / "ema.safetensors")["weights"] == "ema"
    assert {f.name for f in path.iterdir()} == {
        "model.safetensors", "target.safetensors", "ema.safetensors", "optimizer.safetensors",
        "state.json", "manifest.json",
    }  # fmt: skip


def test_a_run_in_fp16_goes_on_bit_equal_with_its_scale(tmp_path):
    def start():
        state = train_state(model())
        state.scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        return state

    def go_on(state, steps):
        heavy = objective(lambda hi, lo: torch.full_like(hi, 100.0))
        half = settings(steps=steps, precision="fp16")
        return [
            info.skipped for info in fit(state, heavy, data, lambda k, n: Stage(n=5, mu=0.9), half)
        ]

    straight, stopped, resumed = start(), start(), start()
    skipped = go_on(straight, 30)
    assert any(skipped[:18])
    assert not all(skipped[:18])
    assert any(skipped[18:])
    go_on(stopped, 18)
    load_checkpoint(save_checkpoint(tmp_path, stopped, {}), resumed)
    assert go_on(resumed, 30) == skipped[18:]
    same(straight, resumed)
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


def test_the_layout_of_weights_does_not_show_in_a_checkpoint(tmp_path):
    state, other = trained(), train_state(model())
    before = save_checkpoint(tmp_path / "a", state, {})
    state.student.to(memory_format=torch.channels_last)
    after = save_checkpoint(tmp_path / "b", state, {})
    assert (after / "manifest.json").read_text() == (before / "manifest.json").read_text()
    other.student.to(memory_format=torch.channels_last)
    load_checkpoint(after, other)
    same(state, other)


def test_a_resumed_run_ends_bit_equal(tmp_path):
    straight = trained(20)
    path = save_checkpoint(tmp_path, trained(7), {})
    resumed = train_state(model())
    load_checkpoint(path, resumed)
    list(fit(resumed, objective(), data, lambda k, n: Stage(n=5, mu=0.9), settings(steps=20)))
    # 7 steps of a 7-step run and of a 20-step run are the same here: the rate is constant
    same(straight, resumed)


@pytest.mark.parametrize("part", ["student", "target", "ema"])
def test_numbers_that_are_not_finite_are_never_saved(tmp_path, part):
    state = trained(1)
    models = {"student": state.student, "target": state.target, "ema": state.emas["ema"].model}
    with torch.no_grad():
        next(models[part].parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite at step 1"):
        save_checkpoint(tmp_path, state, {})
    assert list(tmp_path.iterdir()) == []


def test_a_state_without_moments_comes_back(tmp_path):
    """As between two stages of progressive distillation, where the optimizer starts anew."""
    state = trained(2)
    state.optimizer.state.clear()
    path = save_checkpoint(tmp_path, state, {})
    other = trained(3)
    load_checkpoint(path, other)
    same(state, other)


def saver(folder, notes):
    return Saver(folder, {}, keep=2, note=notes.append)


def test_a_second_copy_takes_no_new_memory(tmp_path):
    notes, state = [], trained(2)
    writer = saver(tmp_path, notes)
    writer.prepare(state)
    writer.finish(final=False)
    places = [t.data_ptr() for file in writer.snapshot.files.values() for t in file.values()]
    for _ in range(2):
        writer.save(state, wait=True)
        again = [t.data_ptr() for file in writer.snapshot.files.values() for t in file.values()]
        assert again == places
    assert notes == []


def test_training_goes_on_while_a_copy_is_written(tmp_path):
    state = trained(2)
    wanted = take_snapshot(state)
    writer = saver(tmp_path, [])
    writer.save(state, wait=False)
    with torch.no_grad():
        for p in state.student.parameters():
            p.zero_()
    writer.finish(final=True)
    fresh = train_state(model())
    load_checkpoint(tmp_path / "step-0000002", fresh)
    for name, tensor in wanted.files["model"].items():
        assert torch.equal(fresh.student.network.state_dict()[name], tensor)


@pytest.fixture
def room(monkeypatch):
    """How many bytes are free, in a list."""
    free = [1 << 40]
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, *free)
    )
    return free


def test_room_is_looked_for_before_saving_and_made_by_pruning_to_keep(tmp_path, room, monkeypatch):
    notes = []
    for steps in (1, 2, 3, 4):
        save_checkpoint(tmp_path, trained(steps), {})
    state = trained(5)
    needed = int(take_snapshot(state).num_bytes * 1.05)
    before = module.prune

    def pruned(*arguments):
        before(*arguments)
        room[0] = needed

    room[0] = needed - 1
    monkeypatch.setattr(module, "prune", pruned)
    saver(tmp_path, notes).save(state, wait=True)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-0000004", "step-0000005"]
    assert notes == []


def test_without_room_a_run_goes_on_twice_and_ends_at_the_third_time(tmp_path, room):
    notes, state = [], trained(1)
    writer = saver(tmp_path, notes)
    room[0] = 1000
    for _ in range(3):
        writer.save(state, wait=False)
    with pytest.raises(ResourceError, match="no room on the disk for checkpoint step-0000001"):
        writer.finish(final=False)
    assert len(notes) == 2
    assert "going on without it; free some: it needs 0.0 MB and has 0.0" in notes[0]
    assert list(tmp_path.iterdir()) == []


def test_room_in_between_starts_the_count_anew(tmp_path, room):
    notes, state = [], trained(1)
    writer = saver(tmp_path, notes)
    for free in (0, 0, 1 << 40, 0, 0):
        room[0] = free
        writer.save(state, wait=False)
        writer.thread.join()
    writer.finish(final=False)
    assert len(notes) == 4
    room[0] = 0
    with pytest.raises(ResourceError):
        writer.save(state, wait=True)


def test_a_checkpoint_is_whole_though_latest_cannot_be_written(tmp_path):
    notes = []
    (tmp_path / "latest.json").mkdir()
    saver(tmp_path, notes).save(trained(1), wait=True)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-0000001"
    assert notes == [f"after saving step-0000001: {tmp_path}/latest.json is not a regular file"]


def test_a_slow_save_is_told_of(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(module, "SLOW", -1.0)
    saver(tmp_path, notes).save(trained(1), wait=True)
    assert notes == ["saving took 0 s: see that whoever stops this run waits as long"]


def test_a_folder_that_cannot_be_written_to_is_told_like_a_full_disk(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    notes = []
    writer = saver(tmp_path / "checkpoints", notes)
    with pytest.raises(ResourceError, match=r"cannot write to .*checkpoints: File exists"):
        writer.save(trained(1), wait=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, trained(1), {})
    other = train_state(Preconditioned(
        Mlp(MlpOptions(width=16, depth=3), channels=2),
        consistency_scalings, log_label, sigma_data=0.5, sigma_min=0.002,
    ))  # fmt: skip
    with pytest.raises(InputError, match="does not fit this run"):
        load_checkpoint(path, other)


def test_nothing_is_pruned_for_a_checkpoint_that_was_written_wrong(tmp_path, monkeypatch):
    state, remarks = trained(), []
    saver = Saver(tmp_path, {}, keep=2, note=remarks.append)
    for step in (1, 2):
        state.step = step
        saver.save(state, wait=True)
    write = module.write_checkpoint

    def damaging(folder, snapshot, about):
        final = write(folder, snapshot, about)
        (final / "model.safetensors").write_bytes(b"")
        return final

    monkeypatch.setattr(module, "write_checkpoint", damaging)
    state.step = 3
    saver.save(state, wait=True)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-000000{n}" for n in (1, 2, 3)]
    assert "model.safetensors is damaged" in remarks[0]
    assert newest_checkpoint(tmp_path)[0].name == "step-0000002"
