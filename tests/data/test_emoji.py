"""The bundled emoji: whole, in their split, and as the vendors drew them."""

import numpy as np
import pytest

from cmtool.data import emoji
from cmtool.data.datasets import load_dataset
from cmtool.errors import InputError

NAMES = {
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body",
    "Smileys & Emotion", "Symbols", "Travel & Places",
}  # fmt: skip


def test_both_splits_hold_every_emoji_of_both_vendors_once():
    parts = [load_dataset(name) for name in ("emoji", "emoji:held-out")]
    assert sum(map(len, parts)) == 2 * 3781
    for part in parts:
        assert tuple(part.images.shape[1:]) == (3, 32, 32)
        assert set(part.class_names) == NAMES
        assert part.labels.unique().tolist() == list(range(9))
    assert len(parts[1]) >= 2 * 400


def test_no_emoji_that_is_held_out_is_a_skin_tone_of_one_that_is_not():
    base, held_out = emoji.stored()["base"], emoji.held_out()
    assert not set(base[held_out]) & set(base[~held_out])


def test_pictures_lie_on_white_and_belong_to_their_names():
    name = emoji.stored()["name"].tolist()
    heart = [name.index("heavy black heart") + vendor * len(name) for vendor in range(2)]
    for picture in emoji.pictures(np.array(heart)):
        assert (picture[:, 0, 0] == 255).all()
        red, green, blue = picture[:, 14, 16].astype(int)
        assert red > 180
        assert max(green, blue) < 100


def test_a_split_that_is_none_is_named():
    with pytest.raises(InputError, match="no split 'test' of the emoji"):
        load_dataset("emoji:test")
