import json
import os

import pytest

from cmtool.errors import InputError
from cmtool.formats.checkpoints import (
    Score,
    best,
    checkpoints,
    clear_temporary,
    is_best,
    newest_checkpoint,
    prune,
    verify,
)
from cmtool.training.checkpoint import Saver
from tests.training.test_checkpoint import save_checkpoint, trained


def test_a_damaged_checkpoint_is_found_and_passed_over(tmp_path):
    good = save_checkpoint(tmp_path, trained(2), {})
    bad = save_checkpoint(tmp_path, trained(3), {})
    content = bytearray((bad / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (bad / "model.safetensors").write_bytes(bytes(content))
    newest, complaints = newest_checkpoint(tmp_path)
    assert newest == good
    assert "step-0000003" in complaints[0]
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        verify(bad)


@pytest.mark.parametrize("harm", ["no manifest", "cut", "file missing"])
def test_half_a_checkpoint_does_not_exist(tmp_path, harm):
    path = save_checkpoint(tmp_path, trained(1), {})
    if harm == "no manifest":
        (path / "manifest.json").unlink()
    elif harm == "cut":
        os.truncate(path / "ema.safetensors", 100)
    else:
        (path / "optimizer.safetensors").unlink()
    assert newest_checkpoint(tmp_path)[0] is None


def test_a_folder_with_weights_alone_says_which_file_to_give(tmp_path):
    path = save_checkpoint(tmp_path, trained(1), {})
    (path / "manifest.json").unlink()
    with pytest.raises(InputError) as error:
        verify(path)
    assert error.value.hint == f"give its file of weights: {path / 'ema.safetensors'}"
    (path / "ema.safetensors").rename(path / "method.safetensors")  # no weights of a network
    with pytest.raises(InputError) as error:
        verify(path)
    assert error.value.hint == f"give its file of weights: {path / 'model.safetensors'}"
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError) as error:
        verify(path)
    assert error.value.hint == "give another checkpoint"


def test_a_damaged_newer_checkpoint_costs_no_good_one(tmp_path):
    for steps in (1, 2, 3, 9):
        save_checkpoint(tmp_path, trained(steps), {})
    prune(tmp_path, 2, newest=3)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-0000002", "step-0000003", "step-0000009"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-10000000", "step-9999999", "step-5000x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-9999999", "step-10000000"]


def test_prune_keeps_the_newest_and_temporaries_go(tmp_path):
    for steps in (1, 2, 3, 4):
        save_checkpoint(tmp_path, trained(steps), {})
    (tmp_path / ".tmp-9-123").mkdir()
    prune(tmp_path, 2)
    clear_temporary(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["latest.json", "step-0000003", "step-0000004"]
    assert json.loads((tmp_path / "latest.json").read_text())["checkpoint"] == "step-0000004"


VALUES = {1: 5.0, 2: 2.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 9.0, 7: float("nan")}


@pytest.mark.parametrize("keep_best", [0, 1, 3])
def test_the_best_checkpoints_are_kept_beside_the_newest(tmp_path, keep_best):
    state = trained()
    saver = Saver(tmp_path, {}, keep=2, keep_best=keep_best, note=print)
    seen = {}
    for step, value in VALUES.items():
        state.step = step
        score = Score("m", 8, value)
        ranked = sorted(seen, key=lambda s: (seen[s], s))[:keep_best]
        expected = value == value and any(
            len(ranked) <= i or value < seen[ranked[i]] for i in range(keep_best)
        )
        assert is_best(tmp_path, score, keep_best) == expected
        saver.save(state, wait=True, score=score)
        seen[step] = value
        ranked = sorted((s for s in seen if seen[s] == seen[s]), key=lambda s: (seen[s], s))
        kept = {*list(seen)[-2:], *ranked[:keep_best]}
        assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == sorted(kept)
        for path in checkpoints(tmp_path):
            verify(path)
    facts = json.loads((tmp_path / "best.json").read_text())
    assert facts["checkpoint"] == ("step-0000002" if keep_best else None)
    assert newest_checkpoint(tmp_path)[0].name == "step-0000007"


def test_values_of_another_metric_or_number_of_images_are_not_compared(tmp_path):
    state = trained()
    saver = Saver(tmp_path, {}, keep=2, keep_best=1, note=print)
    saver.save(state, wait=True, score=Score("m", 8, 1.0))
    assert not is_best(tmp_path, Score("m", 8, 2.0), 1)
    assert is_best(tmp_path, Score("m", 16, 2.0), 1)
    assert is_best(tmp_path, Score("other", 8, 2.0), 1)
    (tmp_path / "best.json").write_text('{"best": 3')
    assert best(tmp_path) == {}
    assert is_best(tmp_path, Score("m", 8, 2.0), 1)
