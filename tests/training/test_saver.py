import errno
import os
import shutil

import pytest
import torch

from cmtool.errors import ResourceError
from cmtool.formats.checkpoints import checkpoints, newest_checkpoint
from cmtool.training import checkpoint as module
from cmtool.training.checkpoint import Saver, load_checkpoint, take_snapshot
from tests.training.test_checkpoint import save_checkpoint, trained
from tests.training.test_fit import model, train_state


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
        module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 50, 0, *free)
    )
    return free


@pytest.mark.parametrize("kind", ["no size", "no answer"])
def test_a_file_system_that_does_not_say_its_size_is_written_to(tmp_path, monkeypatch, kind):
    def usage(_):
        if kind == "no answer":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return shutil._ntuple_diskusage(0, 0, 0)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    saver(tmp_path, []).save(trained(1), wait=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000001"]


def test_room_is_looked_for_before_saving_and_made_by_pruning_to_keep(tmp_path, room, monkeypatch):
    notes = []
    for steps in (1, 2, 3, 4):
        save_checkpoint(tmp_path, trained(steps), {})
    state = trained(5)
    needed = int(take_snapshot(state).num_bytes * 1.05)
    before = module.checkpoints.prune

    def pruned(*arguments):
        before(*arguments)
        room[0] = needed

    room[0] = needed - 1
    monkeypatch.setattr(module.checkpoints, "prune", pruned)
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
    assert "going on without it; free disk space: it needs 0.0 MB and has 0.0" in notes[0]
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
    assert notes == ["saving took 0 s: give a stopped run as long before it is killed"]


def test_a_folder_that_cannot_be_written_to_is_told_like_a_full_disk(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    notes = []
    writer = saver(tmp_path / "checkpoints", notes)
    with pytest.raises(ResourceError, match=r"cannot write to .*checkpoints: File exists"):
        writer.save(trained(1), wait=True)


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


def test_room_is_made_by_old_checkpoints_and_not_by_the_one_that_a_run_goes_on_from(tmp_path, room):
    """Those after it are damaged: a run that resumed has passed over them."""
    for step in (1, 2, 4, 5):
        save_checkpoint(tmp_path, trained(step), {})
    room[0] = 0
    with pytest.raises(ResourceError, match="no room"):
        module.make_room(tmp_path, take_snapshot(trained(3)), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == [
        f"step-000000{step}" for step in (2, 4, 5)
    ]
