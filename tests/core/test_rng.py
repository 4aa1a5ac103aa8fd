import pytest
import torch
from torch import nn

from cmtool.core.rng import (
    SeededNoise,
    keyed_generator,
    same_dropout,
    seeded,
    seeded_labels,
    step_generator,
)


def test_noise_belongs_to_the_image():
    like = torch.zeros(5, 3, 4, 6)
    together = SeededNoise([4, 9, 2, 7, 0])
    first, second = together(like), together(like)
    assert not torch.equal(first, second)
    for row, seed in enumerate([4, 9, 2, 7, 0]):
        alone = SeededNoise([seed])
        assert torch.equal(alone(like[:1])[0], first[row])
        assert torch.equal(alone(like[:1])[0], second[row])


def test_a_label_belongs_to_its_seed():
    labels = seeded_labels([4, 9, 2, 4], 10)
    assert labels.dtype == torch.int64
    assert labels[0] == labels[3]
    for label, seed in zip(labels, [4, 9, 2, 4], strict=True):
        assert torch.equal(seeded_labels([seed], 10)[0], label)
    assert seeded_labels(range(8), 10).tolist() == [5, 5, 4, 2, 9, 4, 6, 2]  # of every version


def test_labels_are_uniform():
    counts = seeded_labels(range(5000), 10).bincount(minlength=10)
    assert 400 < int(counts.min()) <= int(counts.max()) < 600


def test_labels_are_as_likely_as_their_shares():
    counts = seeded_labels(range(5000), 3, [0.7, 0.0, 0.3]).bincount(minlength=3)
    assert counts[1] == 0
    assert 3400 < int(counts[0]) < 3600
    few = seeded_labels([4, 9], 3, [0.7, 0.0, 0.3])
    assert torch.equal(few, seeded_labels([9, 4], 3, [0.7, 0.0, 0.3]).flip(0))


@pytest.mark.parametrize("other", [(1, 2, 4), (1, 3, 3), (2, 2, 3)])
def test_every_part_of_the_key_counts(other):
    a = torch.randn(8, generator=step_generator(1, 2, 3))
    assert torch.equal(a, torch.randn(8, generator=step_generator(1, 2, 3)))
    assert not torch.equal(a, torch.randn(8, generator=step_generator(*other)))


def test_global_state_is_put_back():
    before = torch.get_rng_state()
    with seeded(keyed_generator("x")):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_replay_repeats_the_masks_and_then_moves_on():
    drop, x = nn.Dropout(0.5), torch.ones(1000)
    with same_dropout() as replay:
        first = drop(x)
        replay()
        second = drop(x)
        third = drop(x)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
